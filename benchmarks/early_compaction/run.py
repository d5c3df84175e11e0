"""Compaction after a few epochs against compaction at the end of training.

Alvarez & Salzmann (2017) train with a nuclear norm and make the network smaller while it is still
being trained, to save time. Here a network is trained without regularizer; with the nuclear norm to
the end; with it for a few epochs, compacted, and trained on without it; and, as a control, the same
without the compaction. The learning rate is the same function of the step in all of them. Every
finished arm is in results.json, so the same command goes on with a run that was interrupted.

  python -m benchmarks.early_compaction.run --out=benchmarks/early_compaction --data_dir=DIR
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import add_settings, read_results, run_arms, settings_of, spread, table
from keras_compaware import data, models

NETWORKS = {
    "lenet_300_100": "LeNet-300-100",
    "benchmarks.low_rank_regularizer.networks:decomposed": "1-D kernels",
}
_SIZES = ("parameters", "macs")
STRENGTHS = dict(zip(NETWORKS, (2.0, 1.0), strict=True))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms have in common; every field is a flag.

    Args:
        dataset: Name of the data set.
        epochs: Epochs of every arm.
        early: Epochs after which the network is compacted, joined by commas.
        every: Optimizer steps between two proximal maps.
        batch: Examples of a batch.
        rate: Learning rate of Adam at first; it falls to zero by half a cosine.
    """

    dataset: str = "fashion_mnist"
    epochs: int = 8
    early: str = "2,4"
    every: int = 100
    batch: int = 128
    rate: float = 1e-3

    @property
    def early_epochs(self) -> list[int]:
        """The epochs as numbers."""
        return [int(text) for text in self.early.split(",")]


@keras.saving.register_keras_serializable(package="benchmarks")
class LateCosine(keras.optimizers.schedules.CosineDecay):
    """Half a cosine down to zero, of which the first steps are past already.

    Args:
        initial_learning_rate: Where it has begun.
        decay_steps: Its length, in steps.
        past: How many of these steps are past.
    """

    def __init__(self, initial_learning_rate, decay_steps, past=0):
        super().__init__(initial_learning_rate, decay_steps)
        self.past = past

    def __call__(self, step):
        return super().__call__(step + self.past)

    def get_config(self):
        """Returns the arguments."""
        names = ("initial_learning_rate", "decay_steps", "past")
        return {name: getattr(self, name) for name in names}


class Clock(keras.callbacks.Callback):
    """Notes the seconds of every epoch: of all the process's threads, and of the wall."""

    def __init__(self):
        super().__init__()
        self.cpu, self.wall = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.process_time(), time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.cpu.append(time.process_time() - self._begin[0])
        self.wall.append(time.perf_counter() - self._begin[1])


def fit(model, recipe, dataset, settings: Settings, seed: int, begin: int, end: int) -> Clock:
    """Trains from one epoch to another; returns the seconds."""
    batches = data.batches(dataset.train, settings.batch, seed=seed, epoch=begin)
    steps = settings.epochs * len(batches)
    optimizer = keras.optimizers.Adam(LateCosine(settings.rate, steps, begin * len(batches)))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    clock = Clock()
    callbacks = [] if recipe is None else recipe.callbacks(model)
    model.fit(
        batches,
        initial_epoch=begin,
        epochs=end,
        shuffle=False,
        callbacks=[*callbacks, data.FollowEpoch(batches), clock],  # the maps are in its seconds
        verbose=0,
    )
    return clock


def accuracy(model: keras.Model, split: data.Split) -> float:
    """Returns the share of a split that a model predicts right."""
    scores = model.predict(data.batches(split, 1000), verbose=0)
    return float(np.mean(scores.argmax(axis=-1) == split.labels))


def run_arm(
    network: str,
    load: Callable[[], data.Dataset],
    settings: Settings,
    seed: int,
    until: int,
    compacted: bool,
) -> dict:
    """Trains a network with the nuclear norm for some epochs, and without it for the rest.

    Args:
        network: Key of `NETWORKS`.
        load: Function that returns the data set.
        settings: The settings.
        seed: Seed of weights and batches.
        until: The number of epochs with the nuclear norm.
        compacted: Whether the network is compacted after these.
    """
    keras.utils.set_random_seed(seed)
    dataset = load()
    model = models.build(network, dataset.image_shape, dataset.num_classes)
    nuclear = kc.Proximal(kc.NuclearNorm(STRENGTHS[network]), every=settings.every)
    clocks, found = [], {}
    if until:
        recipe = kc.Recipe([kc.Rule(None, nuclear)])
        clocks.append(fit(model, recipe, dataset, settings, seed, 0, until))
    if compacted:
        found["before"] = accuracy(model, dataset.test)
        started = time.process_time()
        model = kc.compact(model).model
        found["compaction_seconds"] = time.process_time() - started
    if until < settings.epochs:
        clocks.append(fit(model, None, dataset, settings, seed, until, settings.epochs))
    small = kc.compact(model).model
    return found | {
        "accuracy": accuracy(small, dataset.test),
        "parameters": kc.measure.parameters(small),
        "macs": kc.measure.macs(small),
        "cpu": [clock.cpu for clock in clocks],
        "wall": [clock.wall for clock in clocks],
    }


def plans(settings: Settings) -> dict[str, tuple[int, bool]]:
    """Returns what distinguishes the arms: epochs with the nuclear norm, and compaction then."""
    found = {"no regularizer": (0, False), "at the end": (settings.epochs, True)}
    for epoch in settings.early_epochs:
        found[f"after epoch {epoch}"] = (epoch, True)
        found[f"norm for {epoch} epochs, no compaction"] = (epoch, False)
    return found


def key(network: str, plan: str, seed: int) -> str:
    """Returns the name of an arm."""
    return f"{NETWORKS[network]}, {plan}, seed {seed}"


def arms(
    load: Callable[[], data.Dataset],
    settings: Settings,
    networks: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Callable[[], dict]]:
    """Returns what runs every arm, the first seed of all networks first."""
    return {
        key(network, plan, seed): functools.partial(run_arm, network, load, settings, seed, *what)
        for seed in seeds
        for network in networks
        for plan, what in plans(settings).items()
    }


# ---- report -----------------------------------------------------------------------------------


def training_seconds(arm: Mapping) -> float:
    """Returns the CPU seconds of all epochs.

    The first epoch of each phase, which includes the compilation, counts as the median of the
    others where there are any.
    """
    total = 0.0
    for epochs in arm["cpu"]:
        total += sum(epochs[1:]) + (statistics.median(epochs[1:]) if epochs[1:] else epochs[0])
    return total


def last_epoch(arm: Mapping) -> float:
    """Returns the CPU seconds of a usual epoch at the end of training."""
    return statistics.median(arm["cpu"][-1][1:] or arm["cpu"][-1])


def summary(results: Mapping, settings: Settings, networks, seeds) -> str:
    """Returns the table in Markdown."""
    header = ["", "compaction", "seeds", "accuracy, %", "parameters", "MACs"]
    header += ["CPU s of training", "saved", "CPU s of an epoch, last"]
    rows = []
    for network in networks:
        for plan in plans(settings):
            keys = [key(network, plan, seed) for seed in seeds]
            found = [results["arms"][name] for name in keys if name in results["arms"]]
            row = [NETWORKS[network], plan, str(len(found))]
            if not found:
                rows.append([*row[:2], "not run", *[""] * (len(header) - 3)])
                continue
            full = [
                results["arms"].get(key(network, "at the end", seed))
                for seed, name in zip(seeds, keys, strict=True)
                if name in results["arms"]
            ]
            saved = [
                1 - training_seconds(arm) / training_seconds(whole)
                for arm, whole in zip(found, full, strict=True)
                if whole
            ]
            row += [spread([100 * arm["accuracy"] for arm in found])]
            row += [f"{statistics.mean(arm[f] for arm in found):,.0f}" for f in _SIZES]
            row += [f"{statistics.mean(map(training_seconds, found)):.1f}"]
            row += [f"{statistics.mean(saved):.0%}" if saved else ""]
            row += [f"{statistics.mean(map(last_epoch, found)):.2f}"]
            rows.append(row)
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, or prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--data_dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="", help="regular expression: run these only")
    parser.add_argument("--report", action="store_true", help="run nothing")
    add_settings(parser, Settings)
    flags = parser.parse_args(arguments)
    settings = settings_of(flags, Settings)
    networks = flags.networks.split(",")
    seeds = [int(text) for text in flags.seeds.split(",")]
    path = flags.out / "results.json"
    about = dataclasses.asdict(settings) | {
        "strengths": {NETWORKS[n]: STRENGTHS[n] for n in NETWORKS}
    }
    if flags.report:
        results = read_results(path, about)
    else:
        load = functools.cache(lambda: data.load(settings.dataset, data_dir=flags.data_dir))
        todo = arms(load, settings, networks, seeds)
        results = run_arms(path, about, todo, flags.arms)
    print(summary(results, settings, networks, seeds))


if __name__ == "__main__":
    main()
