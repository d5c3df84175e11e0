"""The two networks that the compression literature has measured itself by since 2015."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers


def lenet_300_100(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    units: Sequence[int] = (300, 100),
    name: str = "lenet_300_100",
) -> keras.Model:
    """Builds LeNet-300-100: two hidden layers on the flattened image.

    With 28x28x1 images and 10 classes it has 266,610 parameters (Y. LeCun, L. Bottou, Y. Bengio
    and P. Haffner, "Gradient-based learning applied to document recognition", 1998, with
    rectifiers, as in S. Han et al., "Learning both weights and connections for efficient neural
    networks", 2015).

    Args:
        input_shape: (height, width, channels).
        num_classes: number of classes, the length of the output.
        units: widths of the hidden layers; default (300, 100).
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, num_classes), with
        the layers `flatten`, `dense1`, `dense2`, ..., `head`.

    Example:
        >>> lenet_300_100((28, 28, 1), 10).count_params()
        266610
    """
    inputs = keras.Input(tuple(input_shape), name="image")
    x = layers.Flatten(name="flatten")(inputs)
    for number, width in enumerate(units, start=1):
        x = layers.Dense(width, activation="relu", name=f"dense{number}")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)


def lenet_5(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    filters: Sequence[int] = (20, 50),
    units: int = 500,
    padding: str = "valid",
    name: str = "lenet_5",
) -> keras.Model:
    """Builds LeNet-5 in the form that pruning papers use: 20 and 50 filters of 5x5, 500 units.

    With 28x28x1 images and 10 classes it has 431,080 parameters (S. Han et al., 2015, as above;
    the network of 1998 has 6 and 16 filters).

    Args:
        input_shape: (height, width, channels).
        num_classes: number of classes, the length of the output.
        filters: filters of the convolutions; default (20, 50).
        units: width of the hidden layer; default 500.
        padding: `"valid"` (default) or `"same"`, which also suits images smaller than 16x16.
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, num_classes), with
        the layers `conv1`, `pool1`, `conv2`, `pool2`, `flatten`, `dense1`, `head`.

    Raises:
        ValueError: the images are too small for these convolutions.

    Example:
        >>> lenet_5((28, 28, 1), 10).count_params()
        431080
    """
    if padding not in ("valid", "same"):
        raise ValueError(f'`padding` must be "valid" or "same". Received: {padding!r}')
    height, width, _ = sides = tuple(input_shape)
    for _ in filters:
        height, width = ((side - 4 * (padding == "valid")) // 2 for side in (height, width))
    if min(height, width) < 1:
        advice = 'padding="same", or ' if padding == "valid" else ""
        raise ValueError(
            f"Images of {sides[0]}x{sides[1]} pixels are too small for lenet_5 with "
            f'padding="{padding}": nothing would be left after its {len(filters)} convolutions and '
            f"poolings. Pass {advice}take small_cnn, which suits any size."
        )
    x = inputs = keras.Input(sides, name="image")
    for number, count in enumerate(filters, start=1):
        x = layers.Conv2D(count, 5, padding=padding, activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(2, name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(units, activation="relu", name="dense1")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)
