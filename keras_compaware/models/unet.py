"""A small U-Net: a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers


def unet(
    input_shape: Sequence[int | None],
    num_classes: int,
    *,
    filters: Sequence[int] = (16, 32, 64),
    name: str = "unet",
) -> keras.Model:
    """Builds an encoder and a decoder with a bridge at every resolution.

    It is the network of O. Ronneberger, P. Fischer and T. Brox, "U-Net: Convolutional networks for
    biomedical image segmentation", MICCAI 2015, with fewer levels and filters, convolutions that
    keep the size, and batch normalisation. With 3 channels and 2 classes it has 118,018
    parameters.

    On the PyTorch backend train it with one-hot labels and `"categorical_crossentropy"`: there
    Keras 3.15 cannot differentiate the sparse loss for the probabilities of pixels.

    Args:
        input_shape: (height, width, channels); a side is a multiple of `2 ** (len(filters) - 1)`,
            or None: any such multiple.
        num_classes: number of classes of a pixel.
        filters: filters of every level from the full resolution to the lowest; default (16, 32,
            64). Each level after the first halves the sides.
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, height, width,
        num_classes), with the layers `down1_conv1`, `down1_bn1`, `down1_relu1`, `down1_conv2`,
        ..., `pool1`, `down2_conv1`, ...; `bottom_conv1`, ...; `up2_transpose`, `up2_concatenate`,
        `up2_conv1`, ..., `up1_transpose`, ...; `head`.

    Raises:
        ValueError: `filters` has fewer than two levels, or a side does not fit.

    Example:
        >>> unet((32, 48, 3), 2).output_shape
        (None, 32, 48, 2)
    """
    if len(filters) < 2:
        raise ValueError(f"`filters` needs at least two levels. Received: {tuple(filters)}")
    height, width, _ = sides = tuple(input_shape)
    multiple = 2 ** (len(filters) - 1)
    if any(side is not None and (side < 1 or side % multiple) for side in (height, width)):
        raise ValueError(
            f"Height and width must be multiples of {multiple}, for {len(filters)} levels halve "
            f"them {len(filters) - 1} times. Received: {height} and {width}. Resize or pad the "
            "images, or pass fewer `filters`."
        )
    x = inputs = keras.Input(sides, name="image")
    bridges = []
    for level, count in enumerate(filters[:-1], start=1):
        x = _convolutions(x, count, f"down{level}")
        bridges.append(x)
        x = layers.MaxPooling2D(2, name=f"pool{level}")(x)
    x = _convolutions(x, filters[-1], "bottom")
    for level in range(len(bridges), 0, -1):
        count = filters[level - 1]
        x = layers.Conv2DTranspose(count, 2, strides=2, name=f"up{level}_transpose")(x)
        x = layers.Concatenate(name=f"up{level}_concatenate")([bridges[level - 1], x])
        x = _convolutions(x, count, f"up{level}")
    outputs = layers.Conv2D(num_classes, 1, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)


def _convolutions(x: Any, filters: int, name: str) -> Any:
    for number in (1, 2):
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}_conv{number}",
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn{number}")(x)
        x = layers.ReLU(name=f"{name}_relu{number}")(x)
    return x
