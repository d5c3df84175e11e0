"""The handwritten digits that come with scikit-learn: real images without a download.

1797 images of 8x8 pixels in 17 shades (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998, its test set).
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from keras_compaware.data.store import Source, SplitSource

NAME = "digits"
VERSION = "1.0.0"
NUM_CLASSES = 10
IMAGE_SHAPE = (8, 8, 1)
LABEL_NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the digits as `{"train": (images, labels), "test": (images, labels)}`.

    The shades 0 to 16 become 0 to 255. Of each class every second example goes to the test split,
    so both have all classes in the same shares; within a split the original order is kept.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The data set "digits" comes with scikit-learn, which is not installed here: '
            "pip install scikit-learn"
        ) from error
    data, labels = load_digits(return_X_y=True)
    images = (data.reshape(-1, *IMAGE_SHAPE).astype(np.int32) * 255 + 8) // 16
    in_test = np.zeros(len(labels), dtype=bool)
    for digit in range(NUM_CLASSES):
        in_test[np.flatnonzero(labels == digit)[1::2]] = True
    return {
        split: (images[chosen].astype(np.uint8), labels[chosen].astype(np.int32))
        for split, chosen in (("train", ~in_test), ("test", in_test))
    }


def source() -> Source:
    """Returns the digits for the array store, without TensorFlow."""
    splits = read_digits()
    digest = hashlib.sha256()
    for images, labels in splits.values():
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
    readers = {
        split: SplitSource(len(pair[1]), functools.partial(iter, (pair,)))
        for split, pair in splits.items()
    }
    return Source(
        name=NAME,
        version=VERSION,
        fingerprint=digest.hexdigest(),
        num_classes=NUM_CLASSES,
        label_names=LABEL_NAMES,
        image_shape=IMAGE_SHAPE,
        train=readers["train"],
        test=readers["test"],
        test_split="test",
    )


@functools.cache
def builder_class() -> type:
    """Returns the TensorFlow Datasets builder `Digits`; the first call registers it.

    After that `tfds.load("digits")` knows it too.

    Raises:
        ModuleNotFoundError: TensorFlow Datasets is not installed.
    """
    import tensorflow_datasets as tfds

    class Digits(tfds.core.GeneratorBasedBuilder):
        """The handwritten digits of scikit-learn, 8x8, half for training and half for testing."""

        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES = {str(VERSION): "First release."}  # noqa: RUF012 (the name TFDS looks for)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Handwritten digits, 8x8 pixels, as they come with scikit-learn.",
                homepage="https://archive.ics.uci.edu/dataset/80",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=IMAGE_SHAPE),
                        "label": tfds.features.ClassLabel(names=LABEL_NAMES),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            del dl_manager  # nothing is downloaded
            return {
                split: self._generate_examples(images, labels)
                for split, (images, labels) in read_digits().items()
            }

        def _generate_examples(self, images: np.ndarray, labels: np.ndarray):
            for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield key, {"image": image, "label": int(label)}

    return Digits
