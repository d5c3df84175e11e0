"""What a loaded data set is: named splits of images and labels."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images and their labels, example by example.

    Args:
        images: array (num_examples, height, width, channels), uint8, values 0 to 255.
        labels: array (num_examples,), integers from 0.

    Raises:
        TypeError: the images are not uint8, or the labels are not integers.
        ValueError: the shapes are not the ones above, or the lengths differ.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((3, 8, 8, 1), "uint8"), np.array([0, 1, 0]))
        >>> len(split)
        3
        >>> split
        Split(3 examples, image (8, 8, 1))
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            received = getattr(images, "dtype", type(images).__name__)
            raise TypeError(
                f"`images` must be a uint8 NumPy array (0 to 255). Received: {received}"
            )
        if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer):
            received = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"`labels` must be a NumPy array of integers. Received: {received}")
        if images.ndim != 4:
            raise ValueError(
                "`images` must have the shape (num_examples, height, width, channels). "
                f"Received: {images.shape}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                "`labels` must have one entry an image, here the shape "
                f"{images.shape[:1]}. Received: {labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} examples, image {self.images.shape[1:]})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """An image classification data set, as `load` returns it.

    Args:
        name: the data set's name with its config, such as `"mnist"`.
        version: its version, such as `"3.0.1"`.
        train: what to train on; the held-out part is not in it.
        validation: the held-out part of the training split; empty (so false in an `if`) when
            nothing was held out.
        test: the test split, never mixed with the other two.
        num_classes: number of classes; labels are below it.
        image_shape: (height, width, channels).
        label_names: one name a class, in the order of the labels.
        test_split: the split of the source that `test` holds: `"test"`, or `"validation"` for a
            source that publishes no test split.
    """

    name: str
    version: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    test_split: str = "test"

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name} {self.version}: {len(self.train)} train, "
            f"{len(self.validation)} validation, {len(self.test)} {self.test_split}; "
            f"image {self.image_shape}, {self.num_classes} classes)"
        )
