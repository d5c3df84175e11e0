"""Occasional compression of a residual network on CIFAR-10, beside published numbers.

After Lee et al. (2019, arXiv 1905.10145; 2021): a trained network trains on, and every N steps its
largest convolutions are overwritten by their Tucker-2 approximation, or by that of their tiles'
singular vectors; the rival is the network that is decomposed first and then trained for as many
steps. Then all kernels but the output's are pruned, or made binary codes, every N steps for several
N. Every finished arm is in results.json and the trained network is kept, so the same command goes
on with a run that was interrupted.

  python -m benchmarks.frequency_resnet.run --out=DIR --data_dir=DIR

is the full length, for a GPU; with flags it gets as short as one likes. `--start=FILE` begins with
a trained network instead of training one; `--report` prints the tables of results.json.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import Steps, add_settings, kept, read_results, run_arms, settings_of, table
from keras_compaware import data, models

NETWORKS = {"resnet_32": "ResNet-32", "resnet_20": "ResNet-20"}
TUCKER = (2.06, 4.29)
TILES = {64: 8, 32: 4, 16: 2, 8: 1}  # sides and ranks; all are a quarter of the parameters
SWEEP = {
    "pruning, 90 %": kc.MagnitudePruning(0.9),
    "binary codes, 2 bits": kc.BinaryCodeQuantization(2, axis="outputs"),
}
# Accuracies in % of ResNet-32 after full trainings, read off Fig. 3 and Table 1 of arXiv 1905.10145
# as a walkthrough of the paper shows them: by ratio (decomposed and trained, occasional), by tile.
PUBLISHED_START = 92.63
PUBLISHED_TUCKER = {2.06: (92.09, 92.62), 4.29: (90.96, 91.49)}
PUBLISHED_TILES = {64: 92.94, 32: 92.97, 16: 93.00, 8: 92.81}
RECALIBRATE_STEPS = 50
START, DENSE = "start", "dense"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms have in common; every field is a flag.

    Args:
        network: "resnet_32" or "resnet_20".
        pretrain: Steps of the training that all arms start from.
        pretrain_rate: Its learning rate at first; all rates fall to zero by half a cosine.
        steps: Steps of every arm after it.
        rate: Their learning rate at first.
        every: Steps between two decompositions.
        sweep: Periods of pruning and binary codes, joined by commas.
        batch: Images of a batch.
        seed: Seed of the weights and of the batches.
    """

    network: str = "resnet_32"
    pretrain: int = 64_000
    pretrain_rate: float = 0.1
    steps: int = 32_000
    rate: float = 0.01
    every: int = 200
    sweep: str = "1,10,100,1000"
    batch: int = 128
    seed: int = 0

    @property
    def periods(self) -> list[int]:
        """The periods of the sweep as numbers."""
        return [int(text) for text in self.sweep.split(",")]


def batches(dataset: data.Dataset, settings: Settings, epoch: int = 0) -> data.Batches:
    """Returns the training batches, mirrored and shifted."""
    return data.batches(
        dataset.train, settings.batch, seed=settings.seed, epoch=epoch, augment=data.flip_crop
    )


def fit(
    model: keras.Model,
    dataset: data.Dataset,
    settings: Settings,
    steps: int,
    rate: float,
    epoch: int,
    recipe: kc.Recipe | None = None,
) -> tuple[keras.Model, list[float]]:
    """Trains by SGD as residual networks are trained.

    Returns:
        The model, and the mean distortion of every firing.
    """
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(rate, steps),
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
    )
    if recipe is not None:
        model, optimizer = recipe.wrap(model), recipe.optimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    callbacks = [] if recipe is None else recipe.callbacks(model)
    # One call and one epoch, which ends with one compression.
    order = Steps(batches(dataset, settings, epoch), steps)
    model.fit(order, shuffle=False, callbacks=callbacks, verbose=2)
    firings = callbacks[0].firings if callbacks else []
    return model, [float(np.mean(list(f.distortion.values()))) for f in firings if f.distortion]


def measured(model: keras.Model, dataset: data.Dataset, settings: Settings) -> dict:
    """Returns test accuracy, after batch norm has seen the final weights, and sizes if compacted.

    The statistics of batch normalisation are those of weights before the last firing otherwise.
    """
    model = kc.compact(model).model
    kc.recalibrate_batch_norm(model, batches(dataset, settings), RECALIBRATE_STEPS)
    scores = model.predict(data.batches(dataset.test, 500), verbose=0)
    return {
        "accuracy": float(np.mean(scores.argmax(axis=-1) == dataset.test.labels)),
        "parameters": kc.measure.parameters(model),
        "macs": kc.measure.macs(model),
    }


def largest(model: keras.Model) -> tuple[str, ...]:
    """Returns the names of the kernels with the most parameters: nine in ResNet-32."""
    targets = kc.find_targets(model)[0]
    most = max(target.num_parameters for target in targets)
    return tuple(target.name for target in targets if target.num_parameters == most)


def on_largest(model: keras.Model, action) -> kc.Recipe:
    """One action on the largest kernels."""
    names = largest(model)
    return kc.Recipe([kc.Rule(lambda target: target.name in names, action)])


# ---- arms -------------------------------------------------------------------------------------


def tucker_key(ratio: float, how: str) -> str:
    """Returns the name of an arm with Tucker-2."""
    return f"Tucker-2, {ratio}x: {how}"


def tile_key(tile: int) -> str:
    """Returns the name of an arm with tiles."""
    return f"tiles of {tile} x {tile}, rank {TILES[tile]}"


def sweep_key(name: str, what: int | str) -> str:
    """Returns the name of an arm of the sweep."""
    return f"{name}: {what if isinstance(what, str) else f'every {what}'}"


DECOMPOSED, OCCASIONAL, ONCE = "decomposed, then trained", "occasional", "once, after training"
STRAIGHT_THROUGH = "straight-through"


def arms(
    load: Callable[[], data.Dataset], settings: Settings, workdir: pathlib.Path, start_file
) -> dict[str, Callable[[], dict]]:
    """Returns what runs every arm."""

    def pretrained():
        if start_file:
            return keras.models.load_model(start_file, compile=False)
        keras.utils.set_random_seed(settings.seed)
        dataset = load()
        model = models.build(settings.network, dataset.image_shape, dataset.num_classes)
        return fit(model, dataset, settings, settings.pretrain, settings.pretrain_rate, 0)[0]

    def start():
        return kept(workdir / f"{settings.network}-start.keras", pretrained)

    def further(model, recipe=None):
        return fit(model, load(), settings, settings.steps, settings.rate, 1000, recipe)

    def dense():
        return kept(workdir / f"{settings.network}-dense.keras", lambda: further(start())[0])

    def result(model, distortion=()):
        found = measured(model, load(), settings)
        return found | ({"distortion": distortion} if distortion else {})

    def occasional(compressor, every):
        model = start()
        return result(*further(model, on_largest(model, kc.Every(every, compressor))))

    def decomposed(compressor):
        model = start()
        small = kc.compact(kc.compress(model, on_largest(model, kc.AtEnd(compressor)))).model
        return result(*further(small))

    def once(compressor, choose=on_largest):
        model = dense()
        return result(kc.compress(model, choose(model, kc.AtEnd(compressor))))

    def everywhere(model, action):
        del model
        return kc.Recipe([kc.Rule(None, action)])

    def swept(action):
        model = start()
        return result(*further(model, everywhere(model, action)))

    found = {START: lambda: result(start()), DENSE: lambda: result(dense())}
    for ratio in TUCKER:
        tucker = kc.Tucker2(ratio=1 / ratio)
        found |= {
            tucker_key(ratio, OCCASIONAL): functools.partial(occasional, tucker, settings.every),
            tucker_key(ratio, DECOMPOSED): functools.partial(decomposed, tucker),
            tucker_key(ratio, ONCE): functools.partial(once, tucker),
        }
    for tile, rank in TILES.items():
        low_rank = kc.LowRank(rank=rank, tile=tile)
        found[tile_key(tile)] = functools.partial(occasional, low_rank, settings.every)
    for name, compressor in SWEEP.items():
        found[sweep_key(name, ONCE)] = functools.partial(once, compressor, everywhere)
        for period in settings.periods:
            action = kc.Every(period, compressor)
            found[sweep_key(name, period)] = functools.partial(swept, action)
        action = kc.StraightThrough(compressor)
        found[sweep_key(name, STRAIGHT_THROUGH)] = functools.partial(swept, action)
    return found


# ---- report -----------------------------------------------------------------------------------


def summary(results: Mapping, settings: Settings) -> str:
    """Returns the tables in Markdown."""
    found, title = results["arms"], NETWORKS[settings.network]

    def accuracy(name):
        return f"{100 * found[name]['accuracy']:.2f}" if name in found else "not run"

    def millions(name):
        return f"{found[name]['macs'] / 1e6:.1f} M" if name in found else ""

    def gain(first, second):
        if first not in found or second not in found:
            return ""
        return f"{100 * (found[first]['accuracy'] - found[second]['accuracy']):+.2f}"

    parts = [
        f"{title}, test accuracy in %: at the start {accuracy(START)} ({millions(START)} MACs), "
        f"after the same further training without compression {accuracy(DENSE)}. Published: "
        f"{PUBLISHED_START} at the start.",
    ]
    header = ["Tucker-2 of the largest convolutions", ONCE, DECOMPOSED, OCCASIONAL, "gain", "MACs"]
    header += [f"published: {DECOMPOSED}", f"published: {OCCASIONAL}", "published: gain"]
    rows = []
    for ratio in TUCKER:
        names = [tucker_key(ratio, how) for how in (ONCE, DECOMPOSED, OCCASIONAL)]
        first, second = PUBLISHED_TUCKER[ratio]
        rows.append(
            [
                f"{ratio}x",
                *map(accuracy, names),
                gain(names[2], names[1]),
                millions(names[2]),
                *(f"{value:.2f}" for value in (first, second)),
                f"{second - first:+.2f}",
            ]
        )
    parts.append(table(header, rows))
    header = ["tiles of the largest convolutions, 4x", "rank", OCCASIONAL]
    header += [f"published: {OCCASIONAL}"]
    rows = [
        [
            f"{tile} x {tile}",
            str(rank),
            accuracy(tile_key(tile)),
            f"{PUBLISHED_TILES[tile]:.2f}",
        ]
        for tile, rank in TILES.items()
    ]
    parts.append(table(header, rows))
    whats = [*settings.periods, STRAIGHT_THROUGH, ONCE]
    header = ["all kernels", *(w if isinstance(w, str) else f"every {w}" for w in whats)]
    rows = [[name, *(accuracy(sweep_key(name, what)) for what in whats)] for name in SWEEP]
    parts.append(table(header, rows))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, or prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/frequency"))
    parser.add_argument("--data_dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--start", type=pathlib.Path, help="trained network to begin with")
    parser.add_argument("--arms", default="", help="regular expression: run these only")
    parser.add_argument("--report", action="store_true", help="run nothing")
    add_settings(parser, Settings)
    flags = parser.parse_args(arguments)
    settings = settings_of(flags, Settings)
    path = flags.out / f"{settings.network}.json"
    if flags.report:
        results = read_results(path, dataclasses.asdict(settings))
    else:
        load = functools.cache(lambda: data.load("cifar10", data_dir=flags.data_dir))
        todo = arms(load, settings, flags.workdir, flags.start)
        results = run_arms(path, dataclasses.asdict(settings), todo, flags.arms)
    print(summary(results, settings))


if __name__ == "__main__":
    main()
