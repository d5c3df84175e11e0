"""Latency of models at half their multiply-accumulates, in LiteRT on one thread.

Of every free channel space the same fraction is kept, rounded to multiples of 8 or of 16 channels,
such that the smaller model has at most half the multiply-accumulates (MACs) of the dense one. All
are exported and take turns in the interpreter. Weights are random: latency does not depend on their
values.

  python -m benchmarks.latency.run --out=benchmarks/latency
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_compaware as kc
from benchmarks.common import environment, median_ratio, table, write_results
from keras_compaware.models import resnet_20

MODELS = {
    "ResNet-20, 32 x 32": lambda: resnet_20((32, 32, 3), 10),
    "MobileNetV2, 224 x 224": lambda: keras.applications.MobileNetV2(weights=None),
}


def exported(name: str, model: keras.Model, path: pathlib.Path) -> dict:
    """Exports a model; returns what it costs, with empty lists for its latencies."""
    return {
        "model": name,
        "macs": kc.measure.macs(model),
        "parameters": kc.measure.parameters(model),
        "bytes": kc.export.to_litert(model, path).bytes,
        "median_ms": [],
        "p90_ms": [],
        "minimum_ms": [],
    }


def measured(
    model: keras.Model,
    fraction: float,
    multiples: Sequence[int],
    passes: int,
    repeats: int,
    folder: pathlib.Path,
) -> list[dict]:
    """Cuts a model, exports all and measures them side by side.

    Args:
        model: The dense model.
        fraction: Of the MACs that may be left.
        multiples: What the numbers of kept channels are multiples of; one small model for each.
        passes: Number of times that the files are loaded and measured.
        repeats: Rounds of each pass.
        folder: Where the files are written.

    Returns:
        MACs, parameters, bytes and latencies in milliseconds in every pass, the dense model first.
    """
    paths = [folder / "dense.tflite"]
    entries = [exported("dense", model, paths[0])]
    for multiple in multiples:
        keep = kc.choose_channels(model, "l2", budget={"macs": fraction}, round_to=multiple)
        paths.append(folder / f"multiples_of_{multiple}.tflite")
        small = kc.shrink(model, keep)
        entries.append(exported(f"multiples of {multiple}", small, paths[-1]))
    for _ in range(passes):
        times = kc.export.latency(paths, num_threads=1, repeats=repeats)
        for entry, path in zip(entries, paths, strict=True):
            for field in ("median_ms", "p90_ms", "minimum_ms"):
                entry[field].append(getattr(times[path], field))
    return entries


def summary(results: dict[str, list[dict]]) -> str:
    """Returns the table of all models."""
    rows = []
    for name, entries in results.items():
        dense = entries[0]
        for entry in entries:
            rows.append(
                [
                    f"{name}: {entry['model']}",
                    f"{entry['macs'] / 1e6:.1f} M",
                    f"{entry['macs'] / dense['macs']:.2f}",
                    f"{entry['bytes'] / 2**10:,.0f} KB",
                    f"{statistics.median(entry['median_ms']):.3f} ms",
                    f"{median_ratio(entry['median_ms'], dense['median_ms']):.2f}",
                    f"{min(entry['minimum_ms']):.3f} ms",
                    f"{median_ratio(entry['minimum_ms'], dense['minimum_ms']):.2f}",
                ]
            )
    header = ["model", "MACs", "ratio", "file", "median", "ratio", "minimum", "ratio"]
    return table(header, rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json")
    parser.add_argument("--fraction", type=float, default=0.5, help="of the MACs that may be left")
    parser.add_argument("--multiples", default="8,16", help="of channels, one model for each")
    parser.add_argument("--passes", type=int, default=5, help="interleaved runs")
    parser.add_argument("--repeats", type=int, default=50, help="rounds of each run")
    flags = parser.parse_args()
    about = environment()
    multiples = [int(text) for text in flags.multiples.split(",")]
    results = {}
    for name, build in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = (flags.fraction, multiples, flags.passes, flags.repeats)
            results[name] = measured(build(), *arguments, pathlib.Path(folder))
    print(summary(results))
    if flags.out:
        results = {"environment": about, "fraction": flags.fraction, "models": results}
        write_results(flags.out / "results.json", results)


if __name__ == "__main__":
    main()
