import dataclasses

import numpy as np
import pytest

from keras_compaware.data import Dataset, Split

IMAGES = np.zeros((3, 4, 5, 1), np.uint8)
LABELS = np.array([0, 1, 0])


def test_split_has_a_length_a_truth_value_and_a_short_repr():
    split = Split(IMAGES, LABELS)
    assert len(split) == 3
    assert not Split(IMAGES[:0], LABELS[:0])
    assert repr(split) == "Split(3 examples, image (4, 5, 1))"


def test_dataset_is_frozen_and_its_repr_names_the_split_that_is_tested_on():
    split = Split(IMAGES, LABELS)
    dataset = Dataset("a", "1.0.0", split, split, split, 2, (4, 5, 1), ("x", "y"), "validation")
    assert repr(dataset) == (
        "Dataset(a 1.0.0: 3 train, 3 validation, 3 validation; image (4, 5, 1), 2 classes)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "b"


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES.astype("float32"), LABELS, TypeError, "uint8.*float32"),
        (IMAGES.tolist(), LABELS, TypeError, "uint8.*list"),
        (IMAGES, LABELS.astype("float64"), TypeError, "integers.*float64"),
        (IMAGES, [0, 1, 0], TypeError, "integers.*list"),
        (IMAGES[..., 0], LABELS, ValueError, r"\(num_examples, .*\(3, 4, 5\)"),
        (IMAGES, LABELS[:2], ValueError, r"\(3,\).*\(2,\)"),
        (IMAGES, LABELS[:, None], ValueError, r"\(3,\).*\(3, 1\)"),
    ],
)
def test_split_refuses(images, labels, error, message):
    with pytest.raises(error, match=message):
        Split(images, labels)
