"""Networks of every kind, dense, factorised and shrunk, and examples for them."""

import contextlib

import keras
import numpy as np
from keras import layers

import keras_compaware as kc

EVERYTHING = lambda target: True  # noqa: E731


def randomised(model, seed=0):
    """Weights as large as those of a trained network; scales of both signs."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        fan_in = max(1, int(np.prod(weight.shape[:-1])))
        value = random.normal(size=weight.shape) / np.sqrt(fan_in)
        if "variance" in weight.path:
            value = random.uniform(0.5, 2.0, weight.shape)
        elif "gamma" in weight.path:
            value = random.uniform(0.5, 2.0, weight.shape)
            value *= random.choice([-1, 1], weight.shape) if "both" in weight.path else 1
        weight.assign(value)
    return model


@contextlib.contextmanager
def untouched(model, capfd):
    """Asserts that a block leaves a model as it is, and prints nothing."""
    before = [w.copy() for w in model.get_weights()]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    capfd.readouterr()
    yield
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    for w, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(w, old)


def diverged(model):
    """Makes all weights NaN."""
    model.set_weights([np.full(w.shape, np.nan) for w in model.get_weights()])
    return model


def convnet():
    return randomised(
        keras.Sequential(
            [
                keras.Input((12, 12, 3), name="image"),
                layers.Conv2D(24, 3, use_bias=False, name="folded"),
                layers.BatchNormalization(name="both_signs"),
                layers.ReLU(),
                layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
                layers.Conv2D(32, 3, strides=2, name="plain"),
                layers.Flatten(),
                layers.Dense(8, name="logits"),
            ]
        )
    )


def images(number=48, shape=(12, 12, 3)):
    return np.random.default_rng(5).normal(size=(number, *shape)).astype("float32")


def on_grid(model, bits):
    quantization = kc.UniformQuantization(bits, axis="outputs")
    return kc.compress(model, kc.Recipe([kc.Rule(EVERYTHING, kc.AtEnd(quantization))]))


def dense():
    return keras.Sequential(
        [
            keras.Input((24,)),
            layers.Dense(64, "relu", name="one"),
            layers.Dense(48, "relu", name="two"),
            layers.Dense(5, name="logits"),
        ]
    )


def recurrent(layer):
    return keras.Sequential([keras.Input((6, 16)), layer(32, name="cell"), layers.Dense(5)])


def encoder():
    tokens = keras.Input((10,), dtype="int32")
    x = layers.Embedding(50, 32)(tokens)
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 8)(y, y)])
    y = layers.Dense(64, "gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(32)(y)])
    return keras.Model(tokens, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def mobilenet():
    return keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=10, classifier_activation=None
    )


NETWORKS = {
    "dense": dense,
    "CNN": convnet,
    "MobileNetV2": mobilenet,
    "LSTM": lambda: recurrent(layers.LSTM),
    "GRU": lambda: recurrent(layers.GRU),
    "encoder": encoder,
}


def factorised(model):
    recipe = kc.Recipe([kc.Rule(EVERYTHING, kc.AtEnd(kc.LowRank(ratio=0.3)))])
    return kc.compact(kc.compress(model, recipe)).model


def shrunk(model):
    return kc.shrink(model, kc.choose_channels(model, budget={"channels": 0.5}))


FORMS = {"whole": lambda model: model, "factorised": factorised, "shrunk": shrunk}


def examples(model, network, number=32):
    random = np.random.default_rng(3)
    shape = (number, *model.input_shape[1:])
    if network == "encoder":
        return random.integers(0, 50, shape)
    return random.normal(size=shape).astype("float32")
