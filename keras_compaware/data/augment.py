"""Random changes of training images, in NumPy and so the same on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from keras_compaware.data.batching import Augmentation

__all__ = ["AUGMENTATIONS", "flip_crop"]


def flip_crop(images: np.ndarray, rng: np.random.Generator, *, padding: int = 4) -> np.ndarray:
    """Pads images by zeros, cuts out a window of the former size, and mirrors half of them.

    It is the augmentation of small images since C.-Y. Lee et al., "Deeply-supervised nets", 2015.
    Every image has a window of its own, uniform over the `(2 padding + 1) ** 2` places, and is
    mirrored left to right with probability 1/2. As the `augment` of `Batches`, what an example
    becomes is a function of the seed, the epoch and the example's place in that epoch.

    Args:
        images: array (n, height, width, channels) of any type.
        rng: where the randomness comes from.
        padding: pixels added on each side, at least 0; default 4.

    Returns:
        A new array of the same shape and type.

    Raises:
        ValueError: the images have another rank, or `padding` is negative.

    Example:
        >>> images = np.ones((2, 3, 3, 1), "float32")
        >>> out = flip_crop(images, np.random.default_rng(0), padding=1)
        >>> out[1, :, :, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 0]]
    """
    if images.ndim != 4:
        raise ValueError(
            f"`images` must have the shape (n, height, width, channels). Received: {images.shape}"
        )
    if padding < 0:
        raise ValueError(f"`padding` must be at least 0. Received: {padding}")
    number, height, width, _ = images.shape
    tops, lefts = rng.integers(0, 2 * padding + 1, size=(2, number))
    mirrored = rng.random(number) < 0.5
    sides = (padding, padding)
    padded = np.pad(images, ((0, 0), sides, sides, (0, 0)))
    rows = tops[:, np.newaxis] + np.arange(height)
    columns = np.where(mirrored[:, np.newaxis], np.arange(width)[::-1], np.arange(width))
    columns = columns + lefts[:, np.newaxis]
    examples = np.arange(number)[:, np.newaxis, np.newaxis]
    return padded[examples, rows[:, :, np.newaxis], columns[:, np.newaxis, :]]


AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType({"flip_crop": flip_crop})
"""The augmentations that a configuration can name."""
