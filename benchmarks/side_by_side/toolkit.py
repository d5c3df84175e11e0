"""One arm of TensorFlow's model optimization toolkit: from the same weights, on the same batches.

Runs in an environment of its own, with tf_keras and tensorflow-model-optimization beside this
project, and TF_USE_LEGACY_KERAS=1; `benchmarks.side_by_side.run --toolkit_python=PATH` starts it,
in a process of its own for each arm. The last line printed is JSON.
"""

import importlib
import importlib.metadata
import json

import numpy as np

from benchmarks.common import peak_of
from benchmarks.deploy.toolkit import converted, with_weights
from benchmarks.side_by_side import network as shared

ARMS = (
    "dense",
    *(f"pruning-{percent}" for percent in shared.SPARSITIES),
    *(f"clustering-{clusters}" for clusters in shared.CLUSTERS),
    "aware-int8",
)
_PACKAGES = ("tensorflow", "tf_keras", "tensorflow-model-optimization")
MODES = {"aware-int8": ("int8",)}  # others: float32 and int8


def wrapped(toolkit, model, arm: str, steps: int):
    """Returns the model as an arm trains it, its callbacks, and what to do at the end."""
    kind, _, amount = arm.partition("-")
    if kind == "pruning":
        sparsity = toolkit.sparsity.keras
        schedule = sparsity.PolynomialDecay(
            0.0, int(amount) / 100, 0, steps // 2, frequency=shared.FREQUENCY
        )
        model = sparsity.prune_low_magnitude(model, pruning_schedule=schedule)
        return model, [sparsity.UpdatePruningStep()], sparsity.strip_pruning
    if kind == "clustering":
        clustering = toolkit.clustering.keras
        model = clustering.cluster_weights(
            model,
            number_of_clusters=int(amount),
            cluster_centroids_init=clustering.CentroidInitialization.KMEANS_PLUS_PLUS,
        )
        return model, [], clustering.strip_clustering
    if kind == "aware":
        return toolkit.quantization.keras.quantize_model(model), [], lambda model: model
    return model, [], lambda model: model


def main() -> None:
    """Trains an arm."""
    flags = shared.worker_flags(__doc__.splitlines()[0])
    tf, kit, toolkit = map(
        importlib.import_module, ("tensorflow", "tf_keras", "tensorflow_model_optimization")
    )
    kit.utils.set_random_seed(flags.seed)
    dataset = shared.images(flags.data_dir)
    batches = shared.in_order(dataset.train, flags.steps, flags.seed + 1000)
    model = with_weights(shared.network(kit), flags.folder / "start.npz")
    images = shared.scaled(dataset.test)
    expected = np.load(flags.folder / "start-outputs.npy")
    np.testing.assert_allclose(model.predict(images[:8], verbose=0), expected, atol=1e-4)
    model, callbacks, finished = wrapped(toolkit, model, flags.arm, flags.steps)
    step, memory = peak_of(
        lambda: shared.fitted(
            kit, model, batches, shared.adam(kit, flags.steps), lambda model: callbacks
        )
    )
    about = {"seconds_per_step": step, "memory": memory}
    if flags.time:
        print(json.dumps(about))
        return
    model = finished(model)
    scores = model.predict(images, batch_size=500, verbose=0)
    for mode in MODES.get(flags.arm, ("float32", "int8")):
        aware = flags.arm.startswith("aware")  # knows its ranges already
        examples = None if aware else batches[0][: shared.CALIBRATION]
        content = converted(tf, model, mode, examples)
        (flags.folder / f"tfmot-{flags.arm}-{mode}.tflite").write_bytes(content)
    about["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    about["parameters"] = model.count_params()
    about["accuracy"] = float(np.mean(scores.argmax(-1) == dataset.test.labels))
    print(json.dumps(about))


if __name__ == "__main__":
    main()
