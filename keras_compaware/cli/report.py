"""The program `report`."""

import json
import pathlib

from absl import flags

from keras_compaware.cli import program
from keras_compaware.cli.workdir import Workdir
from keras_compaware.reporting import early_line, results_table, states_table

_KEYS = ("name", "dense", "compact", "config", "command")


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("workdir", None, "Folder of a finished run.")
    flags.DEFINE_list("compare", [], "Further folders, separated by commas.")


def main() -> None:
    """Prints the results of one or several runs."""
    paths = [program.required("workdir"), *flags.FLAGS.compare]
    reports = [_read(path) for path in paths]
    labels = [pathlib.Path(path).resolve().name for path in paths]
    program.console.print(results_table(reports, labels), markup=False)
    if len(reports) == 1:
        print_states(reports[0])
        program.say(f"\n{reports[0]['command']}")


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
    workdir = Workdir(path)
    if not workdir.report.exists():
        hint = (
            "it was not finished: run train again" if workdir.config.exists() else "no run is there"
        )
        raise program.UserError(f"there is no {workdir.report}; {hint}")
    try:
        report = json.loads(workdir.report.read_text(encoding="utf-8"))
    except ValueError as error:
        raise program.UserError(f"{workdir.report} is damaged: {error}") from error
    missing = [key for key in _KEYS if not isinstance(report, dict) or key not in report]
    if missing:
        raise program.UserError(f"{workdir.report} is no report of a run: it lacks {missing[0]!r}")
    return report


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
