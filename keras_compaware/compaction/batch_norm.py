"""Batch-normalisation statistics after kernels have been overwritten."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Mapping

import keras

from keras_compaware.base import check_integer

_NOISE = {
    (
        keras.layers.Dropout,
        keras.layers.AlphaDropout,
        keras.layers.GaussianDropout,
        keras.layers.SpatialDropout1D,
        keras.layers.SpatialDropout2D,
        keras.layers.SpatialDropout3D,
    ): ("rate",),
    (keras.layers.GaussianNoise,): ("stddev",),
    (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell): (
        "dropout",
        "recurrent_dropout",
    ),
}


def recalibrate_batch_norm(model, data, steps=100, batch_size=128):
    """Estimates the moving statistics of all batch-normalisation layers again, from data.

    Overwriting kernels leaves the statistics stale. They are replaced by the plain averages of the
    batch statistics over `steps` batches (a moving average with momentum 1 - 1/k at batch k), with
    dropout and noise switched off. Weights are not trained; only the statistics of this model
    change, and the model is returned.

    Args:
        model: A built Keras model.
        data: Array of inputs, or an iterable of batches: x, or (x, y, ...), of which x is used.
        steps: Integer of at least 1: number of batches, fewer if the data end before. Default 100.
        batch_size: Integer: batch size for an array. Default 128.

    Returns:
        The same model.

    Raises:
        ValueError: If `data` yields no batch, or is a tuple such as (x, y).
    """
    check_integer("recalibrate_batch_norm", "steps", steps, 1)
    check_integer("recalibrate_batch_norm", "batch_size", batch_size, 1)
    layers = _trained_layers(model)
    if not layers:
        return model
    with _averaging(layers) as set_momentum, _without_noise(model):
        number = 0
        for batch in itertools.islice(_batches(data, batch_size), steps):
            number += 1
            set_momentum(1.0 - 1.0 / number)
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(inputs, training=True)
    if not number:
        raise ValueError("recalibrate_batch_norm: `data` yields no batch.")
    return model


@contextlib.contextmanager
def batch_statistics(model):
    """Inside, batch normalisation uses the statistics of each batch, as in training; all else not.

    Layers that are frozen keep their moving statistics, as in training too.
    """
    layers = _trained_layers(model)
    try:
        for layer in layers:
            layer.call = functools.partial(_call_in_training, layer.call)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _call_in_training(call, inputs, training=None, mask=None):
    return call(inputs, training=True, mask=mask)


def _trained_layers(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


@contextlib.contextmanager
def _averaging(layers):
    momenta = [layer.momentum for layer in layers]

    def set_momentum(value):
        for layer in layers:
            layer.momentum = value

    try:
        yield set_momentum
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextlib.contextmanager
def _without_noise(model):
    changed = [
        (layer, name, getattr(layer, name))
        for layer in model._flatten_layers()
        for kinds, names in _NOISE.items()
        if isinstance(layer, kinds)
        for name in names
    ]
    try:
        for layer, name, _ in changed:
            setattr(layer, name, 0.0)
        yield
    finally:
        for layer, name, value in changed:
            setattr(layer, name, value)


def _batches(data, batch_size):
    if hasattr(data, "shape"):
        return (data[start : start + batch_size] for start in range(0, len(data), batch_size))
    if isinstance(data, keras.utils.PyDataset):
        return (data[index] for index in range(len(data)))
    if isinstance(data, (tuple, Mapping)) or not isinstance(data, Iterable):
        raise ValueError(
            "recalibrate_batch_norm: `data` must be an array of inputs or an iterable of batches. "
            f"Received: a {type(data).__name__}. Of arrays (x, y) pass x; several inputs or a "
            "dictionary of them go into a list of batches."
        )
    return iter(data)
