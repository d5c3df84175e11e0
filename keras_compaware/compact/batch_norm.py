"""Batch-normalisation statistics after kernels have been overwritten."""

import contextlib

import keras
import numpy as np


def recalibrate_batch_norm(model, data, steps=100, batch_size=128):
    """Estimates the moving statistics of all batch-normalisation layers again, from data.

    Overwriting kernels leaves the statistics stale. They are replaced by the plain averages of the
    batch statistics over `steps` batches (a moving average with momentum 1 - 1/k at batch k), with
    dropout switched off. Weights are not trained; only the statistics of this model change, and
    the model is returned.

    Args:
        model: A built Keras model.
        data: Array of inputs, or an iterable of batches: x, or (x, y, ...), of which x is used.
        steps: Integer of at least 1: number of batches, fewer if the data end before. Default 100.
        batch_size: Integer: batch size for an array. Default 128.

    Returns:
        The same model.

    Raises:
        ValueError: If `data` yields no batch.
    """
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if not layers:
        return model
    with _averaging(layers) as set_momentum, _without_dropout(model):
        number = 0
        for batch in _batches(data, batch_size):
            if number == steps:
                break
            number += 1
            set_momentum(1.0 - 1.0 / number)
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(inputs, training=True)
    if not number:
        raise ValueError("recalibrate_batch_norm: `data` yields no batch.")
    return model


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
def _without_dropout(model):
    kinds = (
        keras.layers.Dropout,
        keras.layers.AlphaDropout,
        keras.layers.GaussianDropout,
        keras.layers.SpatialDropout1D,
        keras.layers.SpatialDropout2D,
        keras.layers.SpatialDropout3D,
    )
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]
    rates = [layer.rate for layer in layers]
    try:
        for layer in layers:
            layer.rate = 0.0
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.rate = rate


def _batches(data, batch_size):
    if hasattr(data, "shape"):
        return (data[start : start + batch_size] for start in range(0, len(data), batch_size))
    if isinstance(data, keras.utils.PyDataset):
        return (data[index] for index in range(len(data)))
    if isinstance(data, (list, tuple)) and data and np.isscalar(data[0]):
        raise ValueError("recalibrate_batch_norm: `data` must hold batches of inputs.")
    return iter(data)
