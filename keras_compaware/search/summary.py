"""What the records of a sweep say: means over seeds, the best period of every family and budget."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from keras_compaware.search.grid import BASELINES, Trial
from keras_compaware.search.results import latest

Row = dict[str, Any]

_GROUP = ("kind", "family", "budget", "schedule", "every")
_MEASURED = ("validation", "test")
_MEANS = ("kernel_ratio", "model_ratio", "sparsity", "rank", "norm_ratio", "distortion", "seconds")


def in_order(trials: Sequence[Trial], records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Returns the last record of every trial in the order of the trials, others left out."""
    found = latest(records)
    return [{**found[trial.id], **trial.to_json()} for trial in trials if trial.id in found]


def aggregate(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Returns a row for all that differs in more than the seed, in the order of the records.

    Means and (sample) standard deviations are those of the trials that are done: "seeds" of them,
    beside "diverged" and "failed" ones. What no trial has is None, as is the deviation of one seed.

    Args:
        records: Records as `in_order` returns them.

    Example:
    >>> trial = dict(kind="every", family="rank", budget="1/8", schedule="cosine", every=10)
    >>> tests = enumerate((0.5, 0.75))
    >>> records = [
    ...     {**trial, "seed": n, "status": "done", "validation": 0.5, "test": t} for n, t in tests
    ... ]
    >>> (row,) = aggregate(records)
    >>> row["seeds"], row["test"], round(row["test_std"], 3)
    (2, 0.625, 0.177)
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in _GROUP), []).append(record)
    return [_row(key, group) for key, group in groups.items()]


def _row(key: tuple, group: Sequence[Mapping[str, Any]]) -> Row:
    done = [record for record in group if record["status"] == "done"]
    row: Row = dict(zip(_GROUP, key, strict=True))
    row["seeds"] = len(done)
    for status in ("diverged", "failed"):
        row[status] = sum(record["status"] == status for record in group)
    for name in (*_MEASURED, *_MEANS):
        values = [record[name] for record in done if record.get(name) is not None]
        row[name] = statistics.fmean(values) if values else None
        if name in _MEASURED:
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def best_periods(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Returns the best period of every family, budget and schedule, and how period 1 compares.

    The best period has the highest mean accuracy on the validation split; of equals the shortest.
    What is reported of it, "test", is measured on the test split, which has no part in the choice.
    A period with a trial that diverged comes after all others.

    Args:
        rows: Rows as `aggregate` returns them.

    Returns:
        Rows with "family", "budget", "schedule", "best_every", "test" and "test_std" at that
        period, "kernel_ratio", "test_at_1" and "test_at_1_std", "gain" (test at the best period
        minus that at period 1) and "place": whether period 1 is the "best", the "worst" or
        "between"; "" if it is not in the sweep or alone there, or all are equal. The dense network
        and the baselines stand beside them: "dense", "dense_std", and so for every baseline.

    Example:
    >>> row = dict(kind="every", family="rank", budget="1/8", schedule="cosine", diverged=0)
    >>> row |= dict(kernel_ratio=0.125, test_std=None)
    >>> rows = [
    ...     {**row, "every": 1, "validation": 0.7, "test": 0.72},
    ...     {**row, "every": 10, "validation": 0.8, "test": 0.79},
    ...     {**row, "every": 100, "validation": 0.75, "test": 0.81},
    ... ]
    >>> (best,) = best_periods(rows)
    >>> best["best_every"], best["test"], best["place"]
    (10, 0.79, 'worst')
    """
    rows = list(rows)
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "every" and (row["validation"] is not None or row["diverged"]):
            groups.setdefault((row["family"], row["budget"], row["schedule"]), []).append(row)
    others = {(r["kind"], r["family"], r["budget"], r["schedule"]): r for r in rows}
    found = []
    for (family, budget, schedule), group in groups.items():
        best = max(sorted(group, key=lambda row: row["every"]), key=_score)
        first = next((row for row in group if row["every"] == 1), {})
        result = {
            "family": family,
            "budget": budget,
            "schedule": schedule,
            "best_every": best["every"],
            **{name: best[name] for name in ("test", "test_std", "kernel_ratio")},
            "test_at_1": first.get("test"),
            "test_at_1_std": first.get("test_std"),
            "gain": _difference(best["test"], first.get("test")),
            "place": _place(first, group) if first else "",
        }
        for kind in ("dense", *BASELINES):
            where = ("", "") if kind.startswith("dense") else (family, budget)
            row = others.get((kind, *where, schedule), {})
            result |= {kind: row.get("test"), f"{kind}_std": row.get("test_std")}
        found.append(result)
    return found


def _score(row: Mapping[str, Any]) -> float:
    return -math.inf if row["diverged"] or row["validation"] is None else row["validation"]


def _place(first: Mapping[str, Any], group: Sequence[Mapping[str, Any]]) -> str:
    scores = [_score(row) for row in group]
    if min(scores) == max(scores):
        return ""
    return {max(scores): "best", min(scores): "worst"}.get(_score(first), "between")


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def distortions(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Returns the distortion of the firings of the first seed of every point of the grid.

    Returns:
        Rows with "family", "budget", "schedule", "every" and "firings", pairs of an optimizer step
        and the distortion; without what acts inside the training step, of which none is known.
    """
    found: dict[tuple, Row] = {}
    for record in records:
        if record["kind"] == "every" and record.get("distortions"):
            row = {name: record[name] for name in _GROUP[1:]}
            found.setdefault(tuple(row.values()), {**row, "firings": record["distortions"]})
    return list(found.values())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV; None is an empty field, and what is nested is left out.

    Example:
    >>> print(csv_text([{"a": 1, "b": None}, {"a": 2, "c": 0.5, "d": {}}]), end="")
    a,b,c
    1,,
    2,,0.5
    """
    columns = dict.fromkeys(
        key for row in rows for key, value in row.items() if not isinstance(value, dict | list)
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str] | None = None) -> str:
    """Returns the summary of a sweep in Markdown.

    Args:
        rows: Rows as `aggregate` returns them.
        labels: What families are called, by name; default: their names.
    """
    labels = labels or {}
    best = best_periods(rows)
    parts = [
        "Test accuracy in %, mean ± standard deviation over seeds. The best period is chosen on "
        "the validation split.",
        _best_table(best, labels),
        _places(best),
        "All periods, test accuracy in %:",
        _periods_table(rows, labels, _cell),
    ]
    if any(row["kind"] == "every" and row["distortion"] is not None for row in rows):
        parts += [
            "All periods, distortion of the last firing (||C(w) - w|| / ||w||, mean of kernels):",
            _periods_table(rows, labels, _distortion),
        ]
    dense = [row for row in rows if row["kind"] in ("dense", "dense_longer")]
    parts[0:0] = [
        f"{row['kind'].replace('_', ' ')}, {row['schedule']}: "
        f"{_percent(row['test'], row['test_std'])} %, {_seeds(row)}"
        for row in dense
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _best_table(best: Sequence[Row], labels: Mapping[str, str]) -> str:
    kinds = [kind for kind in ("dense", *BASELINES) if any(row[kind] is not None for row in best)]
    header = ["", "budget", "schedule", "kernels", "best period", "test", "period 1", "difference"]
    header += ["period 1 is", *(BASELINES.get(kind, "dense") for kind in kinds)]
    lines = [
        [
            labels.get(row["family"], row["family"]),
            *(row["budget"], row["schedule"], _ratio(row["kernel_ratio"]), str(row["best_every"])),
            _percent(row["test"], row["test_std"]),
            _percent(row["test_at_1"], row["test_at_1_std"]),
            "" if row["gain"] is None else f"{100 * row['gain']:+.2f}",
            row["place"],
            *(_percent(row[kind], row[f"{kind}_std"]) for kind in kinds),
        ]
        for row in best
    ]
    return _table(header, lines) if lines else ""


def _places(best: Sequence[Row]) -> str:
    counts = {place: sum(row["place"] == place for row in best) for place in _PLACES}
    total = sum(counts.values())
    if not total:
        return ""
    told = ", ".join(f"{_PLACES[place]} in {count}" for place, count in counts.items())
    return f"Of {total} curves, period 1 is {told}."


_PLACES = {"best": "the best", "between": "between", "worst": "the worst"}


def _periods_table(
    rows: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    cell: Callable[[Mapping[str, Any] | None], str],
) -> str:
    grid = [row for row in rows if row["kind"] == "every"]
    periods = sorted({row["every"] for row in grid})
    curves: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for row in grid:
        curves.setdefault((row["family"], row["budget"], row["schedule"]), {})[row["every"]] = row
    lines = [
        [labels.get(family, family), budget, schedule, *(cell(curve.get(n)) for n in periods)]
        for (family, budget, schedule), curve in curves.items()
    ]
    header = ["", "budget", "schedule", *(f"every {n}" for n in periods)]
    return _table(header, lines) if lines else ""


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    lost = [f"{row[status]} {status}" for status in ("diverged", "failed") if row[status]]
    return ", ".join(filter(None, [_percent(row["test"], row["test_std"]), *lost]))


def _distortion(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["distortion"] is None else f"{row['distortion']:.3f}"


def _percent(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _seeds(row: Mapping[str, Any]) -> str:
    lost = [f"{row[status]} {status}" for status in ("diverged", "failed") if row[status]]
    return ", ".join([f"{row['seeds']} seed" + "s" * (row["seeds"] != 1), *lost])


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rules = ["---", "---", "---", *["---:"] * (len(header) - 3)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rules, *lines])
