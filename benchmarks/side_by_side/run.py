"""TensorFlow's model optimization toolkit and this package, side by side.

The same dense weights, images, batches and number of steps; every arm is trained in a process of
its own, the two sides in turn, and all files of a seed take turns in LiteRT. Beside them stands
what the toolkit does not have, and controls: Keras's own `model.quantize`, truncation after
training, and truncation before it.

  python -m benchmarks.side_by_side.run --out=benchmarks/side_by_side --workdir=DIR --data_dir=DIR

`--toolkit_python=PATH` is the Python of an environment that has tf_keras and
tensorflow-model-optimization beside this project; without it that side is left out. What
results.json has already is not run again; `--report` only prints the tables.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


import keras_compaware as kc
from benchmarks.common import median_ratio, read_results, run_arms, spread, table, write_results
from benchmarks.deploy.run import of_file
from benchmarks.side_by_side import network, ours, toolkit

MODULES = {"ours": "benchmarks.side_by_side.ours", "tfmot": "benchmarks.side_by_side.toolkit"}
_TIMED_STEPS = 450
NAMES = {
    "dense": "dense",
    **{f"pruning-{percent}": f"{percent} % zeros" for percent in network.SPARSITIES},
    **{f"clustering-{number}": f"{number} clusters" for number in network.CLUSTERS},
    **{
        f"clustering-{number}-every": f"{number} clusters, every {network.FREQUENCY} steps"
        for number in network.CLUSTERS
    },
    "aware-int8": "8-bit quantization-aware",
    "aware-int4": "4-bit quantization-aware",
    "ranks": f"a quarter of the ranks, every {network.FREQUENCY} steps",
    "channels-half": "channels, half the MACs",
    "channels-quarter": "channels, a quarter of the MACs",
    "ranks-before": "control: a quarter of the ranks, then trained",
    "ranks-after": "control: a quarter of the ranks after training",
    "quantize-int8": "control: `model.quantize('int8')`",
    "quantize-int4": "control: `model.quantize('int4')`",
}


def runs(with_toolkit: bool = True) -> list[tuple[str, str]]:
    """Returns `(side, arm)` in the order of running: equal arms of both sides are neighbours."""
    order = [("ours", "start")]
    for arm in NAMES:
        order += [("ours", arm)] * (arm in (*ours.ARMS, *ours.UNTRAINED))
        order += [("tfmot", arm)] * bool(with_toolkit and arm in toolkit.ARMS)
    return order


def worker(side: str, arm: str, seed: str, folder: pathlib.Path, flags, time=False) -> dict:
    """Runs one arm in its process, only to time it or for its files; returns what it says."""
    python = flags.toolkit_python if side == "tfmot" else sys.executable
    command = [python, "-m", MODULES[side], f"--arm={arm}", f"--seed={seed}"]
    steps = _TIMED_STEPS if time else flags.steps if arm == "start" else flags.tune
    command += [f"--steps={steps}", f"--folder={folder}", *["--time"] * time]
    command += [f"--data_dir={flags.data_dir}"] if flags.data_dir else []
    environ = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    environ |= {"TF_USE_LEGACY_KERAS": "1"} if side == "tfmot" else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{side}, {arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def modes(side: str, arm: str) -> tuple[str, ...]:
    """Returns the kinds of files of an arm."""
    special = ours.MODES if side == "ours" else toolkit.MODES
    return () if arm == "start" else special.get(arm, ("float32", "int8"))


def paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that the arms have left."""
    named = [
        folder / f"{side}-{arm}-{mode}.tflite" for side, arm in runs() for mode in modes(side, arm)
    ]
    return [path for path in named if path.exists()]


def timed(folder: pathlib.Path, flags) -> dict:
    """Returns seconds per step and latencies of every arm of a seed, once for each pass."""
    steps, latencies = {}, {}
    for _ in range(flags.passes):
        for side, arm in runs(flags.toolkit_python)[1:]:
            if arm in ours.UNTRAINED:
                continue
            step = worker(side, arm, "0", folder, flags, time=True)["seconds_per_step"]
            steps.setdefault(f"{side}/{arm}", []).append(step)
            print(side, arm, f"{1000 * step:.2f} ms", flush=True)
        found = kc.export.latency(paths(folder), num_threads=1, repeats=flags.repeats)
        for path, result in found.items():
            latencies.setdefault(pathlib.Path(path).stem, []).append(result.median_ms)
    return {"load_average": os.getloadavg()[0], "steps": steps, "latencies": latencies}


def files(folder: pathlib.Path, flags) -> dict:
    """Returns sizes of all files of a seed, and their accuracy on the test images in LiteRT."""
    test = network.images(flags.data_dir).test
    return {path.stem: of_file(path, test) for path in paths(folder)}


# ---- tables -----------------------------------------------------------------------------------


def summary(results: dict) -> str:
    """Returns the tables of training and of files."""
    training, written = [], []
    steps, latencies = (results.get("time", {}).get(key, {}) for key in ("steps", "latencies"))
    for side, arm in runs()[1:]:
        name = ("tfmot: " if side == "tfmot" else "") + NAMES[arm]
        mine = [e for key, e in results["arms"].items() if key.endswith(f"/{side}/{arm}")]
        if not mine:
            training.append([name, *["not run"] * 5])
            continue
        row = [name, spread([100 * e["accuracy"] for e in mine]), f"{mine[0]['parameters']:,}"]
        row += _times(steps.get(f"{side}/{arm}"), steps.get(f"{side}/dense"), "{:.1f}", 1000)
        memory = [e["memory"] / 1e6 for e in mine if "memory" in e]
        training.append([*row, f"{statistics.median(memory):.0f}" if memory else ""])
        for mode in modes(side, arm):
            stem = f"{side}-{arm}-{mode}"
            found = [files[stem] for files in results.get("files", {}).values() if stem in files]
            if not found:
                continue
            row = [name, mode, spread([100 * file["accuracy"] for file in found])]
            for key in ("bytes", "gzip_bytes"):
                row.append(f"{statistics.median(file[key] for file in found) / 1000:,.0f}")
            row += _times(latencies.get(stem), latencies.get("ours-dense-float32"), "{:.3f}")
            written.append(row)
    header = ["", "accuracy, %", "parameters", "ms per step", "over dense", "memory, MB"]
    parts = [table(header, training)]
    header = ["", "weights", "accuracy, %", "KB", "gzip KB", "ms", "ratio"]
    parts.append(table(header, written))
    refused = {
        f"Refused: {NAMES[key.split('/')[2]]}, {mode}: {reason.split(' The converter')[0]}"
        for key, entry in results["arms"].items()
        for mode, reason in entry.get("refused", {}).items()
    }
    return "\n\n".join([*parts, *sorted(refused)])


def _times(own, reference, shown: str, scale: float = 1.0) -> list[str]:
    if not own:
        return ["", ""]
    return [shown.format(scale * statistics.median(own)), f"{median_ratio(own, reference):.2f}"]


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--workdir", type=pathlib.Path, help="folder for networks and files")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2000, help="of the dense training")
    parser.add_argument("--tune", type=int, default=1000, help="steps of each arm after it")
    parser.add_argument("--passes", type=int, default=3, help="interleaved runs of the files")
    parser.add_argument("--repeats", type=int, default=50, help="rounds of each run")
    parser.add_argument("--toolkit_python", help="Python of an environment with tfmot")
    parser.add_argument("--time", action="store_true", help="time the steps, on an idle machine")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    flags = parser.parse_args()
    path = flags.out / "results.json"
    settings = {"steps": flags.steps, "tune": flags.tune, "batch_size": network.BATCH_SIZE}
    results = read_results(path, settings)
    if not flags.report:
        if flags.workdir is None:
            parser.error("--workdir is missing")
        folders = {seed: flags.workdir / seed for seed in flags.seeds.split(",")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        arms = {
            f"{seed}/{side}/{arm}": functools.partial(worker, side, arm, seed, folder, flags)
            for seed, folder in folders.items()
            for side, arm in runs(flags.toolkit_python)
        }
        results = run_arms(path, settings, arms)
        if flags.time:
            results["time"] = timed(folders["0"], flags)
        else:
            results["files"] = {seed: files(folder, flags) for seed, folder in folders.items()}
        write_results(path, results)
    print(summary(results))


if __name__ == "__main__":
    main()
