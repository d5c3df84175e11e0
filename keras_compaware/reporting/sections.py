"""The sections of the page of a report (private)."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras_compaware.reporting import figures
from keras_compaware.reporting.check import number
from keras_compaware.reporting.markup import Html, details, join, table, tag
from keras_compaware.reporting.table import early_line, runs_of

Report = Mapping[str, Any]
Charts = dict[str, list[dict[str, Any]]]

_ROWS = 200  # of a table of a chart's numbers, at most
_LAYERS = 32  # in a chart, at most
_FEW = 12  # layers that are all drawn, however small
_KERNELS = 6  # curves of single kernels in one chart, at most
_HEIGHT = 320
_BARS = {"parameters": "Parameters", "macs": "MACs", "channels": "Channels", "rank": "Ranks"}


class Section(NamedTuple):
    """A part of the page: its name in links, its title, its content."""

    name: str
    title: str
    body: Html


class _Cost(NamedTuple):
    """What is smaller the better: key of the report, what it is called, how it is shown."""

    key: str
    name: str
    shown: Any
    better: str = "smaller"
    worse: str = "larger"
    scale: float = 1.0
    unit: str = ""


def _kilobytes(value):
    return f"{value / 1024:,.1f} KB"


def _count(value):
    return f"{value:,}"


def _time(milliseconds):
    if milliseconds < 1:
        return f"{1000 * milliseconds:.3g} µs"
    return f"{milliseconds:,.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms"


_COSTS = (
    _Cost("litert_bytes", "LiteRT file", _kilobytes, scale=1 / 1024, unit="KB"),
    _Cost("encoded_bytes", "encoded weights", _kilobytes, scale=1 / 1024, unit="KB"),
    _Cost("gzip_bytes", "LiteRT file, gzip", _kilobytes, scale=1 / 1024, unit="KB"),
    _Cost("parameters", "parameters", _count, "fewer", "more"),
    _Cost("macs", "MACs", _count, "fewer", "more"),
    _Cost("latency_ms", "latency, 1 thread", _time, "faster", "slower", unit="ms"),
)
_TILES = ("litert_bytes", "encoded_bytes", "parameters", "macs", "latency_ms")


def _percent(value):
    return f"{100 * value:.2f} %"


def _change(cost: _Cost, before: float, after: float) -> tuple[str, str | None]:
    """How a cost has changed in words, and whether that is "good" or "bad"."""
    if before == after or not before or not after:
        return ("unchanged" if before == after else f"from {cost.shown(before)}"), None
    ratio = max(before, after) / min(before, after)
    if f"{ratio:.2f}" == "1.00":
        return "about the same", None
    better = after < before
    return f"{ratio:.2f} × {cost.better if better else cost.worse}", "good" if better else "bad"


def _signed(points: float) -> str:
    return f"{points:+.2f} points".replace("-", "−")


def _points(report: Report) -> float:
    return 100 * (report["compact"]["accuracy"] - report["dense"]["accuracy"])


def summary(report: Report) -> str:
    """Returns the result in a sentence.

    >>> sizes = {"litert_bytes": 4000, "latency_ms": 0.2}
    >>> twin, small = {"accuracy": 0.97, **sizes}, {"accuracy": 0.96, **sizes, "litert_bytes": 1000}
    >>> summary({"dense": twin, "compact": small})
    'Beside the dense twin: accuracy −1.00 points; LiteRT file 4.00 × smaller; latency unchanged.'
    """
    told = [f"accuracy {_signed(_points(report))}"]
    for cost in _COSTS:
        if cost.key in ("litert_bytes", "latency_ms"):
            words, _ = _change(cost, report["dense"][cost.key], report["compact"][cost.key])
            told.append(f"{cost.name.split(',')[0]} {words}")
    return f"Beside the dense twin: {'; '.join(told)}."


# ---- headline -----------------------------------------------------------------------------------


def headline(report: Report) -> Section:
    """Returns accuracy, sizes and latency, dense against compact."""
    dense, small = report["dense"], report["compact"]
    points = _points(report)
    tiles = [
        _tile(
            "accuracy",
            _percent(small["accuracy"]),
            _signed(points),
            "good" if points > 0 else ("bad" if points < -0.005 else None),
            f"dense {_percent(dense['accuracy'])}",
            small["accuracy"] / max(dense["accuracy"], small["accuracy"], 1e-12),
        )
    ]
    rows = [("accuracy", *(_percent(side["accuracy"]) for side in (dense, small)), _signed(points))]
    for cost in _COSTS:
        before, after = dense[cost.key], small[cost.key]
        words, mood = _change(cost, before, after)
        rows.append((cost.name, cost.shown(before), cost.shown(after), words))
        if cost.key in _TILES:
            share = after / max(before, after, 1e-12)
            was = f"dense {cost.shown(before)}"
            tiles.append(_tile(cost.name, cost.shown(after), words, mood, was, share))
    note = (
        f"Accuracy is that of the LiteRT files on the test split, seed {report['config']['seed']}. "
        "Encoded weights are the archive of bit-packed codes, all other weights included; MACs are "
        "multiply-accumulates of one example; latency is the median on one thread, both files "
        "measured in turn."
    )
    early = early_line(report)
    return Section(
        "results",
        "Results",
        join(
            tag("ul", *tiles, class_="tiles"),
            table(
                "Dense twin and compact model",
                ("measure", "dense twin", "compact", "change"),
                rows,
                hide_caption=True,
            ),
            tag("p", note, class_="note"),
            None if early is None else tag("p", early[0].upper() + early[1:] + "."),
            _states(small.get("shrink")),
        ),
    )


def _tile(name, value, change, mood, before, share):
    bar = tag("i", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%")
    return tag(
        "li",
        tag("p", name, class_="name"),
        tag("p", value, class_="value"),
        tag("p", change, class_=f"change {mood or ''}".strip()),
        tag("p", before, class_="before"),
        tag("div", bar, class_="bar", aria_hidden="true"),
        class_="tile",
    )


def _states(rows):
    if not rows:
        return None
    lines = [
        (
            row["what"],
            _percent(row["keras_accuracy"]),
            _count(row["parameters"]),
            _count(row["macs"]),
        )
        for row in rows
    ]
    return table(
        "Channels removed: the Keras model on the test split",
        ("state", "accuracy", "parameters", "MACs"),
        lines,
    )


# ---- several runs -------------------------------------------------------------------------------


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows that no other one beats in `cost` and `accuracy`, by increasing cost.

    >>> rows = [{"cost": c, "accuracy": a} for c, a in ((3, 90), (1, 80), (2, 70), (3, 85))]
    >>> [(row["cost"], row["accuracy"]) for row in pareto_front(rows)]
    [(1, 80), (3, 90)]
    """
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["cost"], -row["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def comparison(reports: Sequence[Report], labels: Sequence[str], charts: Charts) -> Section:
    """Returns accuracy against cost, and a table of all runs."""
    runs = runs_of(reports, labels)
    variants, on_front = [], []
    for cost in _COSTS:
        rows = [
            {
                "label": name,
                "is_dense": is_dense,
                "accuracy": 100 * values["accuracy"],
                "cost": values[cost.key] * cost.scale,
                "shown": cost.shown(values[cost.key]),
            }
            for name, values, is_dense in runs
        ]
        front = pareto_front(rows)
        best = {(row["cost"], row["accuracy"]) for row in front}
        on_front.append([(row["cost"], row["accuracy"]) in best for row in rows])
        title = f"{cost.name}, {cost.unit}" if cost.unit else cost.name
        variants.append((cost.name, figures.tradeoff(rows, front, title)))
    lines = [
        (
            name,
            _percent(values["accuracy"]),
            *(
                _on_front(cost.shown(values[cost.key]), kept[place])
                for cost, kept in zip(_COSTS, on_front, strict=True)
            ),
        )
        for place, (name, values, _) in enumerate(runs)
    ]
    told = table(
        "All runs. ◆, the Pareto front: no run is as good in accuracy and cost, and better in one.",
        ("run", "accuracy", *(cost.name for cost in _COSTS)),
        lines,
    )
    chart = _chart(
        charts,
        "tradeoff",
        "Accuracy against cost",
        "Test accuracy of the LiteRT files; up and to the left is better.",
        variants,
        None,
        choose="Cost",
    )
    return Section("comparison", "Several runs", join(chart, told))


def _on_front(shown, is_kept):
    if not is_kept:
        return shown
    mark = tag("span", "◆", class_="front", aria_hidden="true")
    return join(mark, tag("span", "on the front: ", class_="hidden"), " ", tag("strong", shown))


# ---- plan ---------------------------------------------------------------------------------------


def plan(report: Report) -> Section | None:
    """Returns what happened to every kernel, and why nothing did."""
    rows = report.get("plan")
    if not rows:
        return None
    lines = [
        (row["name"], row["layer"], "×".join(map(str, row["shape"])), _what_happens(row))
        for row in rows
    ]
    treated = sum(bool(row["actions"]) for row in rows)
    note = (
        f"{treated} of {len(rows)} kernels and channel spaces are compressed, "
        f"{len(rows) - treated} left alone. Arguments that are None are left out."
    )
    return Section(
        "plan",
        "Plan",
        join(
            tag("p", note, class_="note"),
            table(
                "What happens to every kernel",
                ("kernel", "layer", "shape", "what happens"),
                lines,
                left=(0, 1, 2, 3),
                wide=3,
                hide_caption=True,
            ),
        ),
    )


def _what_happens(row):
    reason = row.get("reason") or ""
    if not row["actions"]:
        badge = tag("span", "left alone", class_="badge")
        return tag("span", badge, " ", reason, class_="skipped")
    lines = [tag("div", tag("code", _brief(action))) for action in row["actions"]]
    if reason:
        lines.append(tag("div", f"left out: {reason}", class_="skipped"))
    return join(*lines)


def _brief(action):
    """An action without the arguments that are None.

    >>> _brief("Every(every=20, constraint=LowRank(rank=None, ratio=0.2, tile=None), ramp=None)")
    'Every(every=20, constraint=LowRank(ratio=0.2))'
    """
    return re.sub(r"(?<=\()\w+=None(?:, )?", "", re.sub(r", \w+=None(?=[,)])", "", str(action)))


# ---- layers -------------------------------------------------------------------------------------


def layers(report: Report, charts: Charts) -> Section | None:
    """Returns parameters, MACs, channels and ranks of every layer, before and after."""
    rows = _layer_rows(report)
    if not rows:
        return None
    body = []
    for key, title in _BARS.items():
        known = _before_and_after(report, rows, key)
        shown = _worth_a_bar(known)
        if not shown:
            continue
        what, told = "layers", "Dense twin and compact model, layer by layer."
        if key == "rank":
            what, told = "kernels", "The highest rank possible and that after training, by kernel."
        if len(shown) < len(known):
            told += f" The {len(shown)} largest of {len(known)} {what}; the table has all of them."
        unit = "MACs" if key == "macs" else key
        sides = ("full rank", "rank") if key == "rank" else figures.SIDES
        spec = figures.bars(shown, unit, "" if key == "rank" else unit, sides)
        body.append(_chart(charts, f"layers-{key}", title, told, [(title, spec)], None))
    channels = report["compact"].get("channels") or []
    return Section(
        "layers",
        "Layer by layer",
        join(
            tag("div", *body, class_="charts"),
            _layer_table(rows),
            None
            if not channels
            else table(
                "Channels that nothing reads were removed",
                ("channel space", "before", "after"),
                [(row["name"], _count(row["before"]), _count(row["after"])) for row in channels],
            ),
        ),
    )


def _before_and_after(report, rows, key):
    """Name, before and after of all of which both numbers are known: layers, or kernels of ranks.

    Where the report has no spectra, or no channels of layers, compaction may have told of them.
    """
    if key == "rank":
        spectra = report.get("spectra") or []
        known = [(row["name"], row["full_rank"], row["rank"]) for row in spectra]
        notes = [(row["name"], _note_of_rank(row["note"])) for row in rows]
        return known or [(name, int(found[2]), int(found[1])) for name, found in notes if found]
    known = [(row["name"], *row[key]) for row in rows if row.get(key) and None not in row[key]]
    if key == "channels" and not known:
        spaces = report["compact"].get("channels") or []
        return [(row["name"], row["before"], row["after"]) for row in spaces]
    return known


def _worth_a_bar(rows):
    """The largest layers, in their order; among many, none whose bar could not be seen."""
    costs = sorted((max(row[1:]) for row in rows), reverse=True)
    if not costs or not costs[0]:
        return []
    least = 0 if len(rows) <= _FEW else 0.01 * costs[0]
    if len(rows) > _LAYERS:
        least = max(least, costs[_LAYERS - 1])
    return [row for row in rows if max(row[1:]) >= least][:_LAYERS]


def _layer_rows(report):
    """The record of layers, or what compaction told of those that it looked at."""
    notes = {row["name"]: row for row in report["compact"].get("layers") or []}
    ranks: dict[str, list[str]] = {}
    for row in report.get("spectra") or []:
        ranks.setdefault(row["layer"], []).append(f"{row['rank']:,} of {row['full_rank']:,}")
    rows = report.get("layers") or [
        {
            "name": row["name"],
            "class": row["layer"],
            "parameters": [row["before"], row["after"]],
        }
        for row in notes.values()
    ]
    return [
        {
            **row,
            "note": notes[row["name"]]["note"] if row["name"] in notes else "",
            "ranks": ranks.get(row["name"]) or _rank_of_note(notes.get(row["name"])),
        }
        for row in rows
    ]


def _note_of_rank(note):
    return re.match(r"rank (\d+) of (\d+)$", note)


def _rank_of_note(row):
    found = _note_of_rank(row["note"]) if row else None
    return [f"{found[1]} of {found[2]}"] if found else []


def _layer_table(rows):
    def pair(values):
        if not values or all(value is None for value in values):
            return ""
        before, after = ("–" if value is None else _count(value) for value in values)
        return before if before == after else f"{before} → {after}"

    has = {key: any(row.get(key) for row in rows) for key in ("macs", "channels", "ranks", "note")}
    header = ["layer", "class", "parameters"]
    header += [name for key, name in (("macs", "MACs"), ("channels", "channels")) if has[key]]
    header += [name for key, name in (("ranks", "rank"), ("note", "compaction")) if has[key]]
    lines = []
    for row in rows:
        line = [row["name"], row["class"], pair(row["parameters"])]
        line += [pair(row.get(key)) for key in ("macs", "channels") if has[key]]
        line += [", ".join(row["ranks"])] if has["ranks"] else []
        line += [row["note"]] if has["note"] else []
        lines.append(line)
    wide = len(header) - 1 if has["note"] else None
    left = (0, 1, wide) if has["note"] else (0, 1)
    return table("Every layer, before → after", header, lines, left=left, wide=wide)


# ---- training -----------------------------------------------------------------------------------

_METRICS = (
    ("loss", "Loss", True, False),
    ("accuracy", "Accuracy", False, True),
    ("learning_rate", "Learning rate", False, False),
    ("sparsity", "Sparsity", False, True),
    ("rank", "Mean rank", False, False),
)


def training(report: Report, charts: Charts) -> Section | None:
    """Returns the curves of the training and of the dense twin's, with the firings."""
    small, dense = (report[side].get("history") or [] for side in ("compact", "dense"))
    if not small:
        return None
    firings = report["compact"].get("firings") or []
    steps = number(report.get("steps_per_epoch"))
    marks = [(row["step"] / steps, _told(row)) for row in firings] if steps else []
    body = []
    for key, title, logarithmic, is_share in _METRICS:
        curves = _curves(key, small, dense, is_share)
        varied = {y for curve in curves for y in curve["y"]}
        if not curves or (key in ("sparsity", "rank") and len(varied) < 2):
            continue
        logarithmic = logarithmic and min(varied) > 0
        told = ["By epoch."]
        if any(f"val_{key}" in row for row in (*small, *dense)):
            told = ["By epoch; solid: validation split, dotted: training split."]
        shown = [] if key == "learning_rate" else marks
        if shown:
            told.append("Marks at the bottom are firings.")
        axis = f"{title.lower()}, log scale" if logarithmic else title.lower()
        spec = figures.training(axis, curves, shown, logarithmic=logarithmic, percent=is_share)
        name = f"training-{key.replace('_', '-')}"
        body.append(_chart(charts, name, title, " ".join(told), [(title, spec)], None))
    if not body:
        return None
    return Section(
        "training",
        "Training",
        join(
            _training_note(report, firings),
            tag("div", *body, class_="charts"),
            details("The epochs as a table", _history_table("Compact model", small)),
            details("The epochs of the dense twin as a table", _history_table("Dense twin", dense))
            if dense
            else None,
        ),
    )


def _curves(key, small, dense, is_share):
    curves = []
    scale = 100 if is_share else 1
    for rows, side, colour in ((dense, "dense twin", "--dense"), (small, "compact", "--compact")):
        for prefix, split, dash in (("", "training", "dot"), ("val_", "validation", "solid")):
            points = [
                (place, scale * value)
                for place, row in enumerate(rows, 1)
                if (value := number(row.get(f"{prefix}{key}"))) is not None
            ]
            if not points:
                continue
            alone = key not in ("loss", "accuracy")
            name = side if alone else f"{side}, {split}"
            if key == "learning_rate" and rows is dense and small:
                continue  # the same one
            shape = ".2f" if is_share else ".4g"
            unit = " %" if is_share else ""
            hover = f"epoch %{{x}}: %{{y:{shape}}}{unit}<extra>{name}</extra>"
            curves.append(
                figures.curve(name, points, colour, hover=hover, dash="solid" if alone else dash)
            )
    return curves


def _told(firing):
    values = [value for value in map(number, firing["distortion"].values()) if value is not None]
    mean = f", mean distortion {statistics.fmean(values):.3g}" if values else ""
    return f"firing at step {firing['step']:,}{mean}"


def _training_note(report, firings):
    parts = []
    seconds = [number(report[side].get("seconds")) for side in ("compact", "dense")]
    if seconds[0]:
        twin = f" (dense twin: {seconds[1]:,.1f} s)" if seconds[1] else ""
        parts.append(f"Training took {seconds[0]:,.1f} s{twin}.")
    if firings:
        spent = sum(number(row.get("seconds")) or 0.0 for row in firings)
        parts.append(f"{len(firings):,} firings took {spent:,.2f} s of it.")
    return tag("p", " ".join(parts), class_="note") if parts else None


def _history_table(side, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "epoch"))
    stride = -(-len(rows) // _ROWS)
    kept = [row for place, row in enumerate(rows) if not (len(rows) - 1 - place) % stride]
    told = "" if stride == 1 else f", every {stride}th"
    return table(
        f"{side}: the epochs{told}",
        ("epoch", *columns),
        [
            (_short(row.get("epoch")), *(_short(row.get(column)) for column in columns))
            for row in kept
        ],
        left=(),
    )


def _short(value):
    value = number(value)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


# ---- distortion ---------------------------------------------------------------------------------


def distortion(report: Report, charts: Charts) -> Section | None:
    """Returns what the firings changed of every kernel."""
    firings = report["compact"].get("firings") or []
    kernels: dict[str, list[tuple[int, float]]] = {}
    together: list[tuple[int, list[float]]] = []
    for row in firings:
        values = {name: number(value) for name, value in row["distortion"].items()}
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            kernels.setdefault(name, []).append((row["step"], value))
        if values:
            together.append((row["step"], list(values.values())))
    if not kernels:
        return None
    if len(kernels) <= _KERNELS:
        variants = [("all kernels", figures.distortion(kernels))]
    else:
        variants = [("all kernels: mean and range", figures.distortion_range(together))]
        variants += [(name, figures.distortion({name: rows})) for name, rows in kernels.items()]
    lines = [
        (
            name,
            f"{len(rows):,}",
            *(f"{value:.4g}" for value in (rows[0][1], statistics.fmean(y for _, y in rows))),
            f"{rows[-1][1]:.4g}",
        )
        for name, rows in kernels.items()
    ]
    told = table(
        "Distortion of the firings, kernel by kernel",
        ("kernel", "firings", "first", "mean", "last"),
        lines,
    )
    chart = _chart(
        charts,
        "distortion-chart",
        "Distortion of the firings",
        "How much a firing changes a kernel w, relative to its norm. It falls as training "
        "learns to keep what survives.",
        variants,
        told,
        choose="Kernel",
    )
    return Section("distortion", "Distortion", chart)


# ---- spectra ------------------------------------------------------------------------------------


def spectra(report: Report, charts: Charts) -> Section | None:
    """Returns the singular values of the kernels, before and after."""
    rows = report.get("spectra")
    if not rows:
        return None
    # The kernel that lost most of its rank comes first.
    rows = sorted(rows, key=lambda row: row["rank"] / max(row["full_rank"], 1))
    lines = []
    for row in rows:
        tops = [_largest(row.get(key)) for key in ("dense", "trained")]
        lines.append(
            (row["name"], _count(row["full_rank"]), _count(row["rank"]), *map(_short, tops))
        )
    told = table(
        "Ranks and largest singular values",
        ("kernel", "full rank", "rank after training", "largest, dense twin", "largest, trained"),
        lines,
    )
    chart = _chart(
        charts,
        "spectrum",
        "Singular values",
        "Of a kernel as a matrix whose columns are its output units: dense twin and trained with "
        "compression. The dotted line is the rank that is left.",
        [(row["name"], figures.spectrum(row)) for row in rows],
        told,
        choose="Kernel",
    )
    return Section("spectra", "Spectra of the kernels", chart)


def _largest(pairs):
    values = [number(pair[1]) for pair in pairs or [] if isinstance(pair, list) and len(pair) == 2]
    return max((value for value in values if value is not None), default=None)


# ---- reproduction -------------------------------------------------------------------------------


def reproduction(report: Report) -> Section:
    """Returns the command, the configuration and what it ran on."""
    facts = [
        (name, str(report[key]))
        for key, name in (("backend", "backend"), ("machine", "machine"))
        if report.get(key)
    ]
    data = report.get("data")
    if isinstance(data, dict):
        facts.append(("data", " ".join(str(value) for value in data.values())))
    if number(report.get("steps_per_epoch")):
        facts.append(("optimizer steps an epoch", _count(report["steps_per_epoch"])))
    versions = report.get("versions")
    if isinstance(versions, dict):
        facts += [(str(name), str(version)) for name, version in versions.items()]
    config = json.dumps(report["config"], indent=2, ensure_ascii=False)
    return Section(
        "reproduction",
        "Reproduce",
        join(
            tag("h3", "Command"),
            _command(report["command"]),
            _facts_table(facts),
            tag("h3", "Configuration"),
            tag("pre", config, tabindex="0", role="region", aria_label="Configuration"),
        ),
    )


def _facts_table(facts):
    if not facts:
        return None
    header = ("what it ran with", "value")
    return table("What it ran with", header, facts, left=(0, 1), hide_caption=True)


def _command(command):
    words = [tag("span", word) for word in command.split(" ")]
    spaced = join(words[0], *(part for word in words[1:] for part in (" ", word)))
    return tag("pre", spaced, class_="wrap", tabindex="0", role="region", aria_label="Command")


# ---- charts -------------------------------------------------------------------------------------


def _chart(charts, name, title, told, variants, numbers, choose=None):
    """A chart with its caption; of several variants, the reader chooses one.

    Args:
        charts: Takes up the descriptions of the charts, by name.
        name: Of the chart.
        title: Of the chart.
        told: What it shows.
        variants: Pairs of what a variant is called and its description.
        numbers: A table of the same numbers, if none stands beside it.
        choose: What is chosen.
    """
    height = max(spec.pop("height", _HEIGHT) for _, spec in variants)
    charts[name] = [spec for _, spec in variants]
    chooser = None
    if len(variants) > 1:
        options = [tag("option", title, value=place) for place, (title, _) in enumerate(variants)]
        chooser = tag("label", f"{choose}: ", tag("select", *options, data_for=name))
    without = "The chart needs JavaScript; the table holds the numbers."
    plot = tag(
        "div",
        id=name,
        class_="plot",
        role="img",
        aria_label=f"Chart: {title}. {told} A table holds the numbers.",
        style=f"min-height:{height:.0f}px;height:{height:.0f}px",
    )
    return tag(
        "figure",
        tag("figcaption", title, tag("span", told)),
        chooser,
        plot,
        tag("noscript", tag("p", without, class_="note")),
        None if numbers is None else details("The numbers as a table", numbers),
    )
