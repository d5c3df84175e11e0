import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from keras_compaware import data
from keras_compaware.data import digits
from keras_compaware.data.store import ArrayStore


def test_every_digit_is_in_one_split_with_its_shades_scaled():
    splits = digits.read_digits()
    assert {name: images.shape for name, (images, _) in splits.items()} == {
        "train": (901, 8, 8, 1),
        "test": (896, 8, 8, 1),
    }
    raw, labels = load_digits(return_X_y=True)
    expected = sorted(
        (np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(raw, labels, strict=True)
    )
    received = sorted(
        (image.tobytes(), int(label))
        for images, split_labels in splits.values()
        for image, label in zip(images, split_labels, strict=True)
    )
    assert received == expected


def test_shades_reach_from_0_to_255_in_17_steps():
    images = digits.read_digits()["train"][0]
    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == [
        *(0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255)
    ]


def test_both_splits_have_all_classes_in_the_same_shares():
    train, test = (np.bincount(labels, minlength=10) for _, labels in digits.read_digits().values())
    assert set((train - test).tolist()) <= {0, 1}


def test_splits_keep_the_original_order():
    raw, labels = load_digits(return_X_y=True)
    zeros = np.flatnonzero(labels == 0)
    train_images, train_labels = digits.read_digits()["train"]
    received = train_images[train_labels == 0].reshape(-1, 64)
    expected = np.floor(raw[zeros[::2]] * 255 / 16 + 0.5)
    np.testing.assert_array_equal(received, expected)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        digits.read_digits()


def test_source_goes_through_the_store(tmp_path):
    store = ArrayStore(tmp_path)
    dataset = store.open(store.write(digits.source()), 0.0)
    images, labels = digits.read_digits()["test"]
    np.testing.assert_array_equal(dataset.test.images, images)
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert dataset.label_names == tuple("0123456789")


def test_the_builder_is_one_of_tensorflow_datasets(tmp_path):
    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    assert issubclass(data.Digits, tfds.core.GeneratorBasedBuilder)
    assert data.Digits is data.Digits
    builder = tfds.builder("digits", data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.info.disable_shuffling
    assert builder.info.supervised_keys == ("image", "label")
    assert str(builder.version) == digits.VERSION
    for split, (images, labels) in digits.read_digits().items():
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        np.testing.assert_array_equal([example["image"] for example in examples], images)
        np.testing.assert_array_equal([example["label"] for example in examples], labels)


def test_the_package_has_no_other_lazy_name():
    with pytest.raises(AttributeError, match="no attribute 'Letters'"):
        _ = data.Letters
