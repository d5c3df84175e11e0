"""Group lasso on all neurons or on some of them, compared at equal surviving parameters.

E and Gao (2019, 2020) penalise only part of the groups and report better accuracy than with all
of them penalised. Here LeNet-300-100 is trained with either, for grids of strengths and fractions;
neurons that nothing reads are removed, and per level of surviving parameters every method shows
its trial with the best validation accuracy.

  python -m benchmarks.partial_group_lasso.run --out=benchmarks/partial_group_lasso --data_dir=DIR

trains what is missing in `--workdir` and writes the report; trials of other data sets stay in
results.json. `--report` writes it anew from there, and `--time` measures the seconds per step, best
on an idle machine.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import environment, table, write_results
from keras_compaware import data
from keras_compaware.models import lenet_300_100

DATASETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "breast_cancer": "Breast cancer, 30 measured numbers",
}
_SHAPES = {"breast_cancer": (30, 2)}  # numbers of inputs and of classes
LEVELS = (0.5, 0.25, 0.1)  # of the parameters of the whole network
UNITS = (300, 100)
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
_PASSES = 80  # over the training examples of breast cancer in an epoch, of 143 steps then
_MARGIN = 0.97  # of a level, for neurons that outlive a penalty
_STAGES = {"trained": "as trained", "finetuned": "fine-tuned"}


def _on_kernels(*regularizers) -> kc.Recipe:
    """Rules for the outgoing weights of the first and of the second hidden layer."""
    names = ("dense2", "head")
    return kc.Recipe([kc.Rule(n, kc.Proximal(r)) for n, r in zip(names, regularizers, strict=True)])


def _on_neurons(regularizer) -> kc.Recipe:
    return kc.Recipe(channels=[kc.Rule(None, kc.Proximal(regularizer))])


def _partial(strength: float, fraction: float, **arguments) -> kc.Recipe:
    return _on_kernels(*2 * [kc.PartialGroupLasso(strength, fraction=fraction, **arguments)])


def _block(strength: float, fraction: float) -> kc.Recipe:
    def lasso(**following):
        return kc.PartialGroupLasso(strength, fraction=fraction, mode="block", **following)

    return _on_kernels(lasso(), lasso(next_fraction=0.0))


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to lose neurons.

    Args:
        label: Name in tables and plots.
        recipe: Function from strength and fraction to a `Recipe`, or to None.
        strengths: By data set, the strengths that are tried.
        partial: Whether a fraction of the neurons is chosen, for every level its own.
    """

    label: str
    recipe: Callable[[float, float], kc.Recipe | None]
    strengths: Mapping[str, Sequence[float]]
    partial: bool


def _same(*strengths: float) -> dict[str, tuple[float, ...]]:
    """The same strengths for the images; the fewer steps on breast cancer need larger ones."""
    more = tuple(round(3 * strength, 6) for strength in strengths)
    return {name: more if name == "breast_cancer" else strengths for name in DATASETS}


METHODS = {
    "none": Method("none: narrower from the start", lambda s, f: None, _same(0.0), True),
    "full": Method(
        "group lasso",
        lambda s, f: _on_kernels(*2 * [kc.GroupLasso(s)]),
        {
            "mnist": (0.33, 0.4, 0.45, 0.5, 0.55),
            "fashion_mnist": (0.25, 0.3, 0.33, 0.41, 0.44),
            "breast_cancer": (0.3, 0.5, 0.8, 0.9, 1.0, 1.2),
        },
        False,
    ),
    "sparse": Method(
        "sparse group lasso",
        lambda s, f: _on_kernels(*2 * [kc.SparseGroupLasso(s, s)]),
        {
            "mnist": (0.24, 0.265, 0.31, 0.33),
            "fashion_mnist": (0.15, 0.18, 0.2, 0.26),
            "breast_cancer": (0.2, 0.3, 0.5),
        },
        False,
    ),
    "subset": Method("partial, subset", _partial, _same(0.6), True),
    "block": Method(
        "partial, block",
        _block,
        {"mnist": (1.0,), "fashion_mnist": (2.0,), "breast_cancer": (5.0,)},
        True,
    ),
    "largest": Method(
        "partial, largest free",
        lambda s, f: _partial(s, f, mode="largest"),
        _same(0.6),
        True,
    ),
    "sparse_subset": Method(
        "partial sparse, subset", lambda s, f: _partial(s, f, l1_strength=s), _same(0.3), True
    ),
    "coupled_full": Method(
        "group lasso, whole neurons",
        lambda s, f: _on_neurons(kc.GroupLasso(s)),
        _same(0.07, 0.12, 0.26),
        False,
    ),
    "coupled_subset": Method(
        "partial, subset, whole neurons",
        lambda s, f: _on_neurons(kc.PartialGroupLasso(s, fraction=f)),
        _same(0.15),
        True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        dataset: Name of the data set.
        method: Key of `METHODS`.
        strength: Strength of the regularizer.
        fraction: Fraction of the neurons of each hidden layer that is penalised, or left out from
            the start; 0 for the methods that choose none.
        seed: Seed of the weights and of the order of the examples.
    """

    dataset: str
    method: str
    strength: float
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.dataset}-{self.method}-{self.strength:g}-{self.fraction:g}-{self.seed}"


def left(fraction: float, units: Sequence[int] = UNITS) -> tuple[int, ...]:
    """Returns how many units stay when a fraction of each layer is removed, at least one of all."""
    return tuple(u - max(1, round(fraction * u)) if fraction else u for u in units)


def dense_parameters(sizes: Sequence[int]) -> int:
    """Returns the number of parameters of Dense layers from the first size to the last."""
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


def fraction_for(
    level: float, inputs: int = 784, units: Sequence[int] = UNITS, classes: int = 10
) -> float:
    """Returns the smallest fraction, in quarters of a per cent, that a level of parameters needs.

    The same fraction of every hidden layer; a few per cent of the level are kept in reserve.

    Args:
        level: Share of the parameters that may be left.
        inputs: Number of inputs.
        units: Widths of the hidden layers.
        classes: Number of outputs.

    Raises:
        ValueError: If not even one unit in each layer is within the level.
    """
    limit = _MARGIN * level * dense_parameters([inputs, *units, classes])
    for step in range(400):
        kept = left(step / 400, units)
        if min(kept) > 0 and dense_parameters([inputs, *kept, classes]) <= limit:
            return step / 400
    raise ValueError(f"Hidden layers of {units} units cannot be cut to {level:.2%} of parameters.")


def grid(
    datasets: Sequence[str], seeds: Sequence[int], methods: Sequence[str] = tuple(METHODS)
) -> list[Trial]:
    """Returns all trials, those of the first seed first."""

    def fractions(dataset):
        inputs, classes = _SHAPES.get(dataset, (784, 10))
        return [fraction_for(level, inputs, classes=classes) for level in LEVELS]

    return [
        Trial(dataset, method, strength, fraction, seed)
        for seed in seeds
        for dataset in datasets
        for method, choice in ((method, METHODS[method]) for method in methods)
        for fraction in (
            ([0.0] if method == "none" else []) + fractions(dataset) if choice.partial else [0]
        )
        for strength in choice.strengths[dataset]
    ]


def load(name: str, data_dir: str | None) -> data.Dataset:
    """Loads a data set; the numbers of breast cancer become images of 30 x 1 with 256 levels.

    Of its 569 examples, 228 are for training, 114 for validation and 227 for testing.
    """
    if name != "breast_cancer":
        return data.load(name, data_dir=data_dir, validation=0.1)
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    train, validation, test = np.split(order, [228, 342])
    low, high = bunch.data[train].min(axis=0), bunch.data[train].max(axis=0)
    levels = np.clip(np.rint(255 * (bunch.data - low) / (high - low)), 0, 255).astype("uint8")

    def split(chosen):
        return data.Split(levels[chosen].reshape(-1, 30, 1, 1), bunch.target[chosen])

    splits = split(np.tile(train, _PASSES)), split(validation), split(test)
    names = tuple(map(str, bunch.target_names))
    return data.Dataset(name, "1.0.0", *splits, 2, (30, 1, 1), names)


def build(trial: Trial, dataset: data.Dataset, units: Sequence[int] = UNITS) -> keras.Model:
    """Returns the model that a trial starts from."""
    keras.utils.set_random_seed(trial.seed)
    units = left(trial.fraction, units) if trial.method == "none" else units
    return lenet_300_100(dataset.image_shape, dataset.num_classes, units=units)


def fit(
    model: keras.Model, recipe: kc.Recipe | None, split: data.Split, epochs: int, seed: int
) -> None:
    """Trains by Adam, whose learning rate falls to zero by half a cosine."""
    batches = data.batches(split, BATCH_SIZE, seed=seed)
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, epochs * len(batches))
    optimizer = keras.optimizers.Adam(schedule)
    model.compile(
        optimizer if recipe is None else recipe.optimizer(optimizer),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    callbacks = [data.FollowEpoch(batches), *(recipe.callbacks(model) if recipe else [])]
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def accuracies(model: keras.Model, dataset: data.Dataset) -> dict[str, float]:
    """Returns the accuracies on the three splits, in [0, 1]."""
    found = {}
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        scores = model.predict(data.batches(split, 1000), verbose=0)
        found[name] = float(np.mean(np.argmax(scores, axis=-1) == split.labels))
    return found


def run_trial(
    trial: Trial,
    dataset: data.Dataset,
    epochs: int,
    finetune_epochs: int,
    units: Sequence[int] = UNITS,
) -> dict:
    """Trains, removes the neurons that nothing reads, and trains further without regularizer.

    Args:
        trial: The trial.
        dataset: Its data.
        epochs: Epochs with the regularizer.
        finetune_epochs: Epochs of the smaller network afterwards.
        units: Widths of the hidden layers.

    Returns:
        The trial's fields, its epochs, the surviving parameters and neurons, and the accuracies
        before and after the further training.
    """
    keras.utils.clear_session()
    model = build(trial, dataset, units)
    method = METHODS[trial.method]
    fit(model, method.recipe(trial.strength, trial.fraction), dataset.train, epochs, trial.seed)
    small = kc.compact(model).whole  # without the neurons; kernels are not split into factors
    result = dataclasses.asdict(trial) | {
        "epochs": epochs,
        "finetune_epochs": finetune_epochs,
        "parameters": kc.measure.parameters(small),
        "neurons": [small.get_layer(name).units for name in ("dense1", "dense2")],
        "trained": accuracies(small, dataset),
    }
    fit(small, None, dataset.train, finetune_epochs, trial.seed + 1)
    return result | {"finetuned": accuracies(small, dataset)}


def run_all(
    trials: Sequence[Trial],
    folder: pathlib.Path,
    load: Callable[[str], data.Dataset],
    epochs: int,
    finetune_epochs: int,
    units: Sequence[int] = UNITS,
) -> list[dict]:
    """Runs the trials that have no file yet and returns the results of all.

    Args:
        trials: The trials.
        folder: Where every finished trial is a file.
        load: Function from the name of a data set to it.
        epochs: See `run_trial`.
        finetune_epochs: See `run_trial`.
        units: See `run_trial`.

    Raises:
        ValueError: If a file is that of a training of another length.
    """
    results, datasets = [], {}
    for number, trial in enumerate(trials, start=1):
        path = folder / f"{trial.name}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            found = (result["epochs"], result["finetune_epochs"])
            if found != (epochs, finetune_epochs):
                raise ValueError(
                    f"{path} is of {found} epochs, and ({epochs}, {finetune_epochs}) are wanted: "
                    "give another --workdir, or the same epochs."
                )
        else:
            if trial.dataset not in datasets:
                datasets[trial.dataset] = load(trial.dataset)
            dataset = datasets[trial.dataset]
            result = run_trial(trial, dataset, epochs, finetune_epochs, units)
            write_results(path, result)
            shown = ", ".join(
                f"{_STAGES[stage]} {100 * result[stage]['test']:.2f} %" for stage in _STAGES
            )
            print(
                f"{number}/{len(trials)} {trial.name}: {result['neurons']} neurons, "
                f"{result['parameters']:,} parameters, {shown}",
                flush=True,
            )
        results.append(result)
    return results


# ---- seconds per step ---------------------------------------------------------------------------


def timed(
    rounds: int, steps: int, fraction: float, units: Sequence[int] = UNITS
) -> dict[str, list[float]]:
    """Measures the seconds of a training step, with all methods taking turns.

    Args:
        rounds: Number of turns that count; one more before them does not.
        steps: Steps of each turn.
        fraction: Fraction of the neurons that the partial methods penalise.
        units: Widths of the hidden layers.

    Returns:
        By method, the mean seconds per step of every turn. "none" is the whole network.
    """
    generator = np.random.default_rng(0)
    images = generator.random((steps * BATCH_SIZE, 28, 28, 1), dtype="float32")
    labels = generator.integers(10, size=len(images))
    models = {}
    for name, method in METHODS.items():
        model = lenet_300_100((28, 28, 1), 10, units=units)
        recipe = method.recipe(method.strengths["mnist"][0], fraction)
        optimizer = keras.optimizers.Adam(LEARNING_RATE)
        if recipe is not None:
            optimizer = recipe.optimizer(optimizer, model)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        models[name] = model
    seconds = collections.defaultdict(list)
    for turn in range(rounds + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
    return dict(seconds)


# ---- report -------------------------------------------------------------------------------------


def chosen(trials: Iterable[dict], method: str, limit: float, stage: str) -> dict[int, dict]:
    """Returns by seed the trial of a method with the best validation accuracy within a limit.

    Args:
        trials: Results of one data set.
        method: Key of `METHODS`.
        limit: The most parameters that may be left.
        stage: "trained" or "finetuned".
    """
    best = {}
    for trial in trials:
        if trial["method"] == method and trial["parameters"] <= limit:
            seed = trial["seed"]
            rival = best.get(seed)
            if rival is None or trial[stage]["validation"] > rival[stage]["validation"]:
                best[seed] = trial
    return best


def seeds_of(trials: Iterable[dict]) -> list[int]:
    """Returns the seeds, in order."""
    return sorted({trial["seed"] for trial in trials})


def whole_parameters(trials: Iterable[dict]) -> int:
    """Returns the number of parameters of the network that has lost nothing."""
    return next(t["parameters"] for t in trials if t["method"] == "none" and not t["fraction"])


def _mean(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def _cells(
    trials: list[dict], stage: str, show: Callable[[str, float, list[int]], str]
) -> list[list[str]]:
    """A row for every method, with what `show` makes of each level; a dash where seeds miss it."""
    whole, seeds = whole_parameters(trials), seeds_of(trials)
    methods = {trial["method"] for trial in trials}
    rows = []
    for method, choice in METHODS.items():
        row = [choice.label]
        if method not in methods:
            rows.append([*row, "not run", *[""] * (len(LEVELS) - 1)])
            continue
        for level in LEVELS:
            found = chosen(trials, method, level * whole, stage)
            missing = len(found) < len(seeds)
            row.append("–" if missing else show(method, level * whole, seeds))
        rows.append(row)
    return rows


def accuracy_table(trials: list[dict], stage: str, split: str = "test") -> str:
    """Returns the accuracies of every method at every level, means and deviations over seeds."""

    def show(method, limit, seeds):
        found = chosen(trials, method, limit, stage)
        return _mean([100 * found[seed][stage][split] for seed in seeds])

    return table(_header(f"{split} accuracy, %, {_STAGES[stage]}"), _cells(trials, stage, show))


def difference_table(trials: list[dict], stage: str, reference: str) -> str:
    """Returns the differences to another method in test accuracy, seed by seed, in points."""

    def show(method, limit, seeds):
        found = chosen(trials, method, limit, stage)
        other = chosen(trials, reference, limit, stage)
        if len(other) < len(seeds) or method == reference:
            return "–"
        gains = [100 * (found[seed][stage]["test"] - other[seed][stage]["test"]) for seed in seeds]
        return _mean(gains, sign="+")

    header = _header(f"points over {METHODS[reference].label}, {_STAGES[stage]}")
    return table(header, _cells(trials, stage, show))


def size_table(trials: list[dict], stage: str) -> str:
    """Returns what is left in the chosen trials: parameters and neurons, means over seeds."""

    def show(method, limit, seeds):
        found = [chosen(trials, method, limit, stage)[seed] for seed in seeds]
        neurons = np.mean([trial["neurons"] for trial in found], axis=0)
        parameters = statistics.mean(trial["parameters"] for trial in found)
        return f"{parameters:,.0f} ({' + '.join(f'{n:.0f}' for n in neurons)})"

    return table(_header(f"parameters (neurons), {_STAGES[stage]}"), _cells(trials, stage, show))


def _header(first: str) -> list[str]:
    return [first, *(f"≤ {100 * level:g} %" for level in LEVELS)]


def time_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Returns the medians of the seconds per step, and of their ratios to no regularizer."""
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["none"], strict=True)]
        label = "none" if name == "none" else METHODS[name].label
        rows.append(
            [label, f"{1e3 * statistics.median(values):.2f} ms", f"{statistics.median(ratios):.2f}"]
        )
    return table(["method", "step", "ratio"], rows)


def summary(results: dict) -> str:
    """Returns the report in Markdown."""
    parts = []
    for dataset, trials in _by_dataset(results["trials"]).items():
        label, whole = DATASETS[dataset], whole_parameters(trials)
        dense = [t for t in trials if t["method"] == "none" and t["parameters"] == whole]
        shown = "; ".join(
            f"{_STAGES[stage]} {_mean([100 * t[stage]['train'] for t in dense])} % on the training "
            f"data and {_mean([100 * t[stage]['test'] for t in dense])} % on the test data"
            for stage in _STAGES
        )
        parts += [
            f"### {label}",
            f"Whole network, {whole:,} parameters, seeds {', '.join(map(str, seeds_of(trials)))}: "
            f"{shown}.",
            f"![{label}: accuracy against parameters]({dataset}.png)",
            accuracy_table(trials, "trained"),
            accuracy_table(trials, "trained", "train"),
            size_table(trials, "trained"),
            difference_table(trials, "trained", "full"),
            accuracy_table(trials, "finetuned"),
            difference_table(trials, "finetuned", "full"),
        ]
    parts.append("### Seconds per step")
    seconds = results.get("seconds_per_step")
    parts.append(
        time_table(seconds["seconds"])
        if seconds
        else "Not measured yet: `python -m benchmarks.partial_group_lasso.run --time --out=DIR`."
    )
    return "\n\n".join(parts)


def _by_dataset(trials: Iterable[dict]) -> dict[str, list[dict]]:
    found = {}
    for trial in trials:
        found.setdefault(trial["dataset"], []).append(trial)
    return {name: found[name] for name in DATASETS if name in found}


def plot(trials: list[dict], title: str, path: pathlib.Path) -> None:
    """Draws test accuracy against surviving parameters, as PNG and as SVG.

    Points are trials; lines join the trials that are chosen at the levels, means over seeds with
    deviations.

    Args:
        trials: Results of one data set.
        title: Title of the plot.
        path: The files' path without its ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, seeds = whole_parameters(trials), seeds_of(trials)
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    colors = dict(zip(METHODS, matplotlib.colormaps["tab10"].colors, strict=False))
    lowest = 100.0
    for axes, stage in zip(panels, _STAGES, strict=True):
        for method, choice in METHODS.items():
            style = {"color": colors[method]}
            own = [trial for trial in trials if trial["method"] == method]
            axes.scatter(
                [trial["parameters"] for trial in own],
                [100 * trial[stage]["test"] for trial in own],
                s=8,
                alpha=0.35,
                linewidths=0,
                **style,
            )
            points = []
            for level in LEVELS:
                found = chosen(trials, method, level * whole, stage)
                if len(found) == len(seeds):
                    values = [100 * found[seed][stage]["test"] for seed in seeds]
                    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                    size = statistics.mean(found[seed]["parameters"] for seed in seeds)
                    points.append((size, statistics.mean(values), deviation))
            if points:
                sizes, means, deviations = zip(*points, strict=True)
                lowest = min(lowest, *means)
                line = "--" if method.startswith("coupled") or method == "none" else "-"
                axes.errorbar(
                    sizes,
                    means,
                    deviations,
                    fmt=line + "o",
                    ms=4,
                    lw=1.5,
                    label=choice.label,
                    **style,
                )
        for level in LEVELS:
            axes.axvline(level * whole, color="0.85", lw=0.8, zorder=0)
        axes.set(xscale="log", xlabel="surviving parameters", title=f"{title}, {_STAGES[stage]}")
        axes.grid(axis="y", color="0.9")
    highest = max(100 * trial[stage]["test"] for trial in trials for stage in _STAGES)
    rest = 0.05 * (highest - lowest)
    panels[0].set(ylabel="test accuracy, %", ylim=(lowest - 2 * rest, highest + rest))
    panels[1].legend(fontsize=8, loc="lower right")
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=110, metadata=_undated(ending))
    pyplot.close(figure)


def _undated(ending: str) -> dict:
    return {"Date": None} if ending == "svg" else {}


def report(results: dict, out: pathlib.Path) -> str:
    """Writes results.json, the plots and, between its two marks, the README; returns the tables."""
    write_results(out / "results.json", results)
    text = summary(results)
    for dataset, trials in _by_dataset(results["trials"]).items():
        plot(trials, DATASETS[dataset], out / dataset)
    readme = out / "README.md"
    if readme.exists():
        marks = r"(<!-- report -->\n).*?(\n<!-- end of report -->)"
        old = readme.read_text("utf-8")
        new, number = re.subn(marks, lambda m: f"{m[1]}{text}{m[2]}", old, flags=re.DOTALL)
        if not number:
            raise ValueError(f"{readme} lacks the marks between which the report belongs.")
        readme.write_text(new, "utf-8")
    return text


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = pathlib.Path
    parser.add_argument("--out", type=folder, required=True, help="folder of the report")
    parser.add_argument("--data_dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--workdir", type=folder, default=folder("runs/partial_group_lasso"))
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--finetune_epochs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only from results.json")
    parser.add_argument("--time", action="store_true", help="only measure the seconds per step")
    parser.add_argument("--rounds", type=int, default=15, help="of --time")
    parser.add_argument("--steps", type=int, default=200, help="of each round of --time")
    flags = parser.parse_args()
    path = flags.out / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if flags.time:
        about = environment()
        seconds = timed(flags.rounds, flags.steps, fraction_for(0.25))
        print(time_table(seconds))
        results["seconds_per_step"] = {
            "environment": about,
            "steps": flags.steps,
            "fraction": fraction_for(0.25),
            "seconds": seconds,
        }
    elif not flags.report:
        about = environment()
        results["levels"] = LEVELS
        seeds = [int(text) for text in flags.seeds.split(",")]
        trials = grid(flags.datasets.split(","), seeds, flags.methods.split(","))
        found = run_all(
            trials,
            flags.workdir,
            lambda name: load(name, flags.data_dir),
            flags.epochs,
            flags.finetune_epochs,
        )
        ran = flags.datasets.split(",")
        others = [trial for trial in results.get("trials", ()) if trial["dataset"] not in ran]
        results["trials"] = others + found
        results["environments"] = results.get("environments", {}) | dict.fromkeys(ran, about)
    if "trials" in results:
        print(report(results, flags.out))
    elif results:
        write_results(path, results)
    else:
        parser.error(f"there is no {path} to report from")


if __name__ == "__main__":
    main()
