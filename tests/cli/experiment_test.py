"""What an experiment makes of its configuration before anything is trained, and of its kernels."""

import keras
import numpy as np
import pytest

from keras_compaware import (
    Chain,
    GroupPruning,
    MagnitudePruning,
    UniformQuantization,
    compact,
    data,
    export,
)
from keras_compaware.cli.config import resolve
from keras_compaware.cli.experiment import Experiment, compressors_that_hold


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


@pytest.mark.parametrize(
    ("compressor", "encoded"),
    [
        (MagnitudePruning(0.9), {"a/kernel", "b/kernel"}),
        (Chain([MagnitudePruning(0.9), UniformQuantization(4)]), {"a/kernel", "b/kernel"}),
        (GroupPruning(0.5, "inputs"), {"a/kernel"}),  # the other has no zeros left
    ],
)
def test_kernels_that_lost_channels_are_stored_without_zeros(compressor, encoded, tmp_path):
    layers = [keras.layers.Dense(units, name=name) for units, name in ((60, "a"), (50, "b"))]
    model = keras.Sequential([keras.Input((40,)), *layers, keras.layers.Dense(3, name="head")])
    for layer in layers:
        layer.kernel.assign(compressor(layer.kernel.value))
    unread = np.arange(60)[:, None] % 4 == 0  # besides those that nothing reads already
    layers[1].kernel.assign(np.where(unread, 0.0, keras.ops.convert_to_numpy(layers[1].kernel)))
    compacted = compact(model)
    assert [row.name for row in compacted.channels] == ["a"]
    compressors = {"a/kernel": compressor, "b/kernel": compressor}
    held = compressors_that_hold(compacted, compressors)
    assert set(held) == encoded
    path = tmp_path / "codes.safetensors"
    export.save_codes(compacted.whole, held, path)
    present = [keras.ops.convert_to_numpy(w) for w in compacted.whole.weights]
    export.load_codes(path, compacted.whole)
    for before, after in zip(present, compacted.whole.weights, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(after), before, atol=1e-6)
    whole = export.save_codes(compacted.whole, {}, tmp_path / "whole.safetensors")
    assert path.stat().st_size < whole.bytes
