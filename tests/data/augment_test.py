"""The standard augmentation of small images: what it makes of them, and when."""

import keras
import numpy as np
import pytest

from keras_compaware.data import AUGMENTATIONS, Batches, FollowEpoch, Split, batches, flip_crop


def rng(seed=0):
    return np.random.default_rng(seed)


def candidates(image, padding):
    """All that an image can become, by plain loops: {(top, left, mirrored): image}."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[top : top + height, left : left + width]
            found[top, left, False] = window
            found[top, left, True] = window[:, ::-1]
    return found


@pytest.fixture
def split():
    images = rng(7).integers(0, 256, size=(10, 8, 8, 3)).astype(np.uint8)
    return Split(images, np.arange(10))


def epoch_of(data, epoch):
    data.epoch = epoch
    images, labels = zip(*data, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_each_image_is_a_window_of_the_padded_one_and_all_are_equally_likely():
    image = np.arange(1, 13).reshape(3, 4, 1)
    known = {window.tobytes(): place for place, window in candidates(image, 1).items()}
    assert len(known) == 18
    number = 3600
    out = flip_crop(np.repeat(image[np.newaxis], number, axis=0), rng(), padding=1)
    assert out.shape == (number, 3, 4, 1)
    counts = dict.fromkeys(known.values(), 0)
    for window in out:
        counts[known[window.tobytes()]] += 1  # a KeyError for anything but a window
    # 200 expected; the standard deviation of a count is 14.
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


def test_the_default_padding_is_four():
    image = rng().integers(1, 256, size=(9, 9, 1)).astype(np.uint8)
    known = {window.tobytes(): place for place, window in candidates(image, 4).items()}
    out = flip_crop(np.repeat(image[np.newaxis], 2000, axis=0), rng(1))
    places = [known[window.tobytes()] for window in out]
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(9))


def test_images_of_a_batch_are_changed_independently():
    out = flip_crop(np.repeat(rng().random((1, 6, 6, 2)), 50, axis=0), rng())
    assert len({image.tobytes() for image in out}) > 30


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_channels_stay_together_and_the_input_stays_as_it_is(dtype):
    images = rng().integers(0, 80, size=(20, 5, 7, 1)).astype(dtype)
    images = np.concatenate([images, 2 * images, 3 * images], axis=-1)
    before = images.copy()
    out = flip_crop(images, rng(), padding=2)
    assert out.dtype == images.dtype
    assert out.shape == images.shape
    np.testing.assert_array_equal(out[..., 1], 2 * out[..., 0])
    np.testing.assert_array_equal(out[..., 2], 3 * out[..., 0])
    out[:] = 0
    np.testing.assert_array_equal(images, before)


def test_without_padding_images_are_mirrored_only():
    images = rng().random((40, 4, 4, 1))
    out = flip_crop(images, rng(), padding=0)
    same = [np.array_equal(a, b) for a, b in zip(out, images, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(mirrored) < 30


def test_it_does_not_change_from_release_to_release():
    image = np.arange(1, 10).reshape(1, 3, 3, 1)
    out = flip_crop(np.repeat(image, 3, axis=0), rng([0, 1, 2]), padding=1)
    assert out[..., 0].tolist() == [
        [[2, 1, 0], [5, 4, 0], [8, 7, 0]],
        [[6, 5, 4], [9, 8, 7], [0, 0, 0]],
        [[0, 0, 0], [0, 3, 2], [0, 6, 5]],
    ]


@pytest.mark.parametrize(
    ("images", "padding", "message"),
    [(np.ones((4, 4, 3)), 4, r"Received: \(4, 4, 3\)"), (np.ones((1, 4, 4, 3)), -1, "`padding`")],
)
def test_bad_arguments(images, padding, message):
    with pytest.raises(ValueError, match=message):
        flip_crop(images, rng(), padding=padding)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_batches_change_with_seed_and_epoch_alone_and_keep_their_labels(split, name):
    def data(**kwargs):
        return batches(split, 4, **{"seed": 3, "augment": AUGMENTATIONS[name], **kwargs})

    first = data()
    epochs = [epoch_of(first, epoch) for epoch in range(3)]
    for epoch, (images, labels) in enumerate(epochs):
        plain, order = epoch_of(batches(split, 4, seed=3), epoch)
        np.testing.assert_array_equal(labels, order)
        assert images.shape == plain.shape
        assert images.dtype == np.float32
        assert 0 <= images.min() <= images.max() <= 1
        for image, source in zip(images, plain, strict=True):
            assert any(np.array_equal(image, window) for window in candidates(source, 4).values())
    # The same example is another image in the next epoch, and with another seed.
    by_label = [images[np.argsort(labels)] for images, labels in epochs]
    assert not np.array_equal(by_label[0], by_label[1])
    images, labels = epoch_of(data(seed=4), 0)
    assert not np.array_equal(by_label[0], images[np.argsort(labels)])
    # Whatever was read before, and by whichever object.
    again = data(epoch=2)
    np.random.seed(1)
    for index in (2, 0, 1):
        images = again[index][0]
        np.testing.assert_array_equal(images, epochs[2][0][4 * index : 4 * index + 4])


class Recorder(Batches):
    """Notes every batch that is served, by its epoch and its index."""

    def __init__(self, *args, **kwargs):
        self.seen = {}
        super().__init__(*args, **kwargs)

    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        self.seen[self.epoch, index] = images
        return images, labels


def test_a_resumed_fit_sees_the_images_that_the_uninterrupted_one_saw(split):
    def run(initial_epoch):
        data = Recorder(split, 4, seed=3, augment=flip_crop)
        model = keras.Sequential(
            [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(10)]
        )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(
            data,
            initial_epoch=initial_epoch,
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=[FollowEpoch(data)],
        )
        return data.seen

    whole, resumed = run(0), run(2)
    late = {(epoch, index) for epoch in (2, 3) for index in range(3)}
    # Before its first epoch `fit` has a look at batches of whatever epoch is set.
    assert {key for key in resumed if key[0] > 0} == {key for key in whole if key[0] > 1} == late
    for key in late:
        np.testing.assert_array_equal(resumed[key], whole[key])
