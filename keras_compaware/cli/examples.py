"""Training images that a program looks at: for sensitivities, statistics and ranges."""

from collections.abc import Iterator

import numpy as np
from absl import flags

from keras_compaware import data

_BATCH_SIZE = 64


def define_flags(purpose: str, default: int) -> None:
    """Defines --data, --data_dir and --examples.

    Args:
        purpose: What the data are for, a sentence.
        default: How many images are looked at.
    """
    flags.DEFINE_string("data", None, purpose)
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TensorFlow Datasets. Default: $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    flags.DEFINE_integer(
        "examples", default, "With --data: how many images are looked at.", lower_bound=1
    )


def batches() -> Iterator[np.ndarray]:
    """Yields the first training images, in the fixed random order of the data set."""
    values = flags.FLAGS
    dataset = data.load(values.data, data_dir=values.data_dir)
    images = dataset.train.images[: values.examples]
    for begin in range(0, len(images), _BATCH_SIZE):
        yield images[begin : begin + _BATCH_SIZE] * np.float32(1 / 255)
