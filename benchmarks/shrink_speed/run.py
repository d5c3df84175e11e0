"""Time and memory of finding channel spaces and of removing channels.

Measured are models of keras.applications at their own image size with random weights; a share of
the channels of every free space is removed. For comparison: what Keras itself takes for the same
model without any cut, `clone_model` and `set_weights(get_weights())`.

Rounds are interleaved: in each, every operation is done once on every model, in alternating order,
so that whatever else the machine does meets all of them alike.

  python -m benchmarks.shrink_speed.run --out=DIR
"""

import argparse
import gc
import json
import math
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import environment, in_fresh_process, peak_of, table, write_results

MODELS = ("ResNet50", "ResNet152")
OPERATIONS = ("analysis", "shrink", "clone and copy")
CLOCKS = ("wall", "cpu")


def build(name: str) -> keras.Model:
    """Builds a model of keras.applications with random weights."""
    return getattr(keras.applications, name)(weights=None)


def kept(model: keras.Model, share: float) -> dict[str, np.ndarray]:
    """Returns for every free space evenly spaced channels without `share` of them."""
    return {
        space.name: np.unique(
            np.linspace(0, space.size - 1, max(1, round((1 - share) * space.size))).astype(int)
        )
        for space in kc.channel_spaces(model).free
    }


def cloned(model: keras.Model) -> keras.Model:
    """Copies a model by Keras alone."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def timed(names: list[str], share: float, repeats: int) -> list[dict]:
    """Measures interleaved rounds.

    Returns:
        One entry per model, operation and round: wall and CPU seconds.
    """
    jobs = []
    for name in names:
        model = build(name)
        keep = kept(model, share)
        calls = (
            lambda model=model: kc.channel_spaces(model),
            lambda model=model, keep=keep: kc.shrink(model, keep),
            lambda model=model: cloned(model),
        )
        jobs += [(name, *job) for job in zip(OPERATIONS, calls, strict=True)]
    samples = []
    for number in range(-1, repeats):  # the first round is not counted: libraries load
        for name, operation, call in jobs if number % 2 == 0 else reversed(jobs):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            result = call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            del result
            if number >= 0:
                sample = {"model": name, "operation": operation, "round": number}
                samples.append({**sample, "wall": wall, "cpu": cpu})
    return samples


def memory(name: str, share: float) -> dict:
    """Measures in this process how far shrinking raises its peak of resident memory.

    Returns:
        Bytes of the model's weights, of the new model's, and of the peak above what was there
        before; the peak is None where the system does not tell it (other than Linux).
    """
    warm = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3, name="a"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(8, 3),
        ]
    )
    kc.shrink(warm, {"a": [0, 1]})
    model = build(name)
    keep = kept(model, share)
    small, extra = peak_of(lambda: kc.shrink(model, keep))
    return {
        "model": name,
        "bytes": _bytes(model),
        "bytes_after": _bytes(small),
        "peak_extra_bytes": extra,
    }


def _bytes(model: keras.Model) -> int:
    return sum(np.dtype(v.dtype).itemsize * math.prod(v.shape) for v in model.variables)


def memory_elsewhere(name: str, share: float) -> dict:
    """As `memory`, in a fresh process."""
    arguments = [f"--memory_of={name}", f"--share={share}"]
    return in_fresh_process("benchmarks.shrink_speed.run", arguments, f"the memory of {name}")


def summary(samples: list[dict], peaks: list[dict]) -> str:
    """Returns the table: medians of seconds, peak memory over bytes of the model's weights."""
    rows = []
    for name in dict.fromkeys(sample["model"] for sample in samples):
        cells = []
        for operation in OPERATIONS:
            of_operation = [s for s in samples if (s["model"], s["operation"]) == (name, operation)]
            wall, cpu = (statistics.median(s[clock] for s in of_operation) for clock in CLOCKS)
            cells.append(f"{wall:.2f} s ({cpu:.2f} s)")
        of_model = [peak for peak in peaks if peak["model"] == name]
        ratios = [
            peak["peak_extra_bytes"] / peak["bytes"]
            for peak in of_model
            if peak["peak_extra_bytes"] is not None
        ]
        memory = f"{statistics.median(ratios):.2f}" if ratios else "not measured"
        rows.append([name, *cells, f"{of_model[0]['bytes'] / 2**20:.0f} MiB", memory])
    header = ["wall time (CPU time)", "analysis", "shrink", "clone and copy by Keras", "weights"]
    return table([*header, "peak of shrink / weights"], rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json")
    parser.add_argument("--models", default=",".join(MODELS), help="of keras.applications")
    parser.add_argument("--share", type=float, default=0.3, help="of the channels, removed")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--memory_repeats", type=int, default=3, help="processes for each model")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.memory_of:
        print(json.dumps(memory(flags.memory_of, flags.share)))
        return
    names = flags.models.split(",")
    about = environment()
    peaks = [memory_elsewhere(n, flags.share) for _ in range(flags.memory_repeats) for n in names]
    samples = timed(names, flags.share, flags.repeats)
    print(summary(samples, peaks))
    if flags.out:
        results = {
            "environment": about,
            "share": flags.share,
            "times": samples,
            "memory": peaks,
        }
        write_results(flags.out / "results.json", results)


if __name__ == "__main__":
    main()
