"""From one trained network to files for the device: every way to make it small, in every format.

ResNet-20 is trained on CIFAR-10, then trained further for the same number of steps in each compact
form; MobileNetV2 has random weights, so that only its sizes and latencies mean something. Each form
is exported in every quantization mode, run on the test images in LiteRT, and all files take turns
in the interpreter.

  python -m benchmarks.deploy.run --out=benchmarks/deploy --workdir=runs/deploy --data_dir=DIR

`--toolkit_python=PATH` names the Python of an environment that has tf_keras and
tensorflow-model-optimization beside this project. There the same dense weights are pruned as often
and as far, and quantized, by TensorFlow's toolkit; those files take part. Networks, and files of
the toolkit, that are in the work directory already are not made again.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import (
    Steps,
    compressed,
    environment,
    kept,
    median_ratio,
    table,
    write_results,
)
from benchmarks.deploy.toolkit import BATCH_SIZE, SPARSITY
from benchmarks.deploy.toolkit import FILES as TOOLKIT_FILES
from keras_compaware import data, measure, models

NETWORKS = {"resnet_20": "ResNet-20, 32 x 32", "mobilenet_v2": "MobileNetV2, 224 x 224"}
MODES = (None, "float16", "dynamic_int8", "int8", "weight_int8", "weight_int4")
FORMS = {
    "dense": "dense",
    "channels": "channels, half the MACs",
    "ranks": "ranks, half the MACs",
    "both": "channels and ranks, a quarter of the MACs",
    "pruned": "80 % zeros",
    "grid": "4-bit grid",
}
GRID = kc.UniformQuantization(4, axis="outputs")
CALIBRATION = 128
RECALIBRATE_STEPS = 50
THREADS = (1, 2)


# ---- networks ---------------------------------------------------------------------------------


def fitted(model, dataset, steps: int, rate: float, epoch: int, recipe=None) -> keras.Model:
    """Trains a model for so many steps under a cosine schedule and returns it."""
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))
    if recipe is not None:
        model, optimizer = recipe.wrap(model), recipe.optimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    callbacks = [] if recipe is None else recipe.callbacks(model)
    batches = Steps(augmented(dataset, epoch), steps)
    model.fit(batches, shuffle=False, callbacks=callbacks, verbose=2)
    return model


def augmented(dataset, epoch: int = 0):
    """Returns the training batches, mirrored and shifted."""
    return data.batches(dataset.train, BATCH_SIZE, seed=0, epoch=epoch, augment=data.flip_crop)


def grids() -> kc.Recipe:
    """All kernels on 4-bit grids, one scale for each output channel, at every step."""
    return kc.Recipe([kc.Rule(lambda target: True, kc.StraightThrough(GRID))])


def pruning(steps: int) -> kc.Recipe:
    """Zeros in all kernels, more and more of them in the first half of training."""
    end = max(steps // 2, 10)
    every = kc.Every(10, kc.MagnitudePruning(SPARSITY), end=end, ramp=kc.Ramp(0.0), hold=True)
    return kc.Recipe([kc.Rule(lambda target: True, every)])


def budgeted(model: keras.Model, form: str, batches) -> keras.Model:
    """Returns a model with fewer channels or smaller ranks."""
    target = {"macs": 0.25 if form == "both" else 0.5}
    found = kc.fit_budget(
        model, batches, target, channels=form != "ranks", ranks=form != "channels", round_to=8
    )
    return found.apply(model).model


def compact(model: keras.Model, form: str, dataset, steps: int) -> keras.Model:
    """Returns a compact form of a trained network, trained further."""
    recipe = {"pruned": pruning(steps), "grid": grids()}.get(form)
    if form in ("channels", "ranks", "both"):
        batches = augmented(dataset)
        model = budgeted(model, form, [batches[number] for number in range(4)])
        kc.recalibrate_batch_norm(model, batches, RECALIBRATE_STEPS)
    model = fitted(model, dataset, steps, 1e-3, 100, recipe)
    if form == "grid":
        model = kc.compact(model).model
    kc.recalibrate_batch_norm(model, augmented(dataset), RECALIBRATE_STEPS)
    return model


def compact_untrained(model: keras.Model, form: str) -> keras.Model:
    """Returns a compact form of a network with random weights."""
    if form in ("channels", "ranks", "both"):
        return budgeted(model, form, None)
    if form == "dense":
        return model
    return compressed(model, kc.MagnitudePruning(SPARSITY) if form == "pruned" else GRID)


def hand_over(model: keras.Model, folder: pathlib.Path) -> None:
    """Writes the weights of a network for the toolkit, by layer and name."""
    arrays = {
        f"{layer.name}/{variable.name}": keras.ops.convert_to_numpy(variable.value)
        for layer in model.layers
        for variable in layer.weights
    }
    np.savez(folder / "start.npz", **arrays)


def forms_of(folder: pathlib.Path, start: Callable, made: Callable) -> dict[str, keras.Model]:
    """Returns the forms of a network, and hands its weights over to the toolkit.

    Args:
        folder: Where the forms are kept.
        start: Makes the network that all forms begin with.
        made: Makes a form of that network, given a copy and the form's name.
    """
    path = folder / "start.keras"
    hand_over(kept(path, start), folder)
    return {
        form: kept(
            folder / f"{form}.keras",
            lambda form=form: made(keras.models.load_model(path, compile=False), form),
        )
        for form in FORMS
    }


def residual(folder: pathlib.Path, dataset, steps: int, tune: int) -> dict[str, keras.Model]:
    """Returns the forms of ResNet-20."""

    def trained():
        keras.utils.set_random_seed(0)
        model = models.build("resnet_20", dataset.image_shape, dataset.num_classes)
        return fitted(model, dataset, steps, 3e-3, 0)

    return forms_of(folder, trained, lambda model, form: compact(model, form, dataset, tune))


def mobile(folder: pathlib.Path) -> dict[str, keras.Model]:
    """Returns the forms of MobileNetV2."""

    def untrained():
        keras.utils.set_random_seed(0)
        return keras.applications.MobileNetV2(weights=None)

    return forms_of(folder, untrained, compact_untrained)


# ---- files ------------------------------------------------------------------------------------


def exported(model: keras.Model, mode: str | None, path: pathlib.Path, examples) -> dict:
    """Writes a file and returns what is known of it, or why there is none."""
    try:
        result = kc.export.to_litert(
            model,
            path,
            inputs=examples[:32],
            quantization=mode,
            calibration=examples if mode == "int8" else None,
            min_agreement=0.0,
        )
    except kc.export.ExportError as error:
        return {"refused": str(error)}
    held = sorted(set(result.grids.values()))
    return {"agreement": result.agreement, "grids": held}


def of_file(path: pathlib.Path, split) -> dict:
    """Returns sizes of a file, and its accuracy if there are images to measure it on."""
    record = {"bytes": measure.file_bytes(path), "gzip_bytes": measure.gzip_bytes(path)}
    if split is not None:
        record["accuracy"] = accuracy(path, split)
    return record


def accuracy(path: pathlib.Path, split) -> float:
    """Returns the share of a split that a file predicts right."""
    scores = kc.export.predict(path, split.images * np.float32(1 / 255), batch_size=100)
    return float(np.mean(scores.argmax(axis=-1) == split.labels))


def toolkit_files(python: str, folder: pathlib.Path, network: str, flags) -> None:
    """Lets TensorFlow's toolkit make its files in its own environment."""
    if all((folder / f"{name}.tflite").exists() for name in TOOLKIT_FILES):
        return
    command = [python, "-m", "benchmarks.deploy.toolkit", f"--network={network}"]
    command += [f"--folder={folder}", f"--tune={flags.tune}"]
    if flags.data_dir:
        command.append(f"--data_dir={flags.data_dir}")
    subprocess.run(command, check=True, env={**os.environ, "TF_USE_LEGACY_KERAS": "1"})


def measured(network: str, folder: pathlib.Path, flags, dataset) -> list[dict]:
    """Makes all files of a network and measures them.

    Returns:
        An entry for each: who made it, its form, mode, sizes, accuracy and latencies.
    """
    if network == "resnet_20":
        forms = residual(folder, dataset, flags.steps, flags.tune)
        split, examples = dataset.test, augmented(dataset)[0][0][:CALIBRATION]
    else:
        forms = mobile(folder)
        random = np.random.default_rng(0)
        shape = (CALIBRATION // 4, 224, 224, 3)
        split, examples = None, random.uniform(-1, 1, size=shape).astype("float32")
    entries, paths = [], []
    for form, model in forms.items():
        macs, parameters = measure.macs(model), measure.parameters(model)
        for mode in MODES:
            path = folder / f"{form}-{mode or 'float32'}.tflite"
            about = exported(model, mode, path, examples)
            entry = {"by": "keras_compaware", "form": form, "mode": mode or "float32"}
            entry |= {"macs": macs, "parameters": parameters} | about
            if "refused" not in about:
                entry |= of_file(path, split)
                paths.append(path)
            entries.append(entry)
            print(network, form, mode, about, entry.get("accuracy"), flush=True)
    if flags.toolkit_python:
        np.save(folder / "examples.npy", examples)
        start = keras.models.load_model(folder / "start.keras", compile=False)
        np.save(folder / "start-outputs.npy", start.predict(examples[:8], verbose=0))
        toolkit_files(flags.toolkit_python, folder, network, flags)
        for name, (form, mode) in TOOLKIT_FILES.items():
            path = folder / f"{name}.tflite"
            entries.append({"by": "tfmot", "form": form, "mode": mode} | of_file(path, split))
            paths.append(path)
    with_files = [entry for entry in entries if "refused" not in entry]
    for threads in THREADS:
        for _ in range(flags.passes):
            found = kc.export.latency(paths, num_threads=threads, repeats=flags.repeats)
            for entry, path in zip(with_files, paths, strict=True):
                entry.setdefault(f"ms_{threads}", []).append(found[path].median_ms)
    return entries


# ---- tables -----------------------------------------------------------------------------------


def summary(results: dict) -> str:
    """Returns a table for each network."""
    parts = []
    for network, entries in results.items():
        dense = entries[0]
        rows = [_row(entry, dense) for entry in entries if "refused" not in entry]
        header = ["by, form", "weights", *(["accuracy"] if "accuracy" in dense else [])]
        header += ["KB", "gzip KB"]
        header += [name for n in THREADS for name in (f"ms, {n} thread{'s' * (n > 1)}", "ratio")]
        parts += [f"### {NETWORKS[network]}", table(header, rows)]
        refused = [e for e in entries if "refused" in e]
        parts += [f"Refused: {e['form']}, {e['mode']}: {e['refused']}" for e in refused]
    return "\n\n".join(parts)


def _row(entry: dict, dense: dict) -> list[str]:
    who = "tfmot: " if entry["by"] == "tfmot" else ""
    row = [who + FORMS.get(entry["form"], entry["form"]), entry["mode"]]
    row += [f"{entry['accuracy']:.2%}"] if "accuracy" in entry else []
    row += [f"{entry[size] / 1000:,.0f}" for size in ("bytes", "gzip_bytes")]
    for threads in THREADS:
        times = entry[f"ms_{threads}"]
        ratio = median_ratio(times, dense[f"ms_{threads}"])
        row += [f"{statistics.median(times):.3f}", f"{ratio:.2f}"]
    return row


def main() -> None:
    """Runs the benchmark, or prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--workdir", type=pathlib.Path, help="folder for networks and files")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=2000, help="of the dense training")
    parser.add_argument("--tune", type=int, default=400, help="steps of each form after it")
    parser.add_argument("--passes", type=int, default=5, help="interleaved runs")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of each run")
    parser.add_argument("--toolkit_python", help="Python of an environment with tfmot")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    flags = parser.parse_args()
    path = flags.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    if not flags.report:
        if flags.workdir is None:
            parser.error("--workdir is missing")
        names = flags.networks.split(",")
        with_images = "resnet_20" in names
        dataset = data.load("cifar10", data_dir=flags.data_dir) if with_images else None
        for name in names:
            folder = flags.workdir / name
            folder.mkdir(parents=True, exist_ok=True)
            results["networks"][name] = measured(name, folder, flags, dataset)
            about = {"steps": flags.steps, "tune": flags.tune, "batch_size": BATCH_SIZE}
            results = {"environment": environment(), "training": about} | {
                "networks": results["networks"]
            }
            write_results(path, results)
    print(summary(results["networks"]))


if __name__ == "__main__":
    main()
