"""One arm of this package: trained from the dense weights, exported, measured.

`benchmarks.side_by_side.run` starts it, in a process of its own; the last line printed is JSON.
"""

import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import peak_of
from benchmarks.deploy.run import exported, hand_over
from benchmarks.side_by_side import network as shared
from keras_compaware import measure

RANKS = kc.LowRank(ratio=0.25)
_OF_LOW_RANK = ("conv2", "hidden")  # the first convolution and the head have little to give
_INT8 = kc.UniformQuantization(8, axis="outputs")
_INT4 = kc.UniformQuantization(4, axis="outputs")


def everywhere(constraint) -> kc.Recipe:
    """The same for all kernels."""
    return kc.Recipe([kc.Rule(lambda target: True, constraint)])


def low_rank(when) -> kc.Recipe:
    """A quarter of the ranks of the two large kernels."""
    return kc.Recipe([kc.Rule(name, when) for name in _OF_LOW_RANK])


def factorised(model: keras.Model) -> keras.Model:
    """Returns the model with a quarter of the ranks, not trained."""
    return kc.compact(kc.compress(model, low_rank(kc.AtEnd(RANKS)))).model


def pruning(percent: int, steps: int) -> kc.Recipe:
    """Zeros in all kernels, more and more of them in the first half of training, then held."""
    every = kc.Every(
        shared.FREQUENCY,
        kc.MagnitudePruning(percent / 100),
        end=steps // 2,
        ramp=kc.Ramp(0.0),
        hold=True,
    )
    return everywhere(every)


def recipes(steps: int) -> dict:
    """What acts in training, by arm; None: nothing."""
    found = {"start": None, "dense": None}
    found |= {f"pruning-{percent}": pruning(percent, steps) for percent in shared.SPARSITIES}
    for clusters in shared.CLUSTERS:
        kernel = kc.WeightClustering(clusters)
        found[f"clustering-{clusters}"] = everywhere(kc.StraightThrough(kernel))
        found[f"clustering-{clusters}-every"] = everywhere(kc.Every(shared.FREQUENCY, kernel))
    found["aware-int8"] = everywhere(kc.StraightThrough(_INT8))
    found["aware-int4"] = everywhere(kc.StraightThrough(_INT4))
    found["ranks"] = low_rank(kc.Every(shared.FREQUENCY, RANKS))
    return found | dict.fromkeys(("ranks-before", "channels-half", "channels-quarter"))


ARMS = tuple(recipes(1000))[1:]
UNTRAINED = ("ranks-after", "quantize-int8", "quantize-int4")  # made of the dense arm
MODES = {"aware-int8": ("int8",), "aware-int4": ("weight_int4",)}  # others: float32 and int8


def prepared(arm: str, start: keras.Model, batches) -> keras.Model:
    """Returns the network that an arm trains."""
    if arm == "ranks-before":
        return factorised(start)
    if arm.startswith("channels"):
        budget = {"macs": 0.5 if arm.endswith("half") else 0.25}
        first = [tuple(part[:256] for part in batches)]
        return kc.fit_budget(start, first, budget, ranks=False, round_to=4).apply(start).model
    return start


def trained(arm: str, start: keras.Model, batches, steps: int) -> tuple[keras.Model, dict]:
    """Trains an arm and returns the compact model, with seconds per step and bytes of memory."""
    recipe = recipes(steps)[arm]
    model, optimizer = prepared(arm, start, batches), shared.adam(keras, steps)
    callbacks = None
    if recipe is not None:
        model, optimizer = recipe.wrap(model), recipe.optimizer(optimizer)
        callbacks = recipe.callbacks
    step, memory = peak_of(lambda: shared.fitted(keras, model, batches, optimizer, callbacks))
    if recipe is not None:
        model = kc.compact(model).model
    return model, {"seconds_per_step": step, "memory": memory}


def files(model: keras.Model, arm: str, folder: pathlib.Path, examples) -> dict:
    """Writes the files of an arm; returns what of them is refused and why."""
    refused = {}
    for mode in MODES.get(arm, ("float32", "int8")):
        path = folder / f"ours-{arm}-{mode}.tflite"
        about = exported(model, None if mode == "float32" else mode, path, examples)
        if "refused" in about:
            refused[mode] = about["refused"]
    return refused


def main() -> None:
    """Trains an arm, or makes the start of all."""
    flags = shared.worker_flags(__doc__.splitlines()[0])
    dataset = shared.images(flags.data_dir)
    start = flags.folder / "start.keras"
    if flags.arm == "start":
        keras.utils.set_random_seed(flags.seed)
        model = shared.network(keras)
    else:
        origin = flags.folder / "ours-dense.keras" if flags.arm in UNTRAINED else start
        model = keras.models.load_model(origin, compile=False)
    order = flags.seed if flags.arm == "start" else flags.seed + 1000  # other batches than before
    batches = shared.in_order(dataset.train, flags.steps, order)
    if flags.arm in UNTRAINED:
        about = {}
        if flags.arm == "ranks-after":
            model = factorised(model)
        else:
            model.quantize(flags.arm.removeprefix("quantize-"))
    else:
        model, about = trained(flags.arm, model, batches, flags.steps)
    if flags.time:
        print(json.dumps(about))
        return
    path = start if flags.arm == "start" else flags.folder / f"ours-{flags.arm}.keras"
    keras.Model(model.inputs, model.outputs).save(path)  # without an optimizer
    scores = model.predict(shared.scaled(dataset.test), batch_size=500, verbose=0)
    about |= {"accuracy": float(np.mean(scores.argmax(-1) == dataset.test.labels))}
    about |= {"keras_bytes": measure.file_bytes(path), "parameters": measure.parameters(model)}
    about |= {"macs": measure.macs(model)}
    if flags.arm == "start":
        hand_over(model, flags.folder)
        np.save(flags.folder / "start-outputs.npy", scores[:8])
    else:
        about["refused"] = files(model, flags.arm, flags.folder, batches[0][: shared.CALIBRATION])
    print(json.dumps(about))


if __name__ == "__main__":
    main()
