"""Files of pruned and clustered kernels: bytes, gzip and latency in LiteRT, dense and sparse.

Every network is compressed as it is, with random weights: sizes and latencies, not accuracies.
It is exported with its zeros ("dense"), without them ("sparse"), and without them in float16. All
files of a network take turns in the interpreter on one thread.

  python -m benchmarks.sparse_files.run --out=benchmarks/sparse_files
"""

import argparse
import json
import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import compressed, environment, median_ratio, table, write_results
from keras_compaware.models import lenet_300_100, resnet_20

MODELS = {
    "LeNet-300-100": lambda: lenet_300_100((28, 28, 1), 10),
    "ResNet-20, 32 x 32": lambda: resnet_20((32, 32, 3), 10),
    "MobileNetV2, 224 x 224": lambda: keras.applications.MobileNetV2(weights=None),
}
FORMS = {
    "as it is": None,
    "pruned, 50 %": kc.MagnitudePruning(0.5),
    "pruned, 80 %": kc.MagnitudePruning(0.8),
    "pruned, 90 %": kc.MagnitudePruning(0.9),
    "pruned, 95 %": kc.MagnitudePruning(0.95),
    "pruned, 90 % in 4 x 4 tiles": kc.GroupPruning(0.9, block=(4, 4)),
    "16 values": kc.WeightClustering(16),
    "32 values": kc.WeightClustering(32),
    "pruned, 80 %, 16 values": kc.Chain([kc.MagnitudePruning(0.8), kc.WeightClustering(16)]),
}
# Of these only fully connected layers have other latencies.
MORE_FORMS = {
    "LeNet-300-100": {
        "pruned, 50 % in 4 x 4 tiles": kc.GroupPruning(0.5, block=(4, 4)),
        "pruned, 80 % in 4 x 4 tiles": kc.GroupPruning(0.8, block=(4, 4)),
    }
}
ENCODINGS = {
    "dense": {},
    "sparse": {"sparse": True},
    "sparse float16": {"sparse": True, "quantization": "float16"},
}
EXAMPLES = 4


def exported(build, forms: dict, folder: pathlib.Path) -> list[tuple[dict, pathlib.Path]]:
    """Exports a network in every form and encoding.

    Args:
        build: Makes the network, always with the same weights.
        forms: Name to compressor, or None.
        folder: Where the files are written.

    Returns:
        For each file what it is, its sizes, tensors that are stored sparsely and error against the
        model, with an empty list for its latencies; and its path. Files that are refused, because
        LiteRT computes something else, have the reason instead.
    """
    entries = []
    for form, compressor in forms.items():
        keras.utils.set_random_seed(0)
        model = build() if compressor is None else compressed(build(), compressor)
        random = np.random.default_rng(0)
        x = random.normal(size=(EXAMPLES, *model.input_shape[1:])).astype("float32")
        outputs = {}
        for encoding, options in ENCODINGS.items():
            path = folder / f"{len(entries)}.tflite"
            entry = {"form": form, "encoding": encoding, "zeros": zeros(model)}
            try:
                result = kc.export.to_litert(model, path, inputs=x, **options)
            except kc.export.ExportError as error:
                entries.append((entry | {"refused": str(error)}, path))
                continue
            outputs[encoding] = kc.export.predict(path, x)
            entry |= {
                "bytes": result.bytes,
                "gzip_bytes": result.gzip_bytes,
                "sparse_tensors": result.sparse,
                "max_error": result.max_error,
                "same_outputs_as_dense": bool(np.array_equal(outputs[encoding], outputs["dense"])),
                "median_ms": [],
                "minimum_ms": [],
            }
            entries.append((entry, path))
    return entries


def zeros(model: keras.Model) -> float:
    """Returns the share of zeros among the entries of all kernels."""
    kernels = [keras.ops.convert_to_numpy(t.read()) for t in kc.find_targets(model)[0]]
    return sum(int((k == 0).sum()) for k in kernels) / sum(k.size for k in kernels)


def measured(build, forms: dict, passes: int, repeats: int, folder: pathlib.Path) -> list[dict]:
    """Returns the entries of `exported` with their latencies in every pass."""
    entries = exported(build, forms, folder)
    runnable = [(entry, path) for entry, path in entries if "refused" not in entry]
    for _ in range(passes):
        times = kc.export.latency([path for _, path in runnable], num_threads=1, repeats=repeats)
        for entry, path in runnable:
            entry["median_ms"].append(times[path].median_ms)
            entry["minimum_ms"].append(times[path].minimum_ms)
    return [entry for entry, _ in entries]


def size(entry: dict) -> str:
    """Returns the bytes of a file, and those after gzip, in KB."""
    if "refused" in entry:
        return "refused"
    return f"{entry['bytes'] / 2**10:,.0f} ({entry['gzip_bytes'] / 2**10:,.0f})"


def summary(results: dict[str, list[dict]]) -> str:
    """Returns the table: sizes, and latencies (median / minimum) over those of the first file."""
    rows = []
    for name, entries in results.items():
        reference = entries[0]
        for form in dict.fromkeys(entry["form"] for entry in entries):
            of = {entry["encoding"]: entry for entry in entries if entry["form"] == form}
            sizes = [size(of[encoding]) for encoding in ENCODINGS]
            times = [
                "-"
                if "refused" in entry
                else " / ".join(
                    f"{median_ratio(entry[field], reference[field]):.2f}"
                    for field in ("median_ms", "minimum_ms")
                )
                for entry in of.values()
            ]
            rows.append([f"{name}: {form}", f"{of['dense']['zeros']:.0%}", *sizes, *times])
    sizes = [f"{encoding} KB (gzip)" for encoding in ENCODINGS]
    return table(["network", "zeros", *sizes, *(f"time, {e}" for e in ENCODINGS)], rows)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json")
    parser.add_argument("--networks", default="", help="parts of names, or all; others stay")
    parser.add_argument("--passes", type=int, default=5, help="interleaved runs")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of each run")
    flags = parser.parse_args()
    path = flags.out / "results.json" if flags.out else None
    results = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    for name, build in MODELS.items():
        if not any(part in name for part in flags.networks.split(",")):
            continue
        about = environment()
        with tempfile.TemporaryDirectory() as folder:
            forms = FORMS | MORE_FORMS.get(name, {})
            sizes = (flags.passes, flags.repeats, pathlib.Path(folder))
            results[name] = {"environment": about, "files": measured(build, forms, *sizes)}
    results = {name: results[name] for name in MODELS if name in results}
    print(summary({name: result["files"] for name, result in results.items()}))
    if path:
        write_results(path, results)


if __name__ == "__main__":
    main()
