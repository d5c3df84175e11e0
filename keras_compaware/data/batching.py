"""Batches of a split for `fit`, `evaluate` and `predict`, the same on every backend."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_compaware.data.dataset import Split

__all__ = ["Augmentation", "Batches", "FollowEpoch", "batches"]

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_SCALE = np.float32(1 / 255)
_MAX_SEED = 2**32 - 1


class Batches(keras.utils.PyDataset):
    """A split in batches: float32 images in [0, 1] and int32 labels.

    Batch `i` of epoch `e` is a function of `(seed, e, i)` alone: it depends neither on the backend
    nor on what was read before. So a run that is interrupted and resumed at epoch `e` sees the
    batches that it would have seen, when the epoch is right (the argument `epoch`, the attribute
    `epoch`, or the callback `FollowEpoch`) and `fit` is called with `shuffle=False`: with its
    default, `fit` shuffles the order of the batches once more, by Python's global generator.

    `on_epoch_end` goes on to the next epoch once every batch of this one has been served; Keras
    calls it at other moments as well (before training, after a look at the first batch), which
    count for nothing here. Evaluating on the same object is a pass over it too: give `evaluate`
    an object of its own.

    Args:
        split: the examples; at least one.
        batch_size: examples a batch, at least 1. The last batch may be smaller.
        seed: 0 to 2**32 - 1: examples are drawn in a new order each epoch. None (default): they
            keep their order.
        augment: None (default), or a function `(images, rng) -> images` from a float32 batch
            (n, height, width, channels) to one of n images, whose randomness comes from `rng`, a
            `numpy.random.Generator` of this batch of this epoch. Needs a seed.
        epoch: the epoch to begin with, from 0 (default).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range, the split is empty, or `augment` comes
            without a seed.

    Example:
        >>> import numpy as np
        >>> split = Split(np.full((5, 8, 8, 1), 255, "uint8"), np.arange(5))
        >>> train = Batches(split, 2, seed=0)
        >>> len(train)
        3
        >>> images, labels = train[2]
        >>> images.shape, images.dtype.name, float(images.max()), labels.dtype.name
        ((1, 8, 8, 1), 'float32', 1.0, 'int32')
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: Augmentation | None = None,
        epoch: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(split, Split):
            raise TypeError(f"`split` must be a Split. Received: {type(split).__name__}")
        if not len(split):
            raise ValueError(
                "`split` holds no examples, so it has no batches. A validation split is empty "
                "when the data set was loaded with validation=0."
            )
        if augment is not None and not callable(augment):
            raise TypeError(
                "`augment` must be a function (images, rng) -> images. "
                f"Received: {type(augment).__name__}"
            )
        if augment is not None and seed is None:
            raise ValueError("`augment` draws random numbers, so it needs a `seed`: pass seed=0.")
        self.split = split
        self.batch_size = _integer("batch_size", batch_size, minimum=1)
        self.seed = None if seed is None else _integer("seed", seed, 0, _MAX_SEED)
        self.augment = augment
        self._shuffle_reported = False
        self.epoch = epoch

    @property
    def epoch(self) -> int:
        """The epoch whose batches are served; set it to serve those of another one."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = _integer("epoch", value, 0, _MAX_SEED)
        self._served = np.zeros(len(self), dtype=bool)
        self._within_epoch = False
        self._previous = -1
        self._order = None
        if self.seed is not None:
            self._order = self._generator(0).permutation(len(self.split))

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `index` of the present epoch: images (n, height, width, channels), labels.

        Raises:
            IndexError: there is no batch of that index.
            ValueError: `augment` returned another number of images.
        """
        index = operator.index(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received the index {index}.")
        self._record(index)
        examples: Any = slice(index * self.batch_size, (index + 1) * self.batch_size)
        if self._order is not None:
            examples = self._order[examples]
        images = self.split.images[examples] * _SCALE
        labels = np.asarray(self.split.labels[examples], dtype=np.int32)
        if self.augment is not None:
            images = np.asarray(self.augment(images, self._generator(index + 1)), dtype=np.float32)
            if images.ndim != 4 or len(images) != len(labels):
                raise ValueError(
                    f"`augment` must return a batch of {len(labels)} images of rank 4. "
                    f"Received the shape {images.shape}."
                )
        return np.asarray(images), labels

    def on_epoch_begin(self) -> None:
        """Notes that the batches that follow belong to a pass over the data."""
        self._within_epoch = True
        self._previous = -1

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch, if every batch of this one has been served."""
        if self._served.all():
            self.epoch += 1
        self._within_epoch = False

    def _generator(self, stream: int) -> np.random.Generator:
        # Three words always: seed sequences of different lengths are padded with zeros and clash.
        return np.random.default_rng([self.seed, self._epoch, stream])

    def _record(self, index: int) -> None:
        if not self._within_epoch:
            return
        if index not in (0, self._previous, self._previous + 1) and not self._shuffle_reported:
            self._shuffle_reported = True
            warnings.warn(
                f"Batch {index} was asked for after batch {self._previous}: `fit` shuffles the "
                "order of the batches by a generator that a resumed run cannot repeat. Call it "
                "with shuffle=False; the examples are reshuffled each epoch all the same, by the "
                "`seed`.",
                stacklevel=2,
            )
        self._previous = index
        self._served[index] = True


class FollowEpoch(keras.callbacks.Callback):
    """Serves the batches of the epoch that `fit` is in, also after a restart.

    At the beginning of epoch e it sets `batches.epoch = e`. So a run that begins with
    `initial_epoch`, or that `keras.callbacks.BackupAndRestore` takes up again, continues with the
    batches that it would have seen.

    Args:
        batches: the training batches given to the same `fit`.

    Raises:
        TypeError: `batches` is not a `Batches`.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((4, 8, 8, 1), "uint8"), np.arange(4))
        >>> train = batches(split, 2, seed=0)
        >>> FollowEpoch(train).on_epoch_begin(7)
        >>> train.epoch
        7
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        if not isinstance(batches, Batches):
            raise TypeError(f"`batches` must be a Batches. Received: {type(batches).__name__}")
        self.batches = batches

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the epoch of the batches, before the first of them is read."""
        self.batches.epoch = epoch


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int | None = None,
    augment: Augmentation | None = None,
    epoch: int = 0,
) -> Batches:
    """Returns the split in batches; the arguments are those of `Batches`.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((4, 8, 8, 1), "uint8"), np.arange(4))
        >>> [labels.tolist() for _, labels in batches(split, 3)]
        [[0, 1, 2], [3]]
    """
    return Batches(split, batch_size, seed=seed, augment=augment, epoch=epoch)


def _integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Received: {value!r}")
    if number < minimum or (maximum is not None and number > maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"`{name}` must be {limits}. Received: {number}")
    return number
