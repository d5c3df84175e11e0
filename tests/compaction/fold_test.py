"""Batch normalisation that is folded: the same outputs, and left alone where that would not be."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from tests.coupling.helpers import randomise

SHAPE = (8, 8, 6)


def randomised(model):
    random = np.random.default_rng(1)
    randomise(model)
    for variable in model.variables:
        if "moving_variance" in variable.path:
            variable.assign(random.uniform(0.2, 3.0, variable.shape))
        elif "moving_mean" in variable.path or "gamma" in variable.path:
            variable.assign(random.normal(size=variable.shape))
    return model


def norms(model):
    return [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def check(model, num_left, shape=SHAPE):
    randomised(model)
    before = [np.array(w) for w in model.get_weights()]
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    expected = outputs(model, x)
    folded = kc.fold_batch_norm(model)
    assert len(norms(folded)) == num_left
    found = outputs(folded, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    return folded


LAYERS = {
    "dense": lambda **options: layers.Dense(5, **options),
    "conv2d": lambda **options: layers.Conv2D(5, 3, padding="same", **options),
    "grouped": lambda **options: layers.Conv2D(4, 3, groups=2, **options),
    "depthwise": lambda **options: layers.DepthwiseConv2D(3, depth_multiplier=2, **options),
    "separable": lambda **options: layers.SeparableConv2D(5, 3, **options),
    "transposed": lambda **options: layers.Conv2DTranspose(5, 3, strides=2, **options),
}


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, use_bias):
    norm = layers.BatchNormalization(scale=use_bias, center=not use_bias)
    stack = [keras.Input(SHAPE), LAYERS[name](use_bias=use_bias), norm, layers.ReLU()]
    folded = check(keras.Sequential(stack), 0)
    assert folded.layers[0].use_bias
    assert folded.layers[1].name == norm.name


def test_residual_and_nested():
    image = keras.Input(SHAPE)
    inner = keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(6, 3, padding="same"), layers.BatchNormalization()]
    )
    x = layers.Add()([image, inner(image)])
    y = layers.BatchNormalization(name="first")(x)  # after no layer
    y = layers.Conv2D(6, 1, activation="relu")(y)
    y = layers.BatchNormalization(name="after_relu")(y)
    z = layers.Conv2D(6, 1)(y)
    model = keras.Model(image, layers.Add()([z, layers.BatchNormalization(name="read_twice")(z)]))
    assert {norm.name for norm in norms(check(model, 3))} == {"first", "after_relu", "read_twice"}


def test_layers_that_are_called_twice_stay():
    shared, norm = layers.Dense(6), layers.BatchNormalization()
    image = keras.Input((6,))
    model = keras.Model(image, norm(shared(norm(shared(image)))))
    check(model, 1, (6,))


def test_batch_statistics_on_request_stay():
    image = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(6)(image), training=True)
    assert len(norms(kc.fold_batch_norm(keras.Model(image, x)))) == 1


def test_another_axis_stays():
    model = keras.Sequential(
        [keras.Input((4, 6)), layers.Dense(5), layers.BatchNormalization(axis=1)]
    )
    check(model, 1, (4, 6))


def test_it_can_be_saved(tmp_path):
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
    )
    folded = check(model, 0)
    folded.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    x = np.ones((2, *SHAPE), "float32")
    np.testing.assert_array_equal(outputs(again, x), outputs(folded, x))


def test_subclassed_models_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="Own"):
        kc.fold_batch_norm(Own())
    with pytest.raises(TypeError, match=r"keras\.Model"):
        kc.fold_batch_norm(layers.Dense(2))
