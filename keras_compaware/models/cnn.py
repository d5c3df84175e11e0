"""A small convolutional network in the present style."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers


def small_cnn(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    filters: Sequence[int] = (32, 64, 128),
    units: int = 128,
    dropout: float = 0.0,
    name: str = "small_cnn",
) -> keras.Model:
    """Builds convolution, batch normalisation and ReLU in blocks, with pooling between them.

    With 28x28x1 images and 10 classes it has 111,146 parameters. Poolings round up, so images of
    any size will do.

    Args:
        input_shape: (height, width, channels).
        num_classes: number of classes, the length of the output.
        filters: filters of the 3x3 convolutions, one block each; default (32, 64, 128).
        units: width of the hidden layer after the average over the image; default 128.
        dropout: fraction of the hidden units dropped in training, in [0, 1); default 0.
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, num_classes), with
        the layers `conv1`, `bn1`, `relu1`, `pool1`, `conv2`, ..., `average`, `dense1`, `head`.

    Raises:
        ValueError: `filters` is empty, or `dropout` is out of its range.

    Example:
        >>> small_cnn((28, 28, 1), 10).count_params()
        111146
    """
    if not filters:
        raise ValueError("`filters` needs at least one block. Received: none")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1). Received: {dropout}")
    x = inputs = keras.Input(tuple(input_shape), name="image")
    for number, count in enumerate(filters, start=1):
        if number > 1:
            x = layers.MaxPooling2D(2, padding="same", name=f"pool{number - 1}")(x)
        x = layers.Conv2D(count, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        # Keras's momentum of 0.99 suits runs of many thousand steps; here runs may be short.
        x = layers.BatchNormalization(momentum=0.9, name=f"bn{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    x = layers.Dense(units, activation="relu", name="dense1")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout1")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)
