"""The table of results for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

_COLUMNS = (
    *("", "accuracy", "parameters", "MACs"),
    *("encoded KB", "LiteRT KB", "gzip KB", "ms, 1 thread"),
)


def results_table(
    reports: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None
) -> rich.table.Table:
    """Returns a table with the dense twins and the compact models of some reports.

    Accuracies are those of the LiteRT files on the test split; latencies are medians on one
    thread, the files of one report measured in turn. "Encoded" is the archive of bit-packed codes
    with all other weights. Of one report the ratios are shown as well; of several, each dense twin
    once, with the first run that has it.

    Args:
        reports: Contents of `report.json` files.
        labels: What the runs are called; default: network and data set.
    """
    table = rich.table.Table(title=_title(reports), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    if len(reports) == 1:
        (report,) = reports
        table.add_row("dense twin", *_cells(report["dense"]))
        table.add_row("compact", *_cells(report["compact"]))
        table.add_row("compact / dense", *_ratios(report["dense"], report["compact"]))
        return table
    labels = labels or [report["name"] for report in reports]
    for name, values, _ in runs_of(reports, labels):
        table.add_row(name, *_cells(values))
    return table


def runs_of(
    reports: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Returns names, measurements, and whether it is a dense twin: each of these once.

    Args:
        reports: Contents of `report.json` files.
        labels: What the runs are called.
    """
    twins, runs = [], []
    for report, label in zip(reports, labels, strict=True):
        twin = {key: report["dense"][key] for key in ("accuracy", "parameters", "litert_bytes")}
        if twin not in twins:
            twins.append(twin)
            runs.append((f"dense twin, {report['config']['model']}", report["dense"], True))
        runs.append((label, report["compact"], False))
    return runs


def states_table(report: Mapping[str, Any]) -> rich.table.Table | None:
    """Returns a table of what cutting channels and training further did, or None without cuts.

    Accuracies are those of the Keras models on the test split.

    Args:
        report: Content of a `report.json` file.
    """
    rows = report["compact"].get("shrink")
    if not rows:
        return None
    table = rich.table.Table(
        title="channels removed: Keras on the test split",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for number, column in enumerate(("", "accuracy", "parameters", "MACs")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["what"],
            f"{100 * row['keras_accuracy']:.2f} %",
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
        )
    return table


def early_line(report: Mapping[str, Any]) -> str | None:
    """Returns a line about a compaction part-way through training, or None without one.

    Args:
        report: Content of a `report.json` file.
    """
    early = report["compact"].get("early")
    if not early:
        return None
    seconds = early["seconds_per_epoch"]
    return (
        f"compacted after epoch {early['epoch']} of {report['config']['epochs']}: "
        f"{early['parameters']:,} of {report['dense']['parameters']:,} parameters, "
        f"{seconds['before']:.3g} s an epoch before, {seconds['after']:.3g} s after"
    )


def _title(reports: Sequence[Mapping[str, Any]]) -> str | None:
    if len(reports) != 1:
        return None
    report = reports[0]
    return f"{report['name']}: LiteRT on the test split, seed {report['config']['seed']}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{100 * row['accuracy']:.2f} %",
        f"{row['parameters']:,}",
        f"{row['macs']:,}",
        f"{row['encoded_bytes'] / 1024:,.1f}",
        f"{row['litert_bytes'] / 1024:,.1f}",
        f"{row['gzip_bytes'] / 1024:,.1f}",
        f"{row['latency_ms']:.4f}",
    ]


def _ratios(dense: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    difference = 100 * (small["accuracy"] - dense["accuracy"])
    keys = ("parameters", "macs", "encoded_bytes", "litert_bytes", "gzip_bytes", "latency_ms")
    return [
        f"{difference:+.2f} points",
        *(f"1 / {dense[key] / max(small[key], 1e-12):.2f}" for key in keys),
    ]
