"""The table of results for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

_COLUMNS = ("", "accuracy", "parameters", "MACs", "LiteRT KB", "gzip KB", "ms, 1 thread")


def results_table(reports: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """Returns a table with the dense twin and the compact model of each report.

    Accuracies are those of the LiteRT files on the test split; latencies are medians on one
    thread, the files of one report measured in turn.

    Args:
        reports: Contents of `report.json` files.
    """
    table = rich.table.Table(title=_title(reports), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for report in reports:
        dense, small = report["dense"], report["compact"]
        label = f" ({report['name']})" if len(reports) > 1 else ""
        table.add_row(f"dense twin{label}", *_cells(dense))
        table.add_row(f"compact{label}", *_cells(small))
        table.add_row("compact / dense", *_ratios(dense, small))
    return table


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
        f"{row['litert_bytes'] / 1024:,.1f}",
        f"{row['gzip_bytes'] / 1024:,.1f}",
        f"{row['latency_ms']:.4f}",
    ]


def _ratios(dense: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    difference = 100 * (small["accuracy"] - dense["accuracy"])
    keys = ("parameters", "macs", "litert_bytes", "gzip_bytes", "latency_ms")
    return [
        f"{difference:+.2f} points",
        *(f"1 / {dense[key] / max(small[key], 1e-12):.2f}" for key in keys),
    ]
