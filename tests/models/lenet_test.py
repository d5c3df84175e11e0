import keras
import numpy as np
import pytest

from keras_compaware.models import lenet_5, lenet_300_100


def names_of(model):
    return [layer.name for layer in model.layers[1:]]


def test_lenet_300_100_is_the_published_network():
    model = lenet_300_100((28, 28, 1), 10)
    # 784 x 300 + 300, 300 x 100 + 100, 100 x 10 + 10
    assert [layer.count_params() for layer in model.layers[2:]] == [235500, 30100, 1010]
    assert names_of(model) == ["flatten", "dense1", "dense2", "head"]
    assert model.name == "lenet_300_100"


def test_lenet_5_is_the_published_network():
    model = lenet_5((28, 28, 1), 10)
    parameters = {layer.name: layer.count_params() for layer in model.layers}
    # 5 x 5 x 1 x 20 + 20, 5 x 5 x 20 x 50 + 50, 4 x 4 x 50 x 500 + 500, 500 x 10 + 10
    assert [parameters[name] for name in ("conv1", "conv2", "dense1", "head")] == [
        520,
        25050,
        400500,
        5010,
    ]
    assert names_of(model) == ["conv1", "pool1", "conv2", "pool2", "flatten", "dense1", "head"]
    assert model.get_layer("pool2").output.shape == (None, 4, 4, 50)


def test_lenet_5_with_padding_suits_the_digits():
    model = lenet_5((8, 8, 1), 10, padding="same")
    assert model.get_layer("pool2").output.shape == (None, 2, 2, 50)


@pytest.mark.parametrize(
    ("shape", "padding", "fits"),
    [
        ((16, 16, 1), "valid", True),
        ((15, 28, 1), "valid", False),
        ((28, 15, 1), "valid", False),
        ((4, 4, 1), "same", True),
        ((3, 4, 1), "same", False),
    ],
)
def test_lenet_5_says_when_images_are_too_small(shape, padding, fits):
    if fits:
        model = lenet_5(shape, 10, padding=padding)
        assert min(model.get_layer("pool2").output.shape[1:3]) >= 1
        return
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]} pixels") as caught:
        lenet_5(shape, 10, padding=padding)
    assert ('padding="same", or' in str(caught.value)) == (padding == "valid")


def test_lenet_5_refuses_another_padding():
    with pytest.raises(ValueError, match="'causal'"):
        lenet_5((28, 28, 1), 10, padding="causal")


@pytest.mark.parametrize(
    ("function", "kwargs", "expected"),
    [
        (lenet_300_100, {"units": (7,)}, {"dense1": 7, "head": 3}),
        (lenet_300_100, {"units": ()}, {"head": 3}),
        (lenet_5, {"filters": (4, 6), "units": 9}, {"conv1": 4, "conv2": 6, "dense1": 9}),
    ],
)
def test_widths_are_arguments(function, kwargs, expected):
    model = function((20, 20, 3), 3, name="mine", **kwargs)
    assert {name: model.get_layer(name).output.shape[-1] for name in expected} == expected
    assert model.name == "mine"


@pytest.mark.parametrize("function", [lenet_300_100, lenet_5])
def test_outputs_are_probabilities_and_the_model_can_be_saved(function, tmp_path):
    model = function((28, 28, 1), 10)
    images = np.random.default_rng(0).uniform(size=(4, 28, 28, 1)).astype("float32")
    outputs = model.predict(images, verbose=0)
    assert outputs.shape == (4, 10)
    assert outputs.min() >= 0
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(images, verbose=0), outputs, atol=1e-6)
