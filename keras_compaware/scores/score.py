"""What a score of channels is, and what scores share."""

import re
from collections.abc import Iterable

import keras
import numpy as np

from keras_compaware.base import Value, check_choice
from keras_compaware.coupling import ChannelSpace, analyse

_NORMALIZE = ("mean", "max", None)


class ChannelScore(Value):
    """Mixin for frozen dataclasses: a number for every channel; larger ones matter more.

    Subclasses have a field `normalize` and define `raw`.
    """

    normalize = "mean"

    def __post_init__(self):
        check_choice(type(self).__name__, "normalize", self.normalize, _NORMALIZE)

    def __call__(
        self, model: keras.Model, spaces: Iterable[ChannelSpace] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the scores of all channels, without changing the model.

        Args:
            model: A Sequential or functional model, nested ones included.
            spaces: Channel spaces of this model, of which the free ones are scored. Default: those
                of `channel_spaces(model)`.

        Returns:
            Dict from the name of a space to a float64 array (size of the space,). With
            `normalize` the scores of each space are divided by their mean or maximum, so that
            spaces can be compared; scores that are all zero stay so.

        Raises:
            TypeError: If `model` is not a Keras model, or `spaces` are no channel spaces.
            ValueError: If the model has no static graph, a space has nothing that could be
                scored, or a score is not finite.
        """
        spaces = _free(self, analyse(model).spaces if spaces is None else spaces)
        found = self.raw(model, spaces)
        scores = {}
        for space in spaces:
            scores[space.name] = values = self._normalized(np.asarray(found[space.name], float))
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{type(self).__name__}: the scores of the channel space '{space.name}' are "
                    "not finite, because its weights or the data are not. Train again from the "
                    "last checkpoint without NaN."
                )
        return scores

    def raw(self, model, spaces):
        """Returns the scores before they are normalized.

        Args:
            model: The model.
            spaces: Its free `ChannelSpace`s, a tuple.

        Returns:
            Dict from the name of a space to an array (size of the space,).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define raw.")

    def _normalized(self, values):
        if self.normalize is None:
            return values
        unit = values.mean() if self.normalize == "mean" else values.max()
        return values if unit == 0 else values / unit


def _free(score, spaces):
    spaces = tuple(spaces)
    for space in spaces:
        if not isinstance(space, ChannelSpace):
            raise TypeError(
                f"{type(score).__name__}: `spaces` must be channel spaces, as of "
                f"`channel_spaces(model)`. Received one {type(space).__name__}."
            )
    return tuple(space for space in spaces if space.frozen is None)


def kernels(score, space, roles=("producer", "consumer")):
    """Returns the members of a space that are kernels, and in these roles.

    Raises:
        ValueError: If there is none.
    """
    members = [m for m in space.members if m.role in roles and is_kernel(m.variable)]
    if not members:
        raise ValueError(
            f"{type(score).__name__}: the channel space '{space.name}' has no kernel as "
            f"{' or '.join(roles)}, so its channels have no score. {leave_out(space)}."
        )
    return members


def is_kernel(variable):
    """Whether a weight has two or more axes and is no bias (that of attention has two)."""
    return len(variable.shape) > 1 and variable.name != "bias"


def leave_out(space):
    """Returns the advice how to choose channels without a space."""
    return f"Leave it out: `choose_channels(..., exclude='^{re.escape(space.name)}$')`"


def sum_over_slices(members, size, values_of):
    """Adds up the entries of the slices that belong to each channel, each entry once.

    Args:
        members: `Member`s of one space; the same weight may stand there along several axes.
        size: Number of channels.
        values_of: Function from a variable to a float64 array of its shape.

    Returns:
        Float64 array (size,).
    """
    total, seen = np.zeros(size), {}
    for member in members:
        values, axis = values_of(member.variable), member.axis
        for other_axis, other in seen.get(id(member.variable), ()):
            # A layer that adds to its own input: row c and column c share an entry.
            shape = [[-1 if i == a else 1 for i in range(values.ndim)] for a in (axis, other_axis)]
            same = member.index_map.reshape(shape[0]) == other.reshape(shape[1])
            values = np.where(same, 0.0, values)
        seen.setdefault(id(member.variable), []).append((axis, member.index_map))
        sums = values.sum(axis=tuple(i for i in range(values.ndim) if i != axis))
        total += per_channel(sums, member.index_map, size)
    return total


def per_channel(values, index_map, size):
    """Returns for each channel the sum of the values (n,) of its entries; -1 has no channel."""
    own = index_map >= 0
    return np.bincount(index_map[own], weights=values[own], minlength=size)


def array(variable):
    """Returns a weight as a float64 array."""
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


def label_table(analysis, spaces):
    """Returns `(place of the space, channel)` of every label; -1 for labels of other spaces."""
    number = sum(size for _, size, _ in analysis.flow.blocks)
    space_of, channel_of = np.full(number, -1), np.full(number, -1)
    for place, space in enumerate(spaces):
        channels, labels = analysis.labels[space.name]
        space_of[labels] = place
        channel_of[labels] = channels
    return space_of, channel_of


def shares_beyond(energies):
    """Returns the shares of a sum that lie beyond its first 0, 1, ..., all terms; 0 of nothing."""
    beyond = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return beyond / (beyond[0] if beyond[0] > 0 else 1.0)
