import itertools

import keras
import numpy as np
import pytest

from keras_compaware.models import small_cnn


def test_layers_and_parameters():
    model = small_cnn((28, 28, 1), 10)
    blocks = [
        [f"conv{i}", f"bn{i}", f"relu{i}", *([f"pool{i}"] if i < 3 else [])] for i in (1, 2, 3)
    ]
    assert [layer.name for layer in model.layers[1:]] == [
        *itertools.chain.from_iterable(blocks),
        "average",
        "dense1",
        "head",
    ]
    # Kernels 3x3, four vectors a normalisation, then 128 x 128 + 128 and 128 x 10 + 10.
    kernels = 9 * (1 * 32 + 32 * 64 + 64 * 128)
    assert model.count_params() == kernels + 4 * (32 + 64 + 128) + 16512 + 1290
    assert 100_000 < model.count_params() < 150_000
    assert all(not model.get_layer(f"conv{i}").use_bias for i in (1, 2, 3))


@pytest.mark.parametrize(("side", "last"), [(28, 7), (8, 2), (7, 2), (3, 1), (2, 1), (1, 1)])
def test_images_of_any_size_keep_at_least_one_pixel(side, last):
    model = small_cnn((side, side, 1), 10)
    assert model.get_layer("relu3").output.shape == (None, last, last, 128)
    outputs = model.predict(np.ones((2, side, side, 1), "float32"), verbose=0)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)


def test_widths_and_dropout_are_arguments():
    model = small_cnn((8, 8, 3), 5, filters=(4,), units=6, dropout=0.5, name="mine")
    assert [layer.name for layer in model.layers[1:]] == [
        *("conv1", "bn1", "relu1", "average", "dense1", "dropout1", "head")
    ]
    assert model.get_layer("dropout1").rate == 0.5
    assert model.output_shape == (None, 5)
    assert model.name == "mine"


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"filters": ()}, "at least one block"), ({"dropout": 1}, "`dropout`")]
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_cnn((8, 8, 1), 10, **kwargs)


def test_it_learns_and_survives_saving(tmp_path):
    # Two classes: rows that are bright by turns, and columns.
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, size=64)
    images = generator.uniform(0, 0.5, size=(64, 8, 8, 1)).astype("float32")
    images[labels == 0, ::2] += 0.5
    images[labels == 1, :, ::2] += 0.5
    model = small_cnn((8, 8, 1), 2, filters=(8, 8), units=8)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    history = model.fit(images, labels, epochs=12, batch_size=16, verbose=0).history
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    outputs = model.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), outputs, atol=1e-5)


def test_running_statistics_are_those_of_the_data_after_a_hundred_steps():
    # At a learning rate of zero nothing else moves. Short runs must not be judged by statistics
    # that still remember where they began.
    images = np.random.default_rng(0).uniform(size=(16, 8, 8, 1)).astype("float32")
    model = small_cnn((8, 8, 1), 2, filters=(4,), units=4)
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    model.fit(images, np.zeros(16), epochs=100, batch_size=16, verbose=0)
    convolved = model.get_layer("conv1")(images)
    norm = model.get_layer("bn1")
    mean = keras.ops.convert_to_numpy(keras.ops.mean(convolved, axis=(0, 1, 2)))
    variance = keras.ops.convert_to_numpy(keras.ops.var(convolved, axis=(0, 1, 2)))
    running = keras.ops.convert_to_numpy(norm.moving_mean)
    np.testing.assert_allclose(running, mean, rtol=0.01)
    running = keras.ops.convert_to_numpy(norm.moving_variance)
    np.testing.assert_allclose(running, variance, rtol=0.01)
