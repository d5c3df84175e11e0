"""The program `report`."""

import json
import os
import pathlib
import shlex

from absl import flags

from keras_compaware._files import write_text_atomic
from keras_compaware.cli import program
from keras_compaware.cli.files import first_line, writing
from keras_compaware.cli.workdir import Workdir
from keras_compaware.reporting import checked, early_line, html, results_table, states_table


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("workdir", None, "Folder of a finished run.")
    flags.DEFINE_multi_string(
        "compare", [], "Further folders, separated by commas; the flag may be given several times."
    )
    flags.DEFINE_string(
        "out",
        None,
        "HTML file to write: one page with charts that needs no network (pip install "
        "'keras-compaware[report]').",
    )


def main() -> None:
    """Prints the results of one or several runs, and writes a page if one is asked for."""
    further = [path for paths in flags.FLAGS.compare for path in paths.split(",") if path]
    out = program.output_path("out", ".html") if flags.FLAGS["out"].present else None
    paths = [program.required("workdir"), *further]
    reports = [_read(path) for path in paths]
    labels = [pathlib.Path(path).resolve().name for path in paths]
    program.console.print(results_table(reports, labels), markup=False)
    if len(reports) == 1:
        print_states(reports[0])
        program.say(f"\n{reports[0]['command']}")
    if out is not None:
        _write(out, reports, labels)


def print_states(report: dict) -> None:
    """Prints what cutting channels or compacting early did, if the run has done that."""
    line = early_line(report)
    if line is not None:
        program.say(f"\n{line}")
    table = states_table(report)
    if table is not None:
        program.say("")
        program.console.print(table, markup=False)


def _read(path: str) -> dict:
    workdir = Workdir(os.path.expanduser(path))
    if not workdir.report.exists():
        hint = (
            "it was not finished: run train again" if workdir.config.exists() else "no run is there"
        )
        raise program.UserError(f"there is no {workdir.report}; {hint}")
    try:
        report = json.loads(workdir.report.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise program.UserError(
            f"{workdir.report} is damaged: {first_line(error)}. Run train again with --overwrite."
        ) from error
    try:
        return checked(report)
    except ValueError as error:
        raise program.UserError(f"{workdir.report}: {error}") from error


def _write(path: str, reports: list[dict], labels: list[str]) -> None:
    try:
        page = html(reports[0], reports[1:], labels)
    except ImportError as error:
        raise program.UserError(f"--out: {error}") from error
    with writing(path):
        write_text_atomic(path, page)
    program.say(f"\nwritten to {shlex.quote(path)}")


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
