"""Accuracy at equal multiply-accumulates: budgets spent by sensitivity, and uniformly.

A small convolutional network is trained on Fashion-MNIST, once a seed. Each way to spend a budget
makes a smaller network of it without labels; batch-norm statistics are estimated again, accuracy is
measured, all are trained further for the same number of steps, and measured again. Every network
that is done is kept in results.json, so the same command goes on with a run that was interrupted.

  python -m benchmarks.budgets.run --out=benchmarks/budgets --data_dir=DIR
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import environment, table, write_results
from keras_compaware import data, measure, models

ARMS = {
    "uniform": "the same share everywhere",
    "weights": "energies of the weights",
    "outputs": "change of the outputs",
    "loss": "loss on labels",
}
WHAT = {"channels": "channels", "both": "channels and ranks"}
TARGETS = (0.5, 0.25, 0.125)
SEEDS = (0, 1, 2)
STAGES = {"before": "before further training", "after": "after it"}
BATCH_SIZE = 128
EPOCHS = 4
TUNE_STEPS = 200
MEASURED_BATCHES = 8
RECALIBRATE_STEPS = 50


def key_of(seed: int, what: str, target: float, arm: str) -> str:
    """Returns the name of one smaller network in results.json."""
    return f"{seed} {what} {target:g} {arm}"


def compiled(model: keras.Model, rate: float, steps: int) -> keras.Model:
    """Compiles a model for so many steps under a cosine schedule and returns it."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def accuracy(model: keras.Model, split) -> float:
    """Returns the share of a split that is predicted right."""
    predicted = model.predict(data.batches(split, 1000), verbose=0).argmax(axis=-1)
    return float(np.mean(predicted == split.labels))


def trained(seed: int, dataset, epochs: int) -> keras.Model:
    """Returns the whole network after training."""
    keras.utils.set_random_seed(seed)
    model = models.build("small_cnn", dataset.image_shape, dataset.num_classes)
    batches = data.batches(dataset.train, BATCH_SIZE, seed=seed)
    compiled(model, 1e-3, epochs * len(batches))
    follow = data.FollowEpoch(batches)
    model.fit(batches, epochs=epochs, shuffle=False, callbacks=[follow], verbose=0)
    return model


def sensitivities(model: keras.Model, dataset, seed: int) -> dict:
    """Returns what the arms need: a `Sensitivity` each."""
    batches = data.batches(dataset.train, BATCH_SIZE, seed=seed)
    some = [batches[number] for number in range(MEASURED_BATCHES)]
    weights = kc.sensitivity(model)
    loss = kc.sensitivity(model, some, loss="sparse_categorical_crossentropy")
    return {
        "uniform": weights,
        "weights": weights,
        "outputs": kc.sensitivity(model, some),
        "loss": loss,
    }


def smaller(model: keras.Model, what: str, target: float, arm: str, measured: dict):
    """Returns `(Allocation, smaller model)`."""
    solver = "uniform" if arm == "uniform" else "greedy"
    options = {"measured": measured[arm], "solver": solver, "ranks": what == "both"}
    found = kc.fit_budget(model, None, {"macs": target}, **options)
    return found, found.apply(model).model


def run_one(model, seed, what, target, arm, measured, dataset) -> dict:
    """Makes one smaller network, trains it further and returns what was measured."""
    started = time.perf_counter()
    found, small = smaller(model, what, target, arm, measured)
    batches = data.batches(dataset.train, BATCH_SIZE, seed=seed, epoch=EPOCHS)
    steps = min(TUNE_STEPS, len(batches))
    kc.recalibrate_batch_norm(small, batches, RECALIBRATE_STEPS)
    record = {
        "macs": measure.macs(small) / measure.macs(model),
        "params": measure.parameters(small) / measure.parameters(model),
        "channels": {name: len(kept) for name, kept in found.keep.items()},
        "ranks": dict(found.ranks),
        "before": accuracy(small, dataset.test),
    }
    compiled(small, 1e-3, steps)
    small.fit(batches, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0)
    kc.recalibrate_batch_norm(small, batches, RECALIBRATE_STEPS)
    record["after"] = accuracy(small, dataset.test)
    return record | {"seconds": time.perf_counter() - started}


def run(results: dict, path: pathlib.Path, dataset, seeds, targets, epochs: int) -> None:
    """Runs what is missing in the results, and writes them after each network."""
    for seed in seeds:
        points = itertools.product(WHAT, targets, ARMS)
        missing = [point for point in points if key_of(seed, *point) not in results["networks"]]
        if not missing:
            continue
        model = trained(seed, dataset, epochs)
        results["whole"][str(seed)] = accuracy(model, dataset.test)
        measured = sensitivities(model, dataset, seed)
        for point in missing:
            found = run_one(model, seed, *point, measured, dataset)
            results["networks"][key_of(seed, *point)] = found
            write_results(path, results)
            print(
                f"{key_of(seed, *point)}: {found['before']:.2%}, {found['after']:.2%}", flush=True
            )


def summary(results: dict) -> str:
    """Returns the tables in Markdown."""
    whole = results["whole"]
    lines = [f"The whole network: {_mean([100 * value for value in whole.values()])} %."]
    for what, title in WHAT.items():
        rows = []
        for target, (arm, name) in itertools.product(TARGETS, ARMS.items()):
            found = [results["networks"].get(key_of(int(s), what, target, arm)) for s in whole]
            found = [record for record in found if record]
            if found:
                columns = [[100 * record[stage] for record in found] for stage in STAGES]
                macs = _mean([100 * record["macs"] for record in found])
                rows.append([f"{target:g}: {name}", macs, *map(_mean, columns)])
        header = ["MACs: spent by", "MACs left, %", *(f"{name}, %" for name in STAGES.values())]
        lines += [f"### {title.capitalize()}", table(header, rows)]
    return "\n\n".join(lines)


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Runs the benchmark, or prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    flags = parser.parse_args()
    path = flags.out / "results.json"
    results = {"environment": environment(), "whole": {}, "networks": {}}
    if path.exists():
        results = json.loads(path.read_text())
    if not flags.report:
        dataset = data.load(flags.dataset, data_dir=flags.data_dir)
        seeds = [int(seed) for seed in flags.seeds.split(",")]
        targets = [float(target) for target in flags.targets.split(",")]
        run(results, path, dataset, seeds, targets, flags.epochs)
    print(summary(results))


if __name__ == "__main__":
    main()
