"""Networks small enough to score by hand, and one in which some channels are useless."""

import keras
import numpy as np
from keras import layers


def dense_pair():
    """`a` writes three channels that `z` reads."""
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, name="a"), layers.Dense(2, name="z")]
    )
    model.set_weights(
        [
            np.array([[3.0, 0.0, 1.0], [0.0, -1.0, -2.0]]),
            np.array([7.0, 8.0, 9.0]),
            np.array([[4.0, 0.0], [1.0, -1.0], [0.0, 2.0]]),
            np.array([5.0, 6.0]),
        ]
    )
    return model


def convolutions():
    """`a`, a batch normalisation, `b`, and a head on the two channels of `b`."""
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 1, use_bias=False, name="a"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Conv2D(2, 1, use_bias=False, name="b"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1, use_bias=False, name="z"),
        ]
    )
    model.get_layer("a").kernel.assign(np.array([2.0, -3.0]).reshape(1, 1, 1, 2))
    model.get_layer("norm").gamma.assign([-0.5, 4.0])
    model.get_layer("b").kernel.assign(np.array([[1.0, -1.0], [0.0, 5.0]]).reshape(1, 1, 2, 2))
    model.get_layer("z").kernel.assign([[10.0], [-20.0]])
    return model


def residual():
    """`a` and `b` write the same two channels; `b` also reads them."""
    inputs = keras.Input((1,))
    x = layers.Dense(2, use_bias=False, name="a")(inputs)
    y = layers.Dense(2, use_bias=False, name="b")(x)
    x = layers.Add()([x, y])
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="z")(x))
    model.set_weights(
        [np.array([[1.0, 2.0]]), np.array([[3.0, 5.0], [7.0, 11.0]]), np.array([[13.0], [17.0]])]
    )
    return model


def concatenation(joined=False):
    """`a` (two channels) and `b` (one) behind each other; `joined`: `c` is added to both."""
    inputs = keras.Input((1,))
    a = layers.Dense(2, use_bias=False, name="a")(inputs)
    b = layers.Dense(1, use_bias=False, name="b")(inputs)
    x = layers.Concatenate()([a, b])
    weights = [np.array([[1.0, -2.0]]), np.array([[4.0]])]
    if joined:
        x = layers.Add()([x, layers.Dense(3, use_bias=False, name="c")(inputs)])
        weights.append(np.array([[2.0, 2.0, 2.0]]))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="z")(x))
    model.set_weights([*weights, np.array([[10.0], [20.0], [30.0]])])
    return model


USELESS = (1, 4)


def planted():
    """Of the six channels of `a`, those of `USELESS` are zero and nobody reads them."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, name="a"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Dense(2, name="z"),
        ]
    )
    rng = np.random.default_rng(0)
    useless = list(USELESS)
    for variable in model.trainable_variables:
        value = rng.normal(size=tuple(variable.shape))
        value += np.sign(value) / 2
        axis = 0 if "z" in variable.path.split("/") and len(variable.shape) == 2 else -1
        if variable.shape[axis] == 6:
            np.moveaxis(value, axis, 0)[useless] = 0.0
        variable.assign(value)
    return model
