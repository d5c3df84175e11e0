"""Batch-normalisation statistics from data, against averages taken by hand."""

import keras
import numpy as np
import pytest

from keras_compaware import Compressed, UniformQuantization, recalibrate_batch_norm

BACKEND = keras.backend.backend()


def data(number=20, seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, size=(number, 3)).astype("float32")


def network(*extra):
    norm = keras.layers.BatchNormalization(momentum=0.7, name="norm")
    return keras.Sequential([keras.Input((3,)), *extra, norm, keras.layers.Dense(2)])


def statistics(model):
    norm = model.get_layer("norm")
    return [keras.ops.convert_to_numpy(v) for v in (norm.moving_mean, norm.moving_variance)]


def averages(batches):
    return (
        np.mean([batch.mean(axis=0) for batch in batches], axis=0),
        np.mean([batch.var(axis=0) for batch in batches], axis=0),
    )


def check(model, batches):
    for received, expected in zip(statistics(model), averages(batches), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def split(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return split(data(), 4)[index], np.zeros((4, 2))


SOURCES = {
    "array": data,
    "list of batches": lambda: split(data(), 4),
    "pairs": lambda: [(batch, np.zeros((4, 2))) for batch in split(data(), 4)],
    "generator": lambda: iter(split(data(), 4)),
    "PyDataset": Batches,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_sources(make):
    model = network()
    assert recalibrate_batch_norm(model, make(), batch_size=4) is model
    check(model, split(data(), 4))


@pytest.mark.tensorflow
def test_tf_data():
    import tensorflow as tf

    model = network()
    dataset = tf.data.Dataset.from_tensor_slices((data(), np.zeros((20, 2)))).batch(4)
    recalibrate_batch_norm(model, dataset.repeat(), steps=5)
    check(model, split(data(), 4))


@pytest.mark.skipif(BACKEND != "torch", reason="a PyTorch data loader is for that backend")
def test_torch_loader():
    import torch

    model = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(data())), 4)
    recalibrate_batch_norm(model, loader)
    check(model, split(data(), 4))


def test_steps_bound_the_batches_and_no_more_are_drawn():
    model, drawn = network(), []

    def stream():
        for number in range(100):
            drawn.append(number)
            yield data(seed=number)

    recalibrate_batch_norm(model, stream(), steps=3)
    assert drawn == [0, 1, 2]
    check(model, [data(seed=number) for number in range(3)])


def test_a_partial_last_batch_counts_as_a_batch():
    model = network()
    recalibrate_batch_norm(model, data(10), batch_size=4)
    check(model, split(data(10), 4))


def test_stale_statistics_do_not_matter():
    model = network()
    model.get_layer("norm").moving_mean.assign([1e6, -1e6, 3.0])
    recalibrate_batch_norm(model, data())
    check(model, [data()])


def test_only_the_statistics_change():
    model = network(keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1))
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    recalibrate_batch_norm(model, data())
    for one, other in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(one, keras.ops.convert_to_numpy(other))


NOISES = {
    "Dropout": (lambda: keras.layers.Dropout(0.5), "rate", 0.5),
    "AlphaDropout": (lambda: keras.layers.AlphaDropout(0.5), "rate", 0.5),
    "GaussianDropout": (lambda: keras.layers.GaussianDropout(0.5), "rate", 0.5),
    "GaussianNoise": (lambda: keras.layers.GaussianNoise(1.0), "stddev", 1.0),
}


@pytest.mark.parametrize(("make", "name", "value"), NOISES.values(), ids=NOISES)
def test_noise_is_off_and_restored(make, name, value):
    layer = make()
    model = network(layer)
    recalibrate_batch_norm(model, data(), batch_size=4)
    check(model, split(data(), 4))
    assert getattr(layer, name) == value


def test_dropout_of_recurrent_layers_is_off_and_restored():
    lstm = keras.layers.LSTM(3, dropout=0.5, recurrent_dropout=0.25)
    inputs = keras.Input((4, 3))
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Model(inputs, norm(lstm(inputs)))
    x = data(40).reshape(10, 4, 3)
    recalibrate_batch_norm(model, x)
    check(model, [keras.ops.convert_to_numpy(lstm(x, training=False))])
    assert (lstm.cell.dropout, lstm.cell.recurrent_dropout) == (0.5, 0.25)


def test_everything_is_restored_when_the_data_raise():
    dropout = keras.layers.Dropout(0.25)
    model = network(dropout)

    def failing():
        yield data()
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        recalibrate_batch_norm(model, failing())
    assert model.get_layer("norm").momentum == 0.7
    assert dropout.rate == 0.25


def test_momentum_is_restored():
    model = network()
    recalibrate_batch_norm(model, data())
    assert model.get_layer("norm").momentum == 0.7


@pytest.mark.parametrize("empty", [np.zeros((0, 3), "float32"), [], iter(())])
def test_no_data_raises(empty):
    model = network()
    before = statistics(model)
    with pytest.raises(ValueError, match="yields no batch"):
        recalibrate_batch_norm(model, empty)
    for one, other in zip(before, statistics(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.get_layer("norm").momentum == 0.7


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"data": (data(), np.zeros((20, 2)))}, ValueError, r"Of arrays \(x, y\) pass x"),
        ({"data": {"x": data()}}, ValueError, "dict"),
        ({"data": 3}, ValueError, "Received: a int"),
        ({"data": data(), "steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"data": data(), "batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"data": data(), "steps": 1.5}, TypeError, "`steps` must be an integer"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        recalibrate_batch_norm(network(), **arguments)


def test_a_model_without_batch_normalisation_is_returned():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert recalibrate_batch_norm(model, data()) is model


def test_frozen_layers_are_left_alone():
    model = network()
    model.get_layer("norm").trainable = False
    before = statistics(model)
    recalibrate_batch_norm(model, data())
    for one, other in zip(before, statistics(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nested_and_wrapped_layers_are_found():
    block = keras.Sequential(
        [keras.layers.Dense(3, name="dense"), keras.layers.BatchNormalization(name="norm")]
    )
    wrapper = Compressed(block, UniformQuantization(4))
    model = keras.Sequential([keras.Input((3,)), wrapper, keras.layers.Dense(2)])
    dense = keras.layers.Dense(3)
    dense.build((None, 3))
    ((_, kernel),) = wrapper.forward_kernels()
    dense.kernel.assign(kernel)
    recalibrate_batch_norm(model, data())
    check(block, [keras.ops.convert_to_numpy(dense(data()))])
