"""Image classification data for the programs: one path for all backends.

`load` turns a TensorFlow Datasets set, or the digits that come with scikit-learn, into arrays on
disk; `batches` gives them to `fit`. Importing this package imports neither TensorFlow nor
TensorFlow Datasets. `Digits`, the TFDS builder of the digits, is made when it is first asked for.
"""

from __future__ import annotations

from typing import Any

from keras_compaware.data.augment import AUGMENTATIONS, flip_crop
from keras_compaware.data.batching import Augmentation, Batches, FollowEpoch, batches
from keras_compaware.data.dataset import Dataset, Split
from keras_compaware.data.loading import load

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Batches",
    "Dataset",
    "FollowEpoch",
    "Split",
    "batches",
    "flip_crop",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "Digits":
        from keras_compaware.data.digits import builder_class

        return builder_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
