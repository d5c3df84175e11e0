import keras
import numpy as np
import pytest

from keras_compaware.models import unet


def pair(before, after):
    """Two 3x3 convolutions without bias, each with four vectors of normalisation."""
    return 9 * before * after + 9 * after * after + 2 * 4 * after


@pytest.mark.usefixtures("no_values")
def test_parameters():
    model = unet((32, 48, 3), 2)
    encoder = pair(3, 16) + pair(16, 32) + pair(32, 64)
    # 2x2 transposed convolutions with bias; what comes over the bridge doubles the channels.
    second = 4 * 64 * 32 + 32 + pair(64, 32)
    first = 4 * 32 * 16 + 16 + pair(32, 16)
    assert model.count_params() == encoder + second + first + 16 * 2 + 2


@pytest.mark.usefixtures("no_values")
def test_layers_and_their_names():
    model = unet((8, 8, 1), 2, filters=(4, 8), name="mine")
    parts = ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]
    assert [layer.name for layer in model.layers] == [
        "image",
        *(f"down1_{part}" for part in parts),
        "pool1",
        *(f"bottom_{part}" for part in parts),
        *("up1_transpose", "up1_concatenate"),
        *(f"up1_{part}" for part in parts),
        "head",
    ]
    assert model.name == "mine"


@pytest.mark.usefixtures("no_values")
def test_sides_and_bridges():
    model = unet((16, 24, 3), 5)
    shapes = {
        name: model.get_layer(name).output.shape[1:]
        for name in ("down1_relu2", "down2_relu2", "bottom_relu2", "up2_transpose", "up1_relu2")
    }
    assert shapes == {
        "down1_relu2": (16, 24, 16),
        "down2_relu2": (8, 12, 32),
        "bottom_relu2": (4, 6, 64),
        "up2_transpose": (8, 12, 32),
        "up1_relu2": (16, 24, 16),
    }
    assert model.output_shape == (None, 16, 24, 5)
    for level in (1, 2):
        bridge, raised = model.get_layer(f"up{level}_concatenate").input
        assert bridge.name == model.get_layer(f"down{level}_relu2").output.name
        assert raised.name == model.get_layer(f"up{level}_transpose").output.name


@pytest.mark.usefixtures("no_values")
def test_sides_may_be_open():
    model = unet((None, None, 1), 2, filters=(2, 4))
    assert model.output_shape == (None, None, None, 2)
    for height, width in ((4, 6), (2, 8)):
        assert model.compute_output_shape((1, height, width, 1)) == (1, height, width, 2)


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((30, 32, 3), {}, "multiples of 4, for 3 levels halve them 2 times. Received: 30 and 32"),
        ((32, 31, 3), {"filters": (4, 8)}, "multiples of 2"),
        ((0, 32, 3), {}, "Received: 0 and 32"),
        ((32, 32, 3), {"filters": (4,)}, "at least two levels"),
    ],
)
def test_bad_arguments(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        unet(shape, 2, **kwargs)


def test_it_learns_which_pixels_are_bright_and_survives_saving(tmp_path):
    images = np.random.default_rng(0).uniform(size=(32, 8, 8, 1)).astype("float32")
    labels = keras.utils.to_categorical(images[..., 0] > 0.5, 2)
    model = unet((8, 8, 1), 2, filters=(4, 8))
    model.compile(keras.optimizers.Adam(0.02), "categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images, labels, epochs=12, batch_size=8, verbose=0).history
    assert history["accuracy"][-1] > 0.9
    outputs = model.predict(images, verbose=0)
    np.testing.assert_allclose(outputs.sum(axis=-1), 1, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), outputs, atol=1e-5)
