"""MobileNetV2 for small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

# Filters, blocks and first stride of every stage. The first stage does not expand.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 3, 2), (96, 2, 1))
_STEM, _LAST = 32, 384
_CONVOLUTION: dict[str, Any] = {"use_bias": False, "kernel_initializer": "he_normal"}


def mobilenet_v2_small(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    alpha: float = 1.0,
    expansion: int = 6,
    dropout: float = 0.0,
    name: str = "mobilenet_v2_small",
) -> keras.Model:
    """Builds inverted residuals with linear bottlenecks, in two halvings instead of five.

    The blocks are those of M. Sandler et al., "MobileNetV2: Inverted residuals and linear
    bottlenecks", CVPR 2018: a 1x1 convolution to more channels, a depthwise 3x3 convolution, both
    with ReLU6, and a 1x1 convolution back to few; with a shortcut where the shape stays. There are
    fewer of them, and a 32x32 image is 8x8 pixels in the end. With 32x32x3 images and 10 classes
    it has 424,202 parameters.

    Args:
        input_shape: (height, width, channels); any size will do.
        num_classes: number of classes, the length of the output.
        alpha: positive factor on the filters of every layer, which are then rounded to multiples
            of 8, at least 8, and not down by more than a tenth; the last convolution is not made
            narrower below 1. Default 1.
        expansion: channels inside a block over those that enter it, at least 1; default 6.
        dropout: fraction of the averages dropped in training, in [0, 1); default 0.
        name: the model's name.

    Returns:
        A model from (batch, height, width, channels) to probabilities (batch, num_classes), with
        the layers `stem_conv`, `stem_bn`, `stem_relu`; in every block `stage2_block1_expand`,
        `_expand_bn`, `_expand_relu` (not in the first stage), `_depthwise`, `_depthwise_bn`,
        `_depthwise_relu`, `_project`, `_project_bn` and, where there is a shortcut, `_add`;
        `last_conv`, `last_bn`, `last_relu`, `average`, `head`.

    Raises:
        ValueError: `alpha`, `expansion` or `dropout` is out of its range.

    Example:
        >>> mobilenet_v2_small((32, 32, 3), 10, alpha=0.25, expansion=1).count_params()
        19074
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be a positive number. Received: {alpha}")
    if expansion < 1:
        raise ValueError(f"`expansion` must be at least 1. Received: {expansion}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1). Received: {dropout}")
    inputs = keras.Input(tuple(input_shape), name="image")
    x = layers.Conv2D(_scaled(_STEM, alpha), 3, padding="same", **_CONVOLUTION, name="stem_conv")(
        inputs
    )
    x = _normalised(x, "stem_bn", "stem_relu")
    for stage, (filters, num_blocks, stride) in enumerate(_STAGES, start=1):
        for block in range(1, num_blocks + 1):
            x = _inverted_residual(
                x,
                _scaled(filters, alpha),
                stride if block == 1 else 1,
                expansion if stage > 1 else 1,
                f"stage{stage}_block{block}",
            )
    x = layers.Conv2D(_scaled(_LAST, max(alpha, 1.0)), 1, **_CONVOLUTION, name="last_conv")(x)
    x = _normalised(x, "last_bn", "last_relu")
    x = layers.GlobalAveragePooling2D(name="average")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    outputs = layers.Dense(num_classes, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name=name)


def _inverted_residual(x: Any, filters: int, stride: int, expansion: int, name: str) -> Any:
    shortcut, channels = x, x.shape[-1]
    if expansion > 1:
        x = layers.Conv2D(expansion * channels, 1, **_CONVOLUTION, name=f"{name}_expand")(x)
        x = _normalised(x, f"{name}_expand_bn", f"{name}_expand_relu")
    x = layers.DepthwiseConv2D(
        3,
        strides=stride,
        padding="same",
        use_bias=False,
        depthwise_initializer="he_normal",
        name=f"{name}_depthwise",
    )(x)
    x = _normalised(x, f"{name}_depthwise_bn", f"{name}_depthwise_relu")
    x = layers.Conv2D(filters, 1, **_CONVOLUTION, name=f"{name}_project")(x)
    x = _normalised(x, f"{name}_project_bn")
    if stride == 1 and channels == filters:
        x = layers.Add(name=f"{name}_add")([x, shortcut])
    return x


def _normalised(x: Any, name: str, activation: str | None = None) -> Any:
    x = layers.BatchNormalization(momentum=0.9, name=name)(x)
    return x if activation is None else layers.ReLU(max_value=6.0, name=activation)(x)


def _scaled(filters: int, alpha: float) -> int:
    """Returns `alpha * filters` as a multiple of 8 that is at least nine tenths of it."""
    rounded = max(8, int(alpha * filters + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * alpha * filters else rounded
