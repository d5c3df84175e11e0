import warnings

import keras
import numpy as np
import pytest

from keras_compaware.data import Batches, FollowEpoch, Split, batches

NUM_EXAMPLES = 10


@pytest.fixture
def split():
    """Ten images of one pixel, whose label is their number and whose value is 25 times it."""
    labels = np.arange(NUM_EXAMPLES)
    return Split((labels * 25).astype(np.uint8).reshape(-1, 1, 1, 1), labels)


def labels_of(data):
    return [data[index][1].tolist() for index in range(len(data))]


def model_of_one_weight():
    model = keras.Sequential(
        [keras.Input((1, 1, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


class Recorder(Batches):
    """Notes the labels of every batch that is served between on_epoch_begin and on_epoch_end."""

    def __init__(self, *args, **kwargs):
        self.passes = []
        self.open = False
        super().__init__(*args, **kwargs)

    def on_epoch_begin(self):
        super().on_epoch_begin()
        self.passes.append([])
        self.open = True

    def on_epoch_end(self):
        super().on_epoch_end()
        self.open = False

    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        if self.open:
            self.passes[-1].append(labels.tolist())
        return images, labels

    def full_passes(self):
        return [served for served in self.passes if len(served) == len(self)]


def test_without_a_seed_the_order_is_kept_and_the_last_batch_is_smaller(split):
    data = batches(split, 4)
    assert len(data) == 3
    assert labels_of(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    data.epoch = 5
    assert labels_of(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_images_are_float32_between_0_and_1_and_labels_int32(split):
    values = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    images, labels = batches(Split(values, np.arange(3)), 3)[0]
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_allclose(images.ravel(), [0, 0.2, 1], rtol=1e-6)
    assert images.max() == 1  # exactly, not a rounding above it
    images[:] = 0  # a copy: the split stays as it is
    assert values.max() == 255


def test_memory_maps_give_plain_arrays(split, tmp_path):
    np.save(tmp_path / "images.npy", split.images)
    mapped = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels)
    for seed in (None, 0):
        images, labels = batches(mapped, 4, seed=seed)[0]
        assert type(images) is np.ndarray
        assert type(labels) is np.ndarray


def test_a_seed_gives_every_epoch_an_order_of_its_own(split):
    data = batches(split, 4, seed=3)
    orders = []
    for epoch in range(3):
        data.epoch = epoch
        images, labels = (np.concatenate(part) for part in zip(*data, strict=True))
        assert sorted(labels) == list(range(NUM_EXAMPLES))
        np.testing.assert_allclose(images.ravel() * 255, labels * 25, rtol=1e-5)
        orders.append(labels.tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[0]) != orders[0]


def test_batches_are_a_function_of_seed_epoch_and_index_alone(split):
    first = batches(split, 4, seed=3, epoch=2)
    served = labels_of(first)
    second = batches(split, 4, seed=3)
    second.epoch = 7
    second[1]
    np.random.seed(1)
    second.epoch = 2
    assert [second[index][1].tolist() for index in (2, 0, 1)] == [served[i] for i in (2, 0, 1)]
    assert labels_of(batches(split, 4, seed=4, epoch=2)) != served


def test_the_order_does_not_change_from_release_to_release(split):
    assert np.concatenate(labels_of(batches(split, 4, seed=0, epoch=1))).tolist() == (
        [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]
    )


def test_augment_draws_from_seed_epoch_and_index(split):
    def shift(images, rng):
        return images + rng.uniform(size=(len(images), 1, 1, 1))

    def plain_and_shifted(epoch):
        plain = batches(split, 4, seed=3, epoch=epoch)
        shifted = batches(split, 4, seed=3, augment=shift, epoch=epoch)
        return [shifted[i][0] - plain[i][0] for i in range(3)]

    first, again, later = (plain_and_shifted(epoch) for epoch in (0, 0, 1))
    for a, b, c in zip(first, again, later, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3
    # The draws of a batch are no copy of the draws behind the order of the examples.
    same_stream = np.random.default_rng([3, 0, 0]).uniform(size=4)
    assert np.abs(first[0].ravel() - same_stream).max() > 1e-3
    images, _ = batches(split, 4, seed=3, augment=shift)[2]
    assert images.dtype == np.float32


@pytest.mark.parametrize("augment", [lambda x, rng: x[:1], lambda x, rng: x[..., 0]])
def test_augment_must_return_the_batch(split, augment):
    with pytest.raises(ValueError, match="batch of 4 images"):
        batches(split, 4, seed=0, augment=augment)[0]


def test_fit_sees_epoch_after_epoch_in_full(split):
    data = Recorder(split, 4, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model_of_one_weight().fit(data, epochs=3, shuffle=False, verbose=0)
    assert data.epoch == 3
    expected = [labels_of(batches(split, 4, seed=3, epoch=epoch)) for epoch in range(3)]
    assert data.full_passes() == expected


def test_a_resumed_fit_sees_what_the_uninterrupted_one_saw(split):
    expected = [labels_of(batches(split, 4, seed=3, epoch=epoch)) for epoch in range(4)]
    data = Recorder(split, 4, seed=3, epoch=2)
    model_of_one_weight().fit(data, initial_epoch=2, epochs=4, shuffle=False, verbose=0)
    assert data.full_passes() == expected[2:]

    following = Recorder(split, 4, seed=3)
    model_of_one_weight().fit(
        following,
        initial_epoch=2,
        epochs=4,
        shuffle=False,
        verbose=0,
        callbacks=[FollowEpoch(following)],
    )
    assert following.full_passes() == expected[2:]


def test_follow_epoch_holds_with_one_batch_and_an_evaluation_between(split):
    # One batch is where Keras's look at the first batch is a full pass by itself.
    data = Recorder(split, 100, seed=3)
    model = model_of_one_weight()
    callbacks = [FollowEpoch(data)]
    model.fit(data, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    model.evaluate(data, verbose=0)
    data.passes.clear()
    model.fit(data, initial_epoch=2, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
    expected = [labels_of(batches(split, 100, seed=3, epoch=epoch)) for epoch in (2, 3)]
    assert data.full_passes() == expected


def test_backup_and_restore_resumes_with_the_right_batches(split, tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(data, *callbacks):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        model_of_one_weight().fit(
            data,
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=[backup, FollowEpoch(data), *callbacks],
        )

    with pytest.raises(KeyboardInterrupt):
        run(Recorder(split, 4, seed=3), Crash())
    resumed = Recorder(split, 4, seed=3)
    run(resumed)
    expected = [labels_of(batches(split, 4, seed=3, epoch=epoch)) for epoch in (2, 3)]
    assert resumed.full_passes() == expected


def test_a_shuffling_fit_is_reported_once(split):
    data = batches(split, 1, seed=0)
    data.on_epoch_begin()
    data[0]
    with pytest.warns(UserWarning, match="shuffle=False"):
        data[3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data[1]


def test_on_epoch_end_counts_only_full_passes(split):
    data = batches(split, 4, seed=0)
    data.on_epoch_end()
    assert data.epoch == 0
    labels_of(data)  # read outside of a pass
    data.on_epoch_end()
    assert data.epoch == 0
    data.on_epoch_begin()
    data[0]
    data.on_epoch_end()
    assert data.epoch == 0
    data.on_epoch_begin()
    labels_of(data)
    data.on_epoch_end()
    assert data.epoch == 1


def test_a_pass_in_two_parts_counts_once(split):
    # What fit does when steps_per_epoch is smaller than the number of batches.
    data = batches(split, 4, seed=0)
    for part in ((0, 1), (2,)):
        assert data.epoch == 0
        data.on_epoch_begin()
        for index in part:
            data._shuffle_reported = True
            data[index]
        data.on_epoch_end()
    assert data.epoch == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be an integer"),
        ({"batch_size": True}, TypeError, "`batch_size` must be an integer"),
        ({"seed": -1}, ValueError, "`seed` must be from 0"),
        ({"seed": 2**32}, ValueError, "`seed` must be from 0"),
        ({"seed": "a"}, TypeError, "`seed` must be an integer"),
        ({"seed": 0, "epoch": -1}, ValueError, "`epoch` must be from 0"),
        ({"seed": 0, "augment": "flip"}, TypeError, "`augment` must be a function"),
        ({"augment": lambda images, rng: images}, ValueError, "needs a `seed`"),
    ],
)
def test_bad_arguments(split, kwargs, error, message):
    with pytest.raises(error, match=message):
        batches(split, **{"batch_size": 4, **kwargs})


def test_bad_splits_and_indices(split):
    with pytest.raises(TypeError, match="must be a Split"):
        batches(split.images, 4)
    with pytest.raises(ValueError, match="validation=0"):
        batches(Split(split.images[:0], split.labels[:0]), 4)
    with pytest.raises(IndexError, match="3 batches"):
        batches(split, 4)[3]
    assert batches(split, 4)[-1][1].tolist() == [8, 9]
    with pytest.raises(TypeError, match="must be a Batches"):
        FollowEpoch([1])
