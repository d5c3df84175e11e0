"""Time and memory against the size of the model, from 10^5 to 5 x 10^8 parameters.

A model is a stack of square Dense layers, at least ten, and none wider than 1,000: above 10^7
parameters it gets deeper, and its largest kernel stays at 4 MB. Measured are the plan of a recipe,
one firing of three compressors, both kinds of compaction, and the export to LiteRT, each in a
process of its own, after the same operation on a tiny model, so that libraries are loaded; of a
firing it is the third, which compiles nothing. Seconds and bytes are then fitted by powers of the
number of parameters, from 10^7 on.

  KERAS_BACKEND=tensorflow python -m benchmarks.scale.run --out=benchmarks/scale

What has been measured is kept in `results.json` and not measured again.
"""

import argparse
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import environment, in_fresh_process, peak_of, table, write_results

SIZES = (10**5, 10**6, 10**7, 10**8, 5 * 10**8)
WIDEST, LAYERS = 1000, 10
FROM = 10**7  # what is smaller has smaller kernels, too
_GIB = 2**30


def build(parameters: int) -> keras.Model:
    """Builds a stack of square Dense layers with about so many parameters, random weights."""
    number = max(LAYERS, round(parameters / WIDEST**2))
    width = max(4, round(math.sqrt(parameters / number)))
    keras.utils.set_random_seed(0)
    dense = [
        keras.layers.Dense(width, activation="relu", name=f"dense{i}") for i in range(number - 1)
    ]
    head = keras.layers.Dense(width, name="head")
    return keras.Sequential([keras.Input((width,)), *dense, head])


def with_low_rank(model: keras.Model) -> keras.Model:
    """Gives every kernel an eighth of the full rank, in place."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        rows, columns = layer.kernel.shape
        rank = max(1, rows // 8)
        factors = (random.normal(size=shape) for shape in ((rows, rank), (rank, columns)))
        u, v = (factor.astype("float32") for factor in factors)
        layer.kernel.assign(u @ v / math.sqrt(rows * rank))
    return model


def _recipe(compressor):
    return kc.Recipe([kc.Rule(lambda target: True, kc.Every(1, compressor))])


def _plan(model):
    recipe = _recipe(kc.LowRank(ratio=0.25))
    return lambda: recipe.plan(model)


def _firing(compressor):
    def prepare(model):
        model.compile("sgd", "mse")
        everywhere = kc.OccasionalCompression(compressor, every=1, where=lambda target: True)
        for step in (1, 2):  # compile: the second one may start from what the first has found
            everywhere.step(model, step)
        return lambda: everywhere.step(model, 3)

    return prepare


def _factorise(model):
    with_low_rank(model)
    return lambda: kc.compact(model)


def _shrink(model):
    keep = {space.name: range(0, space.size, 2) for space in kc.channel_spaces(model).free}
    return lambda: kc.shrink(model, keep)


def _export(model):
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name) / "model.tflite"

    def export():
        with folder:
            return kc.export.to_litert(model, path)

    return export


OPERATIONS: dict[str, Callable[[keras.Model], Callable[[], Any]]] = {
    "plan": _plan,
    "MagnitudePruning": _firing(kc.MagnitudePruning(0.9)),
    "LowRank": _firing(kc.LowRank(ratio=0.25)),
    "UniformQuantization": _firing(kc.UniformQuantization(8)),
    "compact": _factorise,
    "shrink": _shrink,
    "to_litert": _export,
}


def measure(operation: str, parameters: int) -> dict:
    """Measures one operation in this process.

    Returns:
        Parameters, bytes of the model and of its largest kernel, seconds of wall time and of the
        processor, and the bytes by which the operation raised the peak of resident memory.
    """
    OPERATIONS[operation](build(1000))()
    model = build(parameters)
    call = OPERATIONS[operation](model)
    (result, seconds, cpu), peak = peak_of(lambda: _timed(call))
    del result
    return {
        "operation": operation,
        "size": parameters,
        "parameters": model.count_params(),
        "bytes": 4 * model.count_params(),
        "largest": max(4 * math.prod(weight.shape) for weight in model.weights),
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak,
    }


def _timed(call):
    started, worked = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - started, time.process_time() - worked


def needed(entries: Sequence[Mapping], operation: str, parameters: int) -> float:
    """Returns the bytes that a process will take, from the largest size that was measured."""
    known = [e for e in entries if e["operation"] == operation and e.get("peak")]
    if not known:
        return 0.0
    last = max(known, key=lambda entry: entry["size"])
    return (last["bytes"] + last["peak"]) * parameters / last["size"] + 2**29  # and libraries


def run(
    entries: list[dict], operations: Sequence[str], sizes: Sequence[int], limit: float
) -> Iterator[list[dict]]:
    """Measures what is missing, each in a fresh process; yields all entries after each.

    Args:
        entries: What is known; what is measured is added.
        operations: Names from `OPERATIONS`.
        sizes: Numbers of parameters, small ones first.
        limit: Bytes; what would need more is not run, and says so.
    """
    for size in sizes:
        for operation in operations:
            if any((e["operation"], e["size"]) == (operation, size) for e in entries):
                continue
            if needed(entries, operation, size) > limit:
                entries.append({"operation": operation, "size": size, "limit": limit})
            else:
                arguments = [f"--operation={operation}", f"--size={size}"]
                what = f"{operation} of {size:,} parameters"
                entries.append(in_fresh_process("benchmarks.scale.run", arguments, what))
            yield entries


def exponent(entries: Sequence[Mapping], operation: str, field: str) -> float | None:
    """Returns b of `value = a parameters^b`, by least squares of the logarithms from 10^7 on.

    None if fewer than two sizes were measured.
    """
    points = [
        (entry["parameters"], entry[field])
        for entry in entries
        if entry["operation"] == operation and entry["size"] >= FROM and entry.get(field)
    ]
    if len(points) < 2:
        return None
    return float(np.polyfit(*np.log(points).T, 1)[0])


def summary(entries: Sequence[Mapping]) -> str:
    """Returns the tables: seconds and peaks of every size, and the exponents."""
    sizes = sorted({entry["size"] for entry in entries})
    found = {(entry["operation"], entry["size"]): entry for entry in entries}
    names = list(dict.fromkeys(entry["operation"] for entry in entries))
    header = [*(f"{size:,}" for size in sizes), "exponent of CPU time"]
    rows = [
        [
            name,
            *(_cell(found.get((name, size)), _seconds) for size in sizes),
            _exponent(exponent(entries, name, "cpu")),
        ]
        for name in names
    ]
    seconds = table(["seconds (of the processors)", *header], rows)
    header = [*(f"{size:,}" for size in sizes), "exponent"]
    rows = [
        [
            name,
            *(_cell(found.get((name, size)), _peak) for size in sizes),
            _exponent(exponent(entries, name, "peak")),
        ]
        for name in names
    ]
    return f"{seconds}\n\n{table(['rise of the peak / weights', *header], rows)}"


def _cell(entry, show):
    if entry is None:
        return ""
    if "limit" in entry:
        return f"not run: needs more than {entry['limit'] / _GIB:.0f} GiB"
    return show(entry)


def _seconds(entry):
    return f"{entry['seconds']:.2f} ({entry['cpu']:.2f})"


def _peak(entry):
    return "not measured" if entry["peak"] is None else f"{entry['peak'] / entry['bytes']:.2f}"


def _exponent(value):
    return "" if value is None else f"{value:.2f}"


def plot(entries: Sequence[Mapping], path: pathlib.Path) -> None:
    """Writes seconds and peaks against parameters as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "0", "font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for name in dict.fromkeys(entry["operation"] for entry in entries):
        own = sorted(
            (e for e in entries if e["operation"] == name and e.get("peak") is not None),
            key=lambda entry: entry["parameters"],
        )
        parameters = [entry["parameters"] for entry in own]
        left.plot(parameters, [entry["cpu"] for entry in own], marker="o", label=name)
        right.plot(parameters, [entry["peak"] / _GIB for entry in own], marker="o", label=name)
    sizes = sorted({entry["parameters"] for entry in entries if "parameters" in entry})
    right.plot(sizes, [4 * size / _GIB for size in sizes], "k--", linewidth=1, label="the weights")
    for axis, label in ((left, "seconds of the processors"), (right, "rise of the peak, GiB")):
        axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel=label)
        axis.grid(alpha=0.3)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder of results.json and the plot")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="of parameters")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB that a process may take")
    parser.add_argument("--operation", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.operation:
        print(json.dumps(measure(flags.operation, flags.size)))
        return
    entries, path = [], flags.out and flags.out / "results.json"
    if path and path.exists():
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    about = environment()
    sizes = sorted(map(int, flags.sizes.split(",")))
    for found in run(entries, flags.operations.split(","), sizes, flags.limit * _GIB):
        if path:
            write_results(path, {"environment": about, "entries": found})
    print(summary(entries))
    if flags.out:
        plot(entries, flags.out / "scale")


if __name__ == "__main__":
    main()
