"""A convolutional network of one-dimensional kernels."""

from collections.abc import Sequence

import keras
from keras import layers


def decomposed(
    input_shape: Sequence[int], num_classes: int, *, filters: Sequence[int] = (16, 32, 64)
) -> keras.Model:
    """Builds blocks of a 3 x 1 and a 1 x 3 convolution with a ReLU in between.

    That is how DecomposeMe (Alvarez & Petersson, 2016) makes a network of 1-D kernels, which
    Alvarez & Salzmann (2017) train with their regularizer. Here the first convolution of a block
    halves the height and the second one the width; batch normalisation follows the pair.

    Args:
        input_shape: (height, width, channels).
        num_classes: Number of classes, the length of the output.
        filters: Filters of both convolutions, block by block.
    """
    x = inputs = keras.Input(tuple(input_shape), name="image")
    for number, count in enumerate(filters, start=1):
        x = layers.Conv2D(
            count, (3, 1), (2, 1), padding="same", activation="relu", name=f"vertical{number}"
        )(x)
        x = layers.Conv2D(
            count, (1, 3), (1, 2), padding="same", use_bias=False, name=f"horizontal{number}"
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"bn{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name="decomposed")
