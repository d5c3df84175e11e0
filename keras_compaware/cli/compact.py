"""The program `compact`."""

import json
import os
import sys

import keras
import numpy as np
from absl import flags

from keras_compaware import measure
from keras_compaware._files import write_json_atomic
from keras_compaware.cli import examples, program
from keras_compaware.cli.files import first_line, load_model, save_model, writing
from keras_compaware.compaction import compact, recalibrate_batch_norm
from keras_compaware.reporting import plots
from keras_compaware.search import Allocation, Sensitivity, fit_budget, sensitivity
from keras_compaware.search.budget import checked_target

_OF_A_TARGET = ("data", "round_to", "cache", "plot")


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "The trained model, a .keras file.")
    flags.DEFINE_string("out", None, "The .keras file to write.")
    flags.DEFINE_string(
        "target",
        None,
        "What may be left: params=0.5 or macs=0.5 (fractions), bytes=200000 or latency_ms=1.5 (of "
        "the float32 LiteRT file). Channels and ranks are chosen without any training. Default: "
        "only what changes no output is removed.",
    )
    examples.define_flags(
        "With --target: the data set, of TensorFlow Datasets or digits, on whose training images "
        "the change of the outputs is measured, and batch-norm statistics are estimated again. "
        "Default: the budget is spent by the weights alone.",
        512,
    )
    flags.DEFINE_integer(
        "round_to", 1, "With --target: channels and ranks are multiples of it.", lower_bound=1
    )
    flags.DEFINE_string(
        "allocation",
        None,
        "With --target: a .json file to write with the channels and ranks that are kept; without: "
        "one to read, which may have been edited.",
    )
    flags.DEFINE_string(
        "cache",
        None,
        "With --data: a .jsonl file that keeps each measurement, so that the same command goes on "
        "where it was interrupted, and another target costs no new ones. It is of one model, and "
        "of the same images and --round_to.",
    )
    flags.DEFINE_string(
        "plot",
        None,
        "With --target: a .png or .svg file to draw the sensitivities in, or a folder for both. It "
        "needs Matplotlib.",
    )


def main() -> None:
    """Writes the compacted model."""
    values = flags.FLAGS
    path, out = program.required("model"), program.output_path("out", ".keras")
    if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
        raise program.UserError(
            f"--out names the trained model itself, {path}. Choose another file: training goes on "
            "from the trained model, not from the compacted one."
        )
    target = None if values.target is None else parsed_target(values.target)
    for name in _OF_A_TARGET:
        if target is None and flags.FLAGS[name].present:
            raise program.UserError(f"--{name} is of no use without --target.")
    if values.cache is not None:
        program.output_path("cache", ".jsonl")
        if not values.data:
            raise program.UserError(
                "--cache is of no use without --data: what is told from the weights alone is not "
                "measured, and costs nothing. Name a data set, such as --data=digits."
            )
    if values.plot is not None:
        _check_plot()
    model = load_model(path)
    batches = list(examples.batches()) if values.data else None
    allocation = _allocation(model, target, batches)
    if allocation is None:
        result = compact(model)
        program.say(result)
    else:
        program.say(allocation)
        result = allocation.apply(model)
        if batches is not None:
            recalibrate_batch_norm(result.model, batches, len(batches))
    save_model(result.model, out)
    before, after = measure.parameters(model), measure.parameters(result.model)
    macs = [measure.macs(each) for each in (model, result.model)]
    difference = (
        f"outputs differ by {result.max_error:.1e} (relative) at most"
        if allocation is None
        else f"{macs[1]:,} MACs instead of {macs[0]:,}; not trained further"
    )
    program.say(f"\nwritten to {out}: {after:,} parameters instead of {before:,}; {difference}")


def parsed_target(text: str) -> dict[str, float]:
    """Returns the target that text such as "macs=0.5" stands for."""
    kind, _, number = text.partition("=")
    try:
        return {kind.strip(): float(number)}
    except ValueError:
        raise program.UserError(
            f"--target must be like macs=0.5, params=0.5, bytes=200000 or latency_ms=1.5. "
            f"Received: {text}"
        ) from None


def _allocation(
    model: keras.Model, target: dict[str, float] | None, batches: list[np.ndarray] | None
) -> Allocation | None:
    values = flags.FLAGS
    if target is None:
        return None if values.allocation is None else _read(values.allocation)
    if values.allocation is not None:
        program.output_path("allocation", ".json")
    checked_target(target)  # before much is measured for it
    measured = sensitivity(
        model,
        batches,
        round_to=values.round_to,
        cache=None if values.cache is None else os.path.expanduser(values.cache),
        verbose=int(sys.stdout.isatty()),
    )
    if values.plot is not None:
        _draw(measured)
    found = fit_budget(model, batches, target, measured=measured, round_to=values.round_to)
    if values.allocation is not None:
        with writing(values.allocation):
            write_json_atomic(values.allocation, found.to_json())
    return found


def _check_plot() -> None:
    path = os.path.expanduser(program.required("plot"))
    if not os.path.isdir(path):
        suffixes = tuple(f".{suffix}" for suffix in plots.FORMATS)
        if not path.endswith(suffixes):
            raise program.UserError(
                f"--plot must name a {' or '.join(suffixes)} file, or a folder that exists. "
                f"Received: {path}"
            )
        program.output_path("plot", *suffixes)
    if not plots.can_plot():
        raise program.UserError(
            "--plot needs Matplotlib, which is not installed: pip install 'keras-compaware[plots]'."
        )


def _draw(measured: Sensitivity) -> None:
    path = os.path.expanduser(flags.FLAGS.plot)
    with writing(path):
        files = plots.plot_sensitivity(measured, path)
    program.say(f"sensitivities drawn in {' and '.join(map(str, files))}\n")


def _read(path: str) -> Allocation:
    try:
        with open(path, encoding="utf-8") as file:
            return Allocation.from_json(json.load(file))
    except OSError:
        raise
    except Exception as error:  # it may hold anything
        raise program.UserError(
            f"--allocation: {path} is not what --target has written ({first_line(error)})."
        ) from error


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags, positional=("model", "out"))
