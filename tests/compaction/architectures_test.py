"""Removing channels from whole architectures, and all that is done with a model afterwards."""

import contextlib

import keras
import numpy as np
import pytest

from keras_compaware import export
from keras_compaware.models import unet
from tests.coupling import networks
from tests.coupling.helpers import array, check_law, inputs_of, outputs_of

BACKEND = keras.backend.backend()
# JAX computes in float32 unless it is told otherwise before anything runs. On PyTorch Keras takes
# means and products of three axes in float32 under any policy.
TOLERANCES = {
    "tensorflow": {"float64": 1e-9, "float32": 1e-3},
    "torch": {"float64": 1e-5, "float32": 1e-3},
    "jax": {"float32": 1e-3},
}[BACKEND]

# The smallest images that each of them takes.
APPLICATIONS = {
    "ResNet50": 32,
    "ResNet50V2": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "DenseNet121": 32,
    "InceptionV3": 75,
    "Xception": 71,
    "NASNetMobile": 32,
    "VGG16": 32,
    "ConvNeXtTiny": 32,
}
MIXES_CHANNELS = {"ConvNeXtTiny"}  # by layer normalisation, in front of which channels are frozen
OTHERS = {
    "u_net": lambda: unet((16, 16, 3), 2),
    "two_inputs": networks.two_inputs,
    "shared_layer": networks.shared_layer,
    "nested_two_deep": networks.nested,
}
FAST = {
    "tensorflow": OTHERS,
    "torch": {"MobileNetV2", *OTHERS},
    "jax": {"two_inputs", "shared_layer"},
}[BACKEND]


def build(name):
    if name in OTHERS:
        return OTHERS[name]()
    size = APPLICATIONS[name]
    kind = getattr(keras.applications, name)
    return kind(weights=None, input_shape=(size, size, 3), classes=10)


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def check_file(model, path):
    """Plain Keras loads it, and it computes the same."""
    model.save(path)
    loaded = keras.models.load_model(path)
    inputs = inputs_of(model)
    for a, b in zip(outputs_of(model, inputs), outputs_of(loaded, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(a)))


def check_training(model):
    """One step on random data moves every trainable weight but those without a gradient."""
    inputs = inputs_of(model)
    targets = keras.tree.map_structure(
        lambda output: np.random.default_rng(1).uniform(size=output.shape),
        model(inputs, training=False),
    )
    losses = keras.tree.map_structure(lambda _: "mse", targets)
    before = [np.array(array(v)) for v in model.trainable_variables]
    eagerly = BACKEND == "tensorflow"  # for one step, tracing takes longest
    model.compile(keras.optimizers.SGD(0.1), loss=losses, run_eagerly=eagerly)
    assert np.all(np.isfinite(model.train_on_batch(inputs, targets)))
    after = [array(v) for v in model.trainable_variables]
    assert all(np.all(np.isfinite(value)) for value in after)
    moved = [np.any(a != b) for a, b in zip(before, after, strict=True)]
    assert np.mean(moved) > 0.9


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in (*APPLICATIONS, *OTHERS)
    ],
)
def test_architecture(name, tmp_path):
    for dtype, tolerance in TOLERANCES.items():
        with dtype_policy(dtype):
            model = build(name)
            spaces, _, small = check_law(model, tolerance)
        assert spaces.coverage() >= (0.85 if name in MIXES_CHANNELS else 0.95)
        assert small.count_params() < 0.75 * model.count_params()
    check_file(small, tmp_path / "small.keras")
    if BACKEND == "tensorflow":
        result = export.to_litert(small, tmp_path / "small.tflite")
        assert result.max_error < 1e-4
    check_training(small)
