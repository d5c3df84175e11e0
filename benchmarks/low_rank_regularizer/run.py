"""Accuracy against parameters after truncation, with and without the nuclear norm in training.

Networks are trained without a regularizer, with L2, with the nuclear norm and with nuclear norm and
group lasso together (Alvarez & Salzmann, 2017). Afterwards all are treated alike: kernels are
truncated by one energy threshold, the model is compacted, measured, trained further without a
regularizer for the same number of steps, and measured again. Every finished trial is a file, so the
same command goes on with a run that was interrupted.

  python -m benchmarks.low_rank_regularizer.run --out=benchmarks/low_rank_regularizer --data_dir=DIR
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import environment, table, write_results
from keras_compaware import data, models

ARMS = {
    "none": "no regularizer",
    "l2": "L2",
    "nuclear": "nuclear norm",
    "nuclear_groups": "nuclear norm and groups",
}
STAGES = {"before": "before fine-tuning", "after": "after fine-tuning"}
DATASETS = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "cifar10": "CIFAR-10"}
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a network is trained, truncated and trained further.

    Args:
        title: The network's name in tables and plots.
        network: Name of the network in `keras_compaware.models`.
        arguments: Its further arguments.
        strengths: Strengths of every arm.
        group_share: Strength of the group lasso over that of the nuclear norm beside it.
        epochs: Epochs of training.
        tune_steps: Optimizer steps after truncation, at most an epoch.
        targets: Parameters of the factors over those of the kernels, in (0, 1].
        every: Optimizer steps between two proximal maps.
        batch_size: Examples a batch.
        learning_rate: Where both cosine schedules of Adam begin; they end at 0.
        recalibrate_steps: Batches for batch-norm statistics after training and truncation.
        augment: Whether training images are mirrored and shifted.
        datasets: Names of the data sets it is trained on, or None: on all.
    """

    title: str
    network: str
    arguments: Mapping
    strengths: Mapping[str, Sequence[float]]
    group_share: float
    epochs: int
    tune_steps: int
    targets: Sequence[float] = (0.5, 0.25, 0.125, 0.0625, 0.03125)
    every: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    recalibrate_steps: int = 50
    augment: bool = False
    datasets: Sequence[str] | None = None

    def to_json(self) -> dict:
        """Returns what the result of a trial depends on, as JSON values."""
        fields = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("strengths", "datasets") and (value or name != "augment")
        }
        return json.loads(json.dumps(fields))

    def batches(self, split: data.Split, seed: int, epoch: int = 0) -> data.Batches:
        """Returns the batches of a split for training."""
        augment = data.flip_crop if self.augment else None
        return data.batches(split, self.batch_size, seed=seed, epoch=epoch, augment=augment)


NETWORKS = {
    "lenet_300_100": Settings(
        title="LeNet-300-100",
        network="lenet_300_100",
        arguments={},
        strengths={
            "none": (0.0,),
            "l2": (1e-4, 1e-3),
            "nuclear": (0.3, 1.0, 2.0, 4.0),
            "nuclear_groups": (1.0, 2.0),
        },
        group_share=0.01,
        epochs=8,
        tune_steps=422,
        datasets=("fashion_mnist", "mnist"),
    ),
    "lenet_5": Settings(
        title="LeNet-5",
        network="lenet_5",
        arguments={"filters": (16, 32), "units": 256},
        strengths={
            "none": (0.0,),
            "l2": (1e-3,),
            "nuclear": (0.3, 1.0, 3.0),
            "nuclear_groups": (1.0,),
        },
        group_share=0.01,
        epochs=5,
        tune_steps=211,
        targets=(0.5, 0.25, 0.125, 0.0625),
        datasets=("fashion_mnist", "mnist"),
    ),
    "decomposed": Settings(
        title="1-D kernels",
        network="benchmarks.low_rank_regularizer.networks:decomposed",
        arguments={},
        strengths={"none": (0.0,), "nuclear_groups": (0.3,)},
        group_share=0.01,
        epochs=3,
        tune_steps=211,
        targets=(0.5, 0.25, 0.125),
        datasets=("fashion_mnist",),
    ),
    "resnet_20": Settings(
        title="ResNet-20",
        network="resnet_20",
        arguments={},
        strengths={"none": (0.0,), "nuclear": (0.1, 0.3)},
        group_share=0.01,
        epochs=60,
        tune_steps=351,
        targets=(0.5, 0.25, 0.125),
        augment=True,
        datasets=("cifar10",),
    ),
}


def pairs(datasets: Iterable[str], networks: Iterable[str]) -> list[tuple[str, str]]:
    """Returns which of the networks are trained on which of the data sets."""
    return [
        (dataset, network)
        for network in networks
        for dataset in datasets
        if dataset in (NETWORKS[network].datasets or datasets)
    ]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with all its truncations.

    Args:
        dataset: Name of the data set.
        network: Key of `NETWORKS`.
        arm: Key of `ARMS`.
        strength: Strength of the regularizer.
        seed: Seed of weights and batches.
    """

    dataset: str
    network: str
    arm: str
    strength: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the trial's file, without its suffix."""
        return f"{self.dataset}-{self.network}-{self.arm}-{self.strength:g}-{self.seed}"


def all_trials(
    datasets: Iterable[str], networks: Iterable[str], seeds: Sequence[int]
) -> list[Trial]:
    """Returns all trials: the first seed of everything, then network by network."""
    trials = [
        Trial(dataset, network, arm, strength, seed)
        for dataset, network in pairs(datasets, networks)
        for seed in seeds
        for arm, strengths in NETWORKS[network].strengths.items()
        for strength in strengths
    ]
    return sorted(trials, key=lambda trial: trial.seed != seeds[0])


def action(arm: str, strength: float, settings: Settings):
    """Returns what an arm does to every kernel but that of the output in training, or None."""
    if arm == "none":
        return None
    if arm == "l2":
        return kc.Penalty(keras.regularizers.L2(strength))
    if arm == "nuclear":
        regularizer = kc.NuclearNorm(strength)
    elif arm == "nuclear_groups":
        regularizer = kc.LowRankGroupSparsity(strength, strength * settings.group_share)
    else:
        raise ValueError(f"The arms are {', '.join(ARMS)}. Received: {arm!r}.")
    return kc.Proximal(regularizer, every=settings.every)


def kernels(model: keras.Model) -> list:
    """Returns the targets that are compressed: all kernels, or factors, but that of the output."""
    return [target for target in kc.find_targets(model)[0] if not target.is_head]


def kernel_parameters(model: keras.Model) -> int:
    """Counts the entries of the kernels, or of the factors in their place, but the output's."""
    return sum(target.num_parameters for target in kernels(model))


def spectrum(target) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(energy, cost)` of a kernel's channel matrix (m x n) at every rank from 1.

    `energy` is the share of the squared singular values, without those of the order of rounding;
    `cost` the number of parameters: of the factors, or of the kernel where these save none.
    """
    matrix = keras.ops.convert_to_numpy(target.read())
    matrix = matrix.reshape(-1, matrix.shape[-1])
    values = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    resolved = values > max(matrix.shape) * np.finfo(np.float32).eps * values[0]
    energy = np.cumsum(np.where(resolved, values, 0.0) ** 2)
    energy = np.ones_like(energy) if energy[-1] == 0 else energy / energy[-1]
    cost = np.minimum(np.arange(1, len(values) + 1) * sum(matrix.shape), matrix.size)
    return energy, cost


def ranks_within(model: keras.Model, budget: int) -> tuple[float, dict[str, int]]:
    """Finds the largest energy threshold, the same for all kernels, that meets a budget.

    Every kernel gets the smallest rank with that share of its energy. The threshold is exact: the
    candidates are the energies that the kernels have at their ranks.

    Args:
        model: The model whose kernels are to be truncated.
        budget: Number of parameters that factors and kernels together may have.

    Returns:
        The threshold and the rank of every kernel that its factors make smaller.

    Raises:
        ValueError: If rank 1 everywhere is beyond the budget.
    """
    spectra = {target.name: spectrum(target) for target in kernels(model)}
    energies = np.unique(np.concatenate([energy for energy, _ in spectra.values()]))
    places = {name: np.searchsorted(energy, energies) for name, (energy, _) in spectra.items()}
    totals = sum(spectra[name][1][place] for name, place in places.items())
    if totals[0] > budget:
        raise ValueError(
            f"{model.name}: the smallest truncation has {totals[0]} parameters, more than {budget}."
        )
    best = int(np.searchsorted(totals, budget, "right")) - 1
    sizes = {target.name: target.num_parameters for target in kernels(model)}
    ranks = {
        name: int(place[best]) + 1
        for name, place in places.items()
        if spectra[name][1][place[best]] < sizes[name]
    }
    return float(energies[best]), ranks


def truncated(model: keras.Model, ranks: Mapping[str, int]) -> keras.Model:
    """Returns the compacted model with kernels truncated to ranks; those not named stay."""
    rules = [
        kc.Rule(f"^{re.escape(name)}$", kc.AtEnd(kc.LowRank(rank=rank)))
        for name, rank in ranks.items()
    ]
    if rules:
        model = kc.compress(model, kc.Recipe(rules))
    return kc.compact(model).model


def size(model: keras.Model, dense: keras.Model) -> dict:
    """Returns parameters and MACs of a compacted model, and its share of the dense kernels."""
    return {
        "kernel_ratio": kernel_parameters(model) / kernel_parameters(dense),
        "parameters": kc.measure.parameters(model),
        "macs": kc.measure.macs(model),
    }


def compiled(model: keras.Model, settings: Settings, steps: int) -> keras.Model:
    """Compiles a model for so many steps of training and returns it."""
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def accuracies(model: keras.Model, dataset: data.Dataset) -> dict[str, float]:
    """Returns the accuracy on the validation and on the test split."""
    found = {}
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        predicted = model.predict(data.batches(split, 1000), verbose=0).argmax(axis=-1)
        found[name] = float(np.mean(predicted == split.labels))
    return found


def trained(trial: Trial, settings: Settings, dataset: data.Dataset) -> keras.Model:
    """Returns the network after training, without the regularizer."""

    def build():
        keras.utils.set_random_seed(trial.seed)
        shape, classes = dataset.image_shape, dataset.num_classes
        return models.build(settings.network, shape, classes, **settings.arguments)

    model, callbacks = build(), []
    batches = settings.batches(dataset.train, trial.seed)
    what = action(trial.arm, trial.strength, settings)
    if what is not None:
        recipe = kc.Recipe([kc.Rule(None, what)])
        model = recipe.wrap(model)
    compiled(model, settings, settings.epochs * len(batches))
    if what is not None:
        callbacks = recipe.callbacks(model)
    follow = data.FollowEpoch(batches)
    model.fit(
        batches,
        epochs=settings.epochs,
        shuffle=False,
        callbacks=[follow, *callbacks],
        verbose=0,
    )
    plain = build()
    plain.set_weights(model.get_weights())
    batches.epoch = settings.epochs
    return kc.recalibrate_batch_norm(plain, batches, settings.recalibrate_steps)


def run_trial(trial: Trial, settings: Settings, dataset: data.Dataset) -> dict:
    """Trains, truncates to every target, trains further; returns what was measured."""
    started = time.perf_counter()
    dense = trained(trial, settings, dataset)
    exact = kc.compact(dense)
    record = dataclasses.asdict(trial) | {
        "settings": settings.to_json(),
        "dense": size(dense, dense),
        "trained": size(exact.model, dense) | accuracies(dense, dataset),
        "truncated": [],
    }
    measured = {}
    for target in settings.targets:
        budget = math.floor(target * kernel_parameters(dense))
        energy, ranks = ranks_within(exact.whole, budget)
        key = tuple(sorted(ranks.items()))
        if key not in measured:
            small = truncated(exact.whole, ranks)
            if kernel_parameters(small) > budget:
                raise RuntimeError(f"{trial.name}: {kernel_parameters(small)} > {budget}.")
            measured[key] = size(small, dense) | tuned(small, trial, settings, dataset)
        entry = {"target": target, "energy": energy, "ranks": ranks, **measured[key]}
        record["truncated"].append(entry)
    record["seconds"] = time.perf_counter() - started
    return record


def tuned(
    model: keras.Model, trial: Trial, settings: Settings, dataset: data.Dataset
) -> dict[str, dict[str, float]]:
    """Trains a compacted model further; returns its accuracies before and after that."""
    batches = settings.batches(dataset.train, trial.seed, settings.epochs)
    if settings.tune_steps > len(batches):
        raise ValueError(
            f"`tune_steps` must be at most the {len(batches)} steps of an epoch. "
            f"Received: {settings.tune_steps}."
        )
    compiled(model, settings, settings.tune_steps)
    kc.recalibrate_batch_norm(model, batches, settings.recalibrate_steps)
    before = accuracies(model, dataset)
    model.fit(batches, steps_per_epoch=settings.tune_steps, epochs=1, shuffle=False, verbose=0)
    kc.recalibrate_batch_norm(model, batches, settings.recalibrate_steps)
    return {"before": before, "after": accuracies(model, dataset)}


def run(trials: Iterable[Trial], folder: pathlib.Path, execute: Callable[[Trial], dict]) -> None:
    """Runs the trials that have no file in a folder yet, and writes theirs.

    Raises:
        ValueError: If the file of a trial was written with other settings.
    """
    todo = []
    for trial in trials:
        path = folder / f"{trial.name}.json"
        if not path.exists():
            todo.append((trial, path))
        elif json.loads(path.read_text())["settings"] != NETWORKS[trial.network].to_json():
            raise ValueError(
                f"{path} was measured with other settings. Expected: those of NETWORKS. Move the "
                "folder away, or give another --out."
            )
    for number, (trial, path) in enumerate(todo, start=1):
        record = execute(trial)
        write_results(path, record)
        print(f"{number} of {len(todo)}: {trial.name}, {record['seconds']:.0f} s", flush=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """The trials of one data set and network, over seeds that all arms and strengths have.

    Args:
        dataset: Name of the data set.
        network: Key of `NETWORKS`.
        seeds: Tuple of these seeds, ascending.
        records: From `(arm, strength)` to the records of these seeds.
    """

    dataset: str
    network: str
    seeds: tuple
    records: Mapping

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        dataset = DATASETS.get(self.dataset, self.dataset)
        return f"{dataset}, {NETWORKS[self.network].title}"

    @property
    def targets(self) -> tuple[float, ...]:
        """The parameter ratios, from the largest on."""
        return tuple(NETWORKS[self.network].targets)

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of `ARMS`."""
        return [arm for arm in ARMS if any(key[0] == arm for key in self.records)]

    def strengths(self, arm: str) -> list[float]:
        """Returns the strengths of an arm, ascending."""
        return sorted(strength for name, strength in self.records if name == arm)

    def values(self, arm: str, strength: float, get: Callable[[dict], float]) -> np.ndarray:
        """Returns a number of every record of an arm, by seed."""
        return np.array([get(record) for record in self.records[arm, strength]])

    def chosen(self, arm: str, target: int, stage: str) -> float:
        """Returns the strength with the best mean validation accuracy; the lower one in a tie."""

        def score(strength):
            return self.values(arm, strength, at(target, stage, "validation")).mean()

        return max(self.strengths(arm), key=score)


def at(target: int, stage: str, field: str) -> Callable[[dict], float]:
    """Returns the function that reads an accuracy at the target of a number off a record."""
    return lambda record: record["truncated"][target][stage][field]


def groups(records: Iterable[dict], datasets: Iterable[str], networks: Iterable[str]) -> list:
    """Returns the `Group`s of records; of a seed that not all arms have, nothing is taken."""
    found = {(r["dataset"], r["network"], r["arm"], r["strength"], r["seed"]): r for r in records}
    result = []
    for dataset, network in pairs(datasets, networks):
        strengths = NETWORKS[network].strengths
        arms = [(arm, float(s)) for arm, values in strengths.items() for s in values]
        sets = [{key[4] for key in found if key[:4] == (dataset, network, *arm)} for arm in arms]
        seeds = tuple(sorted(set.intersection(*sets)))
        taken = {arm: [found[dataset, network, *arm, seed] for seed in seeds] for arm in arms}
        result.append(Group(dataset, network, seeds, taken))
    return result


def percent(values: np.ndarray) -> str:
    """Returns mean and standard deviation over seeds, in percent."""
    text = f"{100 * values.mean():.2f}"
    return text if len(values) < 2 else f"{text} ± {100 * values.std(ddof=1):.2f}"


def all_targets(found: Sequence[Group]) -> list[float]:
    """Returns the parameter ratios of all groups, from the largest on: columns of a table."""
    return sorted({target for group in found for target in group.targets}, reverse=True)


def by_target(group: Group, targets: Sequence[float], cell: Callable[[int], str]) -> list[str]:
    """Returns a cell for every target, by its number in the group; empty where it has none."""
    own = group.targets
    return [cell(own.index(target)) if target in own else "" for target in targets]


def not_run(group: Group, columns: int) -> list[str]:
    """Returns the row of a group without results."""
    return [group.title, "not run", *[""] * (columns - 2)]


def accuracy_table(found: Sequence[Group], stage: str) -> str:
    """Returns the test accuracy of every arm at every target, at the strength chosen there."""
    targets = all_targets(found)
    header = ["", "regularizer", "seeds", *[f"{target:g}" for target in targets]]
    rows = []
    for group in found:
        if not group.seeds:
            rows.append(not_run(group, len(header)))
            continue
        for arm in group.arms:

            def cell(target, group=group, arm=arm):
                strength = group.chosen(arm, target, stage)
                text = percent(group.values(arm, strength, at(target, stage, "test")))
                return f"{text} ({strength:g})" if len(group.strengths(arm)) > 1 else text

            cells = by_target(group, targets, cell)
            rows.append([group.title, ARMS[arm], str(len(group.seeds)), *cells])
    return table(header, rows)


def gain_table(found: Sequence[Group], arms: Sequence[str], base: str = "none") -> str:
    """Returns by how many points of test accuracy arms are above another one, seed by seed."""
    targets = all_targets(found)
    header = ["", "regularizer", "", *[f"{target:g}" for target in targets]]
    rows = []
    for group in found:
        for arm in filter(group.arms.__contains__, arms if group.seeds else ()):
            for stage, title in STAGES.items():

                def cell(target, group=group, arm=arm, stage=stage):
                    a, b = (
                        group.values(
                            name, group.chosen(name, target, stage), at(target, stage, "test")
                        )
                        for name in (arm, base)
                    )
                    text = percent(a - b)
                    return text if text.startswith("-") else f"+{text}"

                cells = by_target(group, targets, cell)
                rows.append([group.title, ARMS[arm], title, *cells])
    return table(header, rows)


def trained_table(found: Sequence[Group]) -> str:
    """Returns what every strength gives without truncation."""
    header = ["", "regularizer", "strength", "accuracy", "kernels", "parameters", "MACs"]
    rows = []
    for group in found:
        if not group.seeds:
            rows.append(not_run(group, len(header)))
            continue
        for arm in group.arms:
            for strength in group.strengths(arm):

                def mean(field, arm=arm, strength=strength, group=group):
                    return group.values(arm, strength, lambda r: r["trained"][field]).mean()

                accuracy = percent(group.values(arm, strength, lambda r: r["trained"]["test"]))
                rows.append(
                    [
                        group.title,
                        ARMS[arm],
                        "" if arm == "none" else f"{strength:g}",
                        accuracy,
                        f"{mean('kernel_ratio'):.3f}",
                        f"{mean('parameters'):,.0f}",
                        f"{mean('macs'):,.0f}",
                    ]
                )
    return table(header, rows)


def summary(results: Mapping) -> str:
    """Returns all tables in Markdown."""
    found = groups(results["trials"], results["datasets"], results["networks"])
    parts = [
        (f"Test accuracy in %, {STAGES[stage]}:", accuracy_table(found, stage)) for stage in STAGES
    ]
    parts.append(
        (
            "Test accuracy above that without a regularizer, in points:",
            gain_table(found, list(ARMS)[1:]),
        )
    )
    parts.append(("Trained, not truncated:", trained_table(found)))
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts)


_COLOURS = {"none": "black", "l2": "tab:green", "nuclear": "tab:blue", "nuclear_groups": "tab:red"}


def plot(results: Mapping, folder: pathlib.Path) -> None:
    """Writes the curves as accuracy.png/svg (arms) and strengths.png/svg (nuclear norm)."""
    found = groups(results["trials"], results["datasets"], results["networks"])
    found = [group for group in found if group.seeds]
    _figure(found, folder / "accuracy", _draw_arms)
    found = [group for group in found if "nuclear" in group.arms]
    _figure(found, folder / "strengths", _draw_strengths)


def _figure(found, path, draw):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "0", "font.size": 9})
    figure, axes = pyplot.subplots(
        len(STAGES), len(found), figsize=(3.4 * len(found), 6.4), squeeze=False, sharex="col"
    )
    for column, group in enumerate(found):
        for row, stage in enumerate(STAGES):
            axis = axes[row][column]
            draw(axis, group, stage)
            targets = group.targets
            axis.set_xscale("log", base=2)
            axis.set_xticks(targets, [f"1/{1 / target:g}" for target in targets])
            axis.set_title(f"{group.title}\n{STAGES[stage]}", fontsize=9)
            axis.grid(alpha=0.3)
            if row:
                axis.set_xlabel("parameters of the factors / of the kernels")
        axes[0][column].legend(fontsize=7, loc="lower right")
    for row in axes:
        row[0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def _curve(axis, group, stage, arm, strengths, **style):
    """Draws mean and standard deviation at every target, with a strength for each of them."""
    columns = [
        (
            group.values(arm, strength, lambda r, n=number: r["truncated"][n]["kernel_ratio"]),
            100 * group.values(arm, strength, at(number, stage, "test")),
        )
        for number, strength in enumerate(strengths)
    ]
    x, y = (np.array([column[i].mean() for column in columns]) for i in (0, 1))
    spread = [column[1].std(ddof=1) if len(group.seeds) > 1 else 0.0 for column in columns]
    axis.errorbar(x, y, yerr=spread, marker="o", markersize=3, linewidth=1.2, capsize=2, **style)


def _reference(axis, group, label):
    trained = group.values("none", 0.0, lambda record: record["trained"]["test"])
    axis.axhline(100 * trained.mean(), color="grey", linewidth=0.8, linestyle=":", label=label)


def _draw_arms(axis, group, stage):
    targets = range(len(group.targets))
    for arm in group.arms:
        strengths = [group.chosen(arm, target, stage) for target in targets]
        _curve(axis, group, stage, arm, strengths, color=_COLOURS[arm], label=ARMS[arm])
    _reference(axis, group, "no regularizer, not truncated")


def _draw_strengths(axis, group, stage):
    number = len(group.targets)
    curves = [("none", 0.0, "black", "no regularizer")]
    strengths = group.strengths("nuclear")
    for place, strength in enumerate(strengths):
        shade = 0.3 + 0.7 * place / max(1, len(strengths) - 1)
        curves.append(("nuclear", strength, (0.1, 0.3, shade), f"nuclear norm, {strength:g}"))
    for arm, strength, colour, label in curves:
        _curve(axis, group, stage, arm, [strength] * number, color=colour, label=label)
        if stage == "before" and arm != "none":
            natural = group.values(arm, strength, lambda r: r["trained"]["kernel_ratio"]).mean()
            accuracy = group.values(arm, strength, lambda r: r["trained"]["test"]).mean()
            axis.plot([natural], [100 * accuracy], marker="*", markersize=9, color=colour)
    _reference(axis, group, "no regularizer, not truncated")


def collected(folder: pathlib.Path, path: pathlib.Path) -> dict:
    """Returns the results of all trials in a folder, and of others in an earlier file of results.

    Raises:
        ValueError: If the file was written with other settings.
    """
    earlier = {"environments": {}, "settings": {}, "trials": []}
    if path.exists():
        earlier = json.loads(path.read_text())
    settings = {name: settings.to_json() for name, settings in NETWORKS.items()}
    changed = [name for name, found in earlier["settings"].items() if found != settings.get(name)]
    if changed:
        raise ValueError(f"{path} was written with other settings of {', '.join(changed)}.")
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    trials = {}
    for record in [*earlier["trials"], *records]:
        name = Trial(**{field.name: record[field.name] for field in dataclasses.fields(Trial)}).name
        trials[name] = {k: v for k, v in record.items() if k != "settings"}
    return {
        "environments": earlier["environments"],
        "datasets": list(DATASETS),
        "networks": list(NETWORKS),
        "settings": settings,
        "trials": [trials[name] for name in sorted(trials)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for all results")
    parser.add_argument("--trials", type=pathlib.Path, help="folder of the trials; OUT/trials")
    parser.add_argument("--data_dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--dataset", default=",".join(DATASETS), help="names, with commas")
    parser.add_argument("--network", default=",".join(NETWORKS), help="names, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas")
    parser.add_argument("--report", action="store_true", help="run nothing")
    flags = parser.parse_args(arguments)
    datasets, networks = flags.dataset.split(","), flags.network.split(",")
    seeds = [int(text) for text in flags.seeds.split(",")]
    unknown = [name for name in networks if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    folder, about = flags.trials or flags.out / "trials", environment()
    load = functools.cache(lambda name: data.load(name, data_dir=flags.data_dir, validation=0.1))
    if not flags.report:
        run(
            all_trials(datasets, networks, seeds),
            folder,
            lambda trial: run_trial(trial, NETWORKS[trial.network], load(trial.dataset)),
        )
    results = collected(folder, flags.out / "results.json")
    if not flags.report:
        results["environments"] |= dict.fromkeys(networks, about)
    write_results(flags.out / "results.json", results)
    plot(results, flags.out)
    print(summary(results))


if __name__ == "__main__":
    main()
