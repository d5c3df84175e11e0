"""Charts as Plotly describes them: plain JSON values (private).

Colours are names of the page's CSS variables ("--dense"), which its script replaces, so that a
chart follows the colour scheme of the reader. Texts are escaped: Plotly takes some HTML in them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keras_compaware.reporting.check import number

Points = Sequence[tuple[float, float]]
Spec = dict[str, Any]

POINTS = 600  # of a curve, at most
_COLOURS = tuple(f"--series{i}" for i in range(1, 7))
_ROW = 30  # pixels of a layer
SIDES = ("dense twin", "compact")


def label(name: Any, width: int | None = None) -> str:
    """Returns a text as Plotly shows it literally, shortened in the middle to some width.

    >>> label("<b>block1</b>/conv", 9)
    '&lt;b&gt;b…conv'
    """
    name = " ".join(str(name).split())
    if width and len(name) > width:
        head = width // 2
        name = f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def thinned(points: Points, most: int = POINTS) -> list[tuple[float, float]]:
    """Returns every k-th point, with the smallest k that leaves few enough, and the last one.

    >>> thinned([(1, 1), (2, 4), (3, 9), (4, 16)], most=2)
    [(1, 1), (3, 9), (4, 16)]
    """
    points = list(points)
    stride = -(-len(points) // most) if points else 1
    kept = points[::stride]
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]


def curve(
    name: str, points: Points, colour: str, *, hover: str, dash: str = "solid", width: float = 2
) -> Spec:
    """Returns a line through points; `hover` is a template of what is shown at a point."""
    points = thinned(points)
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": label(name, 40),
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": colour, "dash": dash, "width": width},
        "marker": {"color": colour},
        "hovertemplate": hover,
    }


def training(
    title: str,
    curves: Sequence[Spec],
    firings: Sequence[tuple[float, str]],
    *,
    logarithmic: bool = False,
    percent: bool = False,
) -> Spec:
    """Returns curves over epochs, with a mark at the bottom for every firing.

    Args:
        title: Of the vertical axis.
        curves: Results of `curve`.
        firings: Epochs, with what is shown there.
        logarithmic: Whether the vertical axis is.
        percent: Whether its numbers are percentages.
    """
    data = list(curves)
    if firings:
        kept = thinned(firings)
        width = 1.2 if len(kept) <= 60 else 0.5
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "firing",
                "x": [epoch for epoch, _ in kept],
                "y": [0.03] * len(kept),
                "yaxis": "y2",
                "text": [shown for _, shown in kept],
                "marker": {
                    "symbol": "line-ns",
                    "size": 9,
                    "line": {"color": "--firing", "width": width},
                },
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    axis: Spec = {"title": {"text": title}}
    if logarithmic:
        axis |= {"type": "log", "tickformat": "~g", "nticks": 5}
    if percent:
        axis |= {"ticksuffix": " %"}
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"},
        "yaxis": axis,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def bars(
    rows: Sequence[tuple[str, float | None, float | None]],
    title: str,
    unit: str,
    sides: tuple[str, str] = SIDES,
) -> Spec:
    """Returns two bars a layer, before and after, the first layer at the top.

    Args:
        rows: Names with the numbers before and after.
        title: Of the horizontal axis.
        unit: What is counted, for the hover; may be empty.
        sides: What the bars before and after are called.
    """
    names = [label(name) for name, _, _ in rows]
    places = list(range(len(rows)))
    data = []
    unit = f" {unit}" if unit else ""
    for which, colour, side in zip((1, 2), ("--dense", "--compact"), sides, strict=True):
        values = [row[which] for row in rows]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": side,
                "y": places,
                "x": values,
                "text": names,
                "textposition": "none",
                "marker": {"color": colour},
                "hovertemplate": f"%{{text}}<br>{side}: %{{x:,}}{unit}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": title}, "rangemode": "tozero", "nticks": 5},
        "yaxis": {
            "tickvals": places,
            "ticktext": [label(name, 20) for name, _, _ in rows],
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
        "barmode": "group",
        "bargap": 0.3,
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout, "height": 110 + _ROW * len(rows)}


def spectrum(row: Mapping[str, Any]) -> Spec:
    """Returns the singular values of a kernel, before and after, on logarithmic axes."""
    data = []
    for key, name, colour, mark in (
        ("dense", "dense twin", "--dense", "circle-open"),
        ("trained", "trained with compression", "--compact", "circle"),
    ):
        # What is zero but for rounding would stretch the axis over many decades.
        floor = 1e-6 * max((number(y) or 0.0 for _, y in row.get(key) or []), default=0.0)
        points = [(x, y) for x, y in row.get(key) or [] if (number(y) or 0.0) > floor]
        if points:
            line = curve(name, points, colour, hover=f"k = %{{x}}: %{{y:.4g}}<extra>{name}</extra>")
            data.append({**line, "mode": "lines+markers", "marker": {"symbol": mark, "size": 5}})
            data[-1]["marker"]["color"] = colour
    layout = {
        "xaxis": {"title": {"text": "k"}, "rangemode": "tozero"},
        "yaxis": {
            "title": {"text": "k-th largest singular value"},
            "type": "log",
            "tickformat": "~g",
            "nticks": 6,
        },
        "hovermode": "closest",
    }
    rank = number(row["rank"])
    if rank and rank < row["full_rank"]:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "x0": rank + 0.5,
                "x1": rank + 0.5,
                "line": {"color": "--firing", "width": 1, "dash": "dot"},
            }
        ]
    return {"data": data, "layout": layout}


def distortion(kernels: Mapping[str, Points]) -> Spec:
    """Returns what firings change of some kernels, over optimizer steps."""
    data = [
        {
            **curve(
                name,
                points,
                _COLOURS[place % len(_COLOURS)],
                hover="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
                width=1.5,
            ),
            "mode": "lines+markers",
        }
        for place, (name, points) in enumerate(kernels.items())
    ]
    for line in data:
        line["marker"]["size"] = 4
    return {"data": data, "layout": _distortion_layout(data)}


def distortion_range(steps: Sequence[tuple[int, Sequence[float]]]) -> Spec:
    """Returns mean, smallest and largest distortion of many kernels, over optimizer steps."""
    data = []
    for name, reduce, dash in (("largest", max, "dot"), ("mean", _mean, "solid")):
        points = [(step, reduce(values)) for step, values in steps]
        hover = f"step %{{x}}: %{{y:.3g}}<extra>{name}</extra>"
        data.append(curve(name, points, "--series1", hover=hover, dash=dash))
    points = [(step, min(values)) for step, values in steps]
    hover = "step %{x}: %{y:.3g}<extra>smallest</extra>"
    data.append(curve("smallest", points, "--series2", hover=hover, dash="dot"))
    return {"data": data, "layout": _distortion_layout(data)}


def _mean(values):
    return sum(values) / len(values)


def _distortion_layout(curves):
    axis: Spec = {"title": {"text": "‖C(w) − w‖ / ‖w‖"}, "rangemode": "tozero"}
    if any(value > 0 for line in curves for value in line["y"]):
        axis |= {"type": "log", "tickformat": "~g", "nticks": 6}
    return {
        "xaxis": {"title": {"text": "optimizer step"}, "rangemode": "tozero"},
        "yaxis": axis,
        "hovermode": "closest",
    }


def _side(cost, costs, logarithmic):
    """Where the label of a point stands: towards the middle of the chart."""
    low, high = min(costs), max(costs)
    middle = (low * high) ** 0.5 if logarithmic else (low + high) / 2
    return "bottom right" if cost <= middle else "bottom left"


def tradeoff(
    runs: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], title: str
) -> Spec:
    """Returns accuracy against a cost: a point for each run, a line through the Pareto front.

    Args:
        runs: Rows with `label`, `cost`, `accuracy` (a percentage), `shown` (the cost as text) and
            `is_dense`.
        front: Those of them that no other one beats, by increasing cost.
        title: Of the horizontal axis.
    """
    costs = [row["cost"] for row in runs]
    wide = min(costs) > 0 and max(costs) > 8 * min(costs)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [row["cost"] for row in front],
            "y": [row["accuracy"] for row in front],
            "line": {"shape": "hv", "color": "--firing", "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        }
    ]
    for name, is_dense, colour, symbol in (
        ("dense twin", True, "--dense", "diamond"),
        ("compact", False, "--compact", "circle"),
    ):
        rows = [row for row in runs if row["is_dense"] == is_dense]
        if rows:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers+text" if len(runs) <= 12 else "markers",
                    "name": name,
                    "x": [row["cost"] for row in rows],
                    "y": [row["accuracy"] for row in rows],
                    "text": [f"  {label(row['label'], 26)}  " for row in rows],
                    "customdata": [[label(row["label"]), row["shown"]] for row in rows],
                    "textposition": [_side(row["cost"], costs, wide) for row in rows],
                    "textfont": {"size": 11, "color": "--ink"},
                    "marker": {"size": 11, "symbol": symbol, "color": colour},
                    "hovertemplate": (
                        "%{customdata[0]}<br>%{y:.2f} %, %{customdata[1]}<extra></extra>"
                    ),
                }
            )
    layout = {
        "xaxis": {"title": {"text": title}, **({"type": "log"} if wide else {"nticks": 6})},
        "yaxis": {"title": {"text": "test accuracy"}, "ticksuffix": " %"},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout, "height": 420}
