"""The residual networks for small images, which the compression literature measures itself by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers


def resnet_cifar(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    depth: int = 20,
    width: int = 16,
    name: str = "resnet_cifar",
) -> keras.Model:
    """Builds the residual network for CIFAR-10: three stages of basic blocks.

    With 32x32x3 images and 10 classes the depths 20, 32 and 56 have 0.27, 0.47 and 0.86 million
    trainable parameters (K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image
    recognition", CVPR 2016, section 4.2). Where the shape changes, the shortcut is a 1x1
    convolution with batch normalisation (the paper's option B), where the paper's CIFAR networks
    subsample and pad with zeros: 2,752 parameters more at every depth. Convolutions have no bias
    and begin with He's normal distribution.

    Args:
        input_shape: (height, width, channels); any size will do.
        num_classes: number of classes, the length of the output.
        depth: weighted layers on the longest path, 6n + 2 for n blocks a stage: 8, 14, 20
            (default), 26, 32, ...
        width: filters of the first stage, at least 1; the second and the third have two and four
            times as many. Default 16.
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, num_classes), with
        the layers `stem_conv`, `stem_bn`, `stem_relu`; in every block `stage1_block1_conv1`,
        `_bn1`, `_relu1`, `_conv2`, `_bn2`, `_add`, `_relu2`, and `_shortcut_conv`, `_shortcut_bn`
        where the shape changes; `average`, `head`.

    Raises:
        ValueError: `depth` is not 6n + 2, or `width` is below 1.

    Example:
        >>> resnet_cifar((32, 32, 3), 10, depth=8).count_params()
        78714
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            "`depth` must be 6n + 2 for n blocks in each of three stages, such as 20, 32, 44 or "
            f"56. Received: {depth}"
        )
    if width < 1:
        raise ValueError(f"`width` must be at least 1. Received: {width}")
    inputs = keras.Input(tuple(input_shape), name="image")
    x = _convolution(inputs, width, 3, 1, "stem_conv")
    x = _normalisation(x, "stem_bn")
    x = layers.ReLU(name="stem_relu")(x)
    for stage in (1, 2, 3):
        for block in range(1, (depth - 2) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            x = _block(x, width * 2 ** (stage - 1), stride, f"stage{stage}_block{block}")
    x = layers.GlobalAveragePooling2D(name="average")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)


def resnet_20(
    input_shape: Sequence[int], num_classes: int, *, width: int = 16, name: str = "resnet_20"
) -> keras.Model:
    """Builds `resnet_cifar` of depth 20, three blocks a stage.

    Example:
        >>> resnet_20((32, 32, 3), 10).count_params()
        274042
    """
    return resnet_cifar(input_shape, num_classes, depth=20, width=width, name=name)


def resnet_32(
    input_shape: Sequence[int], num_classes: int, *, width: int = 16, name: str = "resnet_32"
) -> keras.Model:
    """Builds `resnet_cifar` of depth 32, five blocks a stage.

    Example:
        >>> resnet_32((32, 32, 3), 10).count_params()
        469370
    """
    return resnet_cifar(input_shape, num_classes, depth=32, width=width, name=name)


def resnet_56(
    input_shape: Sequence[int], num_classes: int, *, width: int = 16, name: str = "resnet_56"
) -> keras.Model:
    """Builds `resnet_cifar` of depth 56, nine blocks a stage.

    Example:
        >>> resnet_56((32, 32, 3), 10).count_params()
        860026
    """
    return resnet_cifar(input_shape, num_classes, depth=56, width=width, name=name)


def _block(x: Any, filters: int, stride: int, name: str) -> Any:
    """Two 3x3 convolutions beside a shortcut."""
    shortcut = x
    if stride > 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, 1, stride, f"{name}_shortcut_conv")
        shortcut = _normalisation(shortcut, f"{name}_shortcut_bn")
    x = _convolution(x, filters, 3, stride, f"{name}_conv1")
    x = _normalisation(x, f"{name}_bn1")
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = _convolution(x, filters, 3, 1, f"{name}_conv2")
    x = _normalisation(x, f"{name}_bn2")
    x = layers.Add(name=f"{name}_add")([x, shortcut])
    return layers.ReLU(name=f"{name}_relu2")(x)


def _convolution(x: Any, filters: int, size: int, stride: int, name: str) -> Any:
    return layers.Conv2D(
        filters,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)


def _normalisation(x: Any, name: str) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)
