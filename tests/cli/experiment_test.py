"""What an experiment makes of its configuration before anything is trained."""

import numpy as np
import pytest

from keras_compaware import data
from keras_compaware.cli.config import resolve
from keras_compaware.cli.experiment import Experiment


@pytest.fixture
def experiment(monkeypatch):
    """Returns a function: configuration -> experiment on six images a split."""
    images = np.random.default_rng(0).integers(0, 256, size=(6, 8, 8, 1)).astype(np.uint8)
    split = data.Split(images, np.arange(6))
    dataset = data.Dataset("toy", "1.0.0", split, split, split, 6, (8, 8, 1), tuple("abcdef"))
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: dataset)
    return lambda config: Experiment(resolve(config))


def test_only_the_training_split_is_shuffled_and_augmented(experiment):
    augmented = experiment({"data": {"augment": "flip_crop"}, "batch_size": 6, "seed": 5})
    plain = experiment({"batch_size": 6, "seed": 5})
    for split in ("validation", "test"):
        images, labels = augmented.batches(split)[0]
        np.testing.assert_array_equal(images, plain.batches(split)[0][0])
        assert labels.tolist() == list(range(6))
    images, labels = augmented.batches("train")[0]
    same, order = plain.batches("train")[0]
    assert labels.tolist() == order.tolist() != list(range(6))
    assert not np.array_equal(images, same)
    expected = data.batches(augmented.dataset.train, 6, seed=5, augment=data.flip_crop)[0][0]
    np.testing.assert_array_equal(images, expected)
