"""Plots of a sweep (accuracy against the period, heatmaps, distortion of firings), sensitivities.

Matplotlib is imported when a plot is drawn; it comes with the extra `plots`.
"""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keras_compaware._files import atomic_path

Rows = Sequence[Mapping[str, Any]]

FORMATS = ("png", "svg")
_COLOURS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:brown", "tab:olive")
_STYLES = (":", "-.", "--", (0, (8, 2)), (0, (1, 4)))


def can_plot() -> bool:
    """Whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_periods(
    rows: Rows,
    folder: str | os.PathLike,
    labels: Mapping[str, str] | None = None,
    baselines: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """Draws, for every family, test accuracy against the period: a panel for every budget.

    A curve is a schedule: means over seeds, with standard deviations where there are several.
    Horizontal lines are baselines of the same schedule.

    Args:
        rows: Rows as `search.aggregate` returns them.
        folder: An existing folder, for NAME.png and NAME.svg with NAME "accuracy-FAMILY".
        labels: What families are called, by name; default: their names.
        baselines: Kinds of rows that are drawn as lines, with what they are called.

    Returns:
        The files.
    """
    baselines, files = {"dense": "dense", **(baselines or {})}, []
    lines = [row for row in rows if row["kind"] in baselines and row["test"] is not None]
    for family, budgets in _families(rows).items():
        points = [row for group in budgets.values() for row in group]
        schedules = list(dict.fromkeys(row["schedule"] for row in points))
        with _figure(1, len(budgets), pathlib.Path(folder) / f"accuracy-{family}", files) as axes:
            for axis, (budget, group) in zip(axes[0], budgets.items(), strict=True):
                panels = (("", ""), (family, budget))
                beside = [row for row in lines if (row["family"], row["budget"]) in panels]
                _draw_periods(axis, group, schedules)
                _draw_lines(axis, beside, schedules, baselines)
                axis.set_title(f"{(labels or {}).get(family, family)}, {budget}", fontsize=9)
            axes[0][0].set_ylabel("test accuracy, %")
            _common_legend(axes[0])
    return files


def _common_legend(axes):
    """Tells beside the last panel what any of them shows."""
    shown = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, handle)
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    axes[-1].legend(shown.values(), shown.keys(), fontsize=6, **place)


def _draw_periods(axis, group, schedules):
    for number, schedule in enumerate(schedules):
        curve = [row for row in group if row["schedule"] == schedule and row["test"] is not None]
        if not curve:
            continue
        curve.sort(key=lambda row: row["every"])
        axis.errorbar(
            [row["every"] for row in curve],
            [100 * row["test"] for row in curve],
            yerr=[100 * (row["test_std"] or 0.0) for row in curve],
            color=_COLOURS[number % len(_COLOURS)],
            label=schedule,
            marker="o",
            markersize=3,
            linewidth=1.2,
            capsize=2,
        )
    _period_axis(axis, group)


def _period_axis(axis, group):
    periods = sorted({row["every"] for row in group})
    axis.set_xscale("log")
    axis.set_xticks(periods, [str(period) for period in periods], fontsize=7)
    axis.minorticks_off()
    axis.set_xlabel("optimizer steps between compressions")
    axis.grid(alpha=0.3)


def _draw_lines(axis, rows, schedules, baselines):
    for row in rows:
        if row["schedule"] in schedules:
            axis.axhline(
                100 * row["test"],
                color=_COLOURS[schedules.index(row["schedule"]) % len(_COLOURS)],
                linestyle=_STYLES[list(baselines).index(row["kind"]) % len(_STYLES)],
                linewidth=0.9,
                label=f"{baselines[row['kind']]}, {row['schedule']}",
            )


def plot_heatmap(
    rows: Rows, folder: str | os.PathLike, labels: Mapping[str, str] | None = None
) -> list[pathlib.Path]:
    """Draws test accuracy over budget and period: a row of panels a family, a column a schedule.

    Args:
        rows: Rows as `search.aggregate` returns them.
        folder: An existing folder, for heatmap.png and heatmap.svg.
        labels: What families are called, by name; default: their names.

    Returns:
        The files; none without a result.
    """
    families, files = _families(rows), []
    grid = [row for budgets in families.values() for group in budgets.values() for row in group]
    schedules = list(dict.fromkeys(row["schedule"] for row in grid))
    if not grid:
        return []
    height = 0.9 + 0.4 * max(map(len, families.values()))
    path = pathlib.Path(folder) / "heatmap"
    with _figure(len(families), len(schedules), path, files, height) as axes:
        for line, (family, budgets) in zip(axes, families.items(), strict=True):
            found = [row for group in budgets.values() for row in group]
            values = [100 * row["test"] for row in found if row["test"] is not None]
            limits = {"vmin": min(values, default=0), "vmax": max(values, default=100)}
            for axis, schedule in zip(line, schedules, strict=True):
                here = [row for row in found if row["schedule"] == schedule]
                _draw_heatmap(axis, here, list(budgets), limits)
                name = (labels or {}).get(family, family)
                axis.set_title(f"{name}, {schedule}: test accuracy, %", fontsize=9)
    return files


def _draw_heatmap(axis, rows, budgets, limits):
    periods = sorted({row["every"] for row in rows})
    cells = {(row["budget"], row["every"]): row for row in rows}
    found = [[cells.get((budget, period), {}) for period in periods] for budget in budgets]
    tests = [[cell.get("test") for cell in line] for line in found]
    nan = float("nan")
    values = [[nan if test is None else 100 * test for test in line] for line in tests]
    axis.imshow(values, aspect="auto", cmap="viridis", **limits)
    axis.set_xticks(range(len(periods)), [str(period) for period in periods], fontsize=7)
    axis.set_yticks(range(len(budgets)), budgets, fontsize=7)
    axis.set_xlabel("optimizer steps between compressions")
    middle = (limits["vmin"] + limits["vmax"]) / 2
    for y, line in enumerate(found):
        for x, cell in enumerate(line):
            lost = tests[y][x] is None
            text = ("diverged" if cell.get("diverged") else "") if lost else f"{values[y][x]:.1f}"
            colour = "black" if lost or values[y][x] > middle else "white"
            axis.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)


def plot_distortions(
    rows: Rows, folder: str | os.PathLike, labels: Mapping[str, str] | None = None
) -> list[pathlib.Path]:
    """Draws, for every family, what firings change, ||C(w) - w|| / ||w||, over the training.

    A panel is a budget (column) under a schedule (row), a curve is a period.

    Args:
        rows: Rows as `search.distortions` returns them.
        folder: An existing folder, for NAME.png and NAME.svg with NAME "distortion-FAMILY".
        labels: What families are called, by name; default: their names.

    Returns:
        The files.
    """
    files: list[pathlib.Path] = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        budgets, schedules, periods = (
            list(dict.fromkeys(row[name] for row in own))
            for name in ("budget", "schedule", "every")
        )
        path = pathlib.Path(folder) / f"distortion-{family}"
        with _figure(len(schedules), len(budgets), path, files) as axes:
            for line, schedule in zip(axes, schedules, strict=True):
                for axis, budget in zip(line, budgets, strict=True):
                    here = (schedule, budget)
                    curves = [row for row in own if (row["schedule"], row["budget"]) == here]
                    _draw_distortions(axis, curves, sorted(periods))
                    name = (labels or {}).get(family, family)
                    axis.set_title(f"{name}, {budget}, {schedule}", fontsize=9)
                line[0].set_ylabel("distortion of a firing")
            axes[0][-1].legend(fontsize=6, title="every", title_fontsize=6)
    return files


def _draw_distortions(axis, rows, periods):
    from matplotlib import colormaps

    for row in rows:
        shade = periods.index(row["every"]) / max(1, len(periods) - 1)
        steps, values = zip(*row["firings"], strict=True)
        axis.plot(
            *(steps, values),
            color=colormaps["viridis"](0.9 * shade),
            label=str(row["every"]),
            linewidth=1.0,
            marker=".",
            markersize=2,
        )
    axis.set_xlabel("optimizer step")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def plot_sensitivity(sensitivity: Any, path: str | os.PathLike) -> list[pathlib.Path]:
    """Draws how much the loss grows with fewer channels of each space, and lower ranks.

    A panel each for channels and ranks, a curve for every space or kernel: growth of the loss
    against the number that is left. The most sensitive ones, at half of the largest number that was
    measured, are named.

    Args:
        sensitivity: A `Sensitivity`.
        path: An existing folder, for sensitivity.png and sensitivity.svg, or a file that ends in
            .png or .svg, in an existing folder.

    Returns:
        The files.
    """
    files: list[pathlib.Path] = []
    path, formats = pathlib.Path(path), FORMATS
    if path.suffix[1:] in FORMATS:
        path, formats = path.with_suffix(""), (path.suffix[1:],)
    else:
        path /= "sensitivity"
    panels = {"channels kept": sensitivity.channels, "rank": sensitivity.ranks}
    panels = {name: curves for name, curves in panels.items() if curves} or {"channels kept": {}}
    with _figure(len(panels), 1, path, files, formats=formats) as axes:
        for (axis,), (name, curves) in zip(axes, panels.items(), strict=True):
            _draw_sensitivities(axis, curves, sensitivity.baseline)
            axis.set_xlabel(name)
            axis.set_ylabel(f"growth of {sensitivity.measure}", fontsize=6)
    return files


def _draw_sensitivities(axis, curves, baseline):
    def at_half(name):
        return curves[name][min(curves[name], key=lambda n: abs(n - max(curves[name]) / 2))]

    named = sorted(curves, key=at_half, reverse=True)[: len(_COLOURS) * 2]
    for name, curve in curves.items():
        amounts = sorted(curve)
        style = {"color": "lightgray", "zorder": 1}
        if name in named:
            place = named.index(name)
            dash = "-" if place < len(_COLOURS) else "--"
            style = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": dash, "label": name}
        growth = [curve[amount] - baseline for amount in amounts]
        axis.plot(amounts, growth, linewidth=1.0, marker=".", markersize=3, **style)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    if named:
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.02, 1))


def _families(rows: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The points of the grid, by family and budget."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["kind"] == "every":
            found.setdefault(row["family"], {}).setdefault(row["budget"], []).append(row)
    return found


@contextlib.contextmanager
def _figure(
    rows: int,
    columns: int,
    path: pathlib.Path,
    files: list[pathlib.Path],
    height: float = 2.9,
    formats: Sequence[str] = FORMATS,
) -> Iterator:
    """Yields axes, rows by columns; writes the figure in these formats and adds them to `files`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (3.6 * columns + 1.6, height * rows + 0.2)
    with matplotlib.rc_context({"svg.hashsalt": "0", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=False)
        for suffix in formats:
            file = path.with_name(f"{path.name}.{suffix}")
            metadata = {"Software": None} if suffix == "png" else {"Date": None}
            with atomic_path(file) as temporary:
                figure.savefig(temporary, dpi=130, format=suffix, metadata=metadata)
            files.append(file)
