"""Scores that need the weights only."""

import dataclasses
import zlib

import keras
import numpy as np

from keras_compaware.base import MOST_SEEDS, check_integer, register
from keras_compaware.scores.score import (
    ChannelScore,
    array,
    kernels,
    leave_out,
    per_channel,
    sum_over_slices,
)

_CHUNK = 1 << 22  # entries of a kernel that are multiplied at once, in float64


@register
@dataclasses.dataclass(frozen=True)
class L1(ChannelScore):
    """The sum of the absolute weights that are cut together with a channel.

    These are the slices of all kernels that write it and of all kernels that read it. Biases, and
    what stands in between (normalisation, depthwise kernels), are left out.

    Args:
        normalize: "mean" (default) or "max" divides the scores of each channel space by their mean
            or maximum, None does not.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, name="hidden"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> kernels = np.array([[3.0, -1.0]]), np.array([[4.0], [0.0]])
    >>> model.set_weights([kernels[0], np.ones(2), kernels[1], np.ones(1)])
    >>> L1(normalize=None)(model)
    {'hidden': array([7., 1.])}
    """

    normalize: str | None = "mean"

    def raw(self, model, spaces):
        return {
            space.name: sum_over_slices(
                kernels(self, space), space.size, lambda variable: np.abs(array(variable))
            )
            for space in spaces
        }


@register
@dataclasses.dataclass(frozen=True)
class L2(ChannelScore):
    """The Euclidean norm of the weights that are cut together with a channel, as of `L1`.

    Args:
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, name="hidden"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> kernels = np.array([[3.0, -1.0]]), np.array([[4.0], [0.0]])
    >>> model.set_weights([kernels[0], np.ones(2), kernels[1], np.ones(1)])
    >>> L2(normalize=None)(model)
    {'hidden': array([5., 1.])}
    """

    normalize: str | None = "mean"

    def raw(self, model, spaces):
        return {
            space.name: np.sqrt(
                sum_over_slices(
                    kernels(self, space), space.size, lambda variable: array(variable) ** 2
                )
            )
            for space in spaces
        }


@register
@dataclasses.dataclass(frozen=True)
class BatchNormScale(ChannelScore):
    """The absolute scale (gamma) of a channel in batch normalisation (Liu et al., 2017).

    Network Slimming trains with an L1 penalty on gamma and cuts channels of small |gamma|. Where
    several batch normalisations scale a channel, as along a residual stream, their mean counts.

    Args:
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, name="hidden"),
    ...         keras.layers.BatchNormalization(name="norm"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> _ = model.get_layer("norm").gamma.assign([-2.0, 0.5])
    >>> BatchNormScale(normalize=None)(model)
    {'hidden': array([2. , 0.5])}
    """

    normalize: str | None = "mean"

    def raw(self, model, spaces):
        gammas = {
            id(layer.gamma)
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.scale
        }
        return {space.name: self._mean(space, gammas) for space in spaces}

    def _mean(self, space, gammas):
        total, number = np.zeros(space.size), np.zeros(space.size)
        for member in space.members:
            if id(member.variable) in gammas:
                values = np.abs(array(member.variable))
                total += per_channel(values, member.index_map, space.size)
                number += per_channel(np.ones_like(values), member.index_map, space.size)
        if not number.all():
            which = "the" if not number.any() else f"{np.sum(number == 0)} of the {space.size}"
            raise ValueError(
                f"BatchNormScale: {which} channels of the space '{space.name}' pass through no "
                f"batch normalisation with a scale, so they have no score. {leave_out(space)}, or "
                "take another score."
            )
        return total / number


@register
@dataclasses.dataclass(frozen=True)
class GeometricMedian(ChannelScore):
    """How far a channel's filter is from the others of its space (FPGM, He et al., 2019).

        score_c = sum_d ||w_c - w_d||_2

    A filter near the geometric median of all is one that the others can stand in for. The filter
    of a channel is what all kernels that write it hold of it, behind each other; where one of them
    does not write a channel (of a concatenation), it counts as zero.

    Args:
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(3, name="hidden"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> _ = model.get_layer("hidden").kernel.assign(np.array([[0.0, 1.0, 5.0]]))
    >>> GeometricMedian(normalize=None)(model)
    {'hidden': array([6., 5., 9.])}
    """

    normalize: str | None = "mean"

    def raw(self, model, spaces):
        return {space.name: self._distances(space) for space in spaces}

    def _distances(self, space):
        gram = np.zeros((space.size, space.size))
        for member in kernels(self, space, ("producer",)):
            filters = _filters(member, space.size)
            width = max(1, _CHUNK // space.size)
            for start in range(0, filters.shape[1], width):
                chunk = filters[:, start : start + width].astype(np.float64)
                chunk -= chunk.mean(axis=0)  # distances stay, rounding errors shrink
                gram += chunk @ chunk.T
        squares = np.diag(gram)
        distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0))
        np.fill_diagonal(distances, 0.0)
        return distances.sum(axis=1)


def _filters(member, size):
    """Returns what a kernel holds of each channel, as rows (size, n) with zeros at the end."""
    kernel = keras.ops.convert_to_numpy(member.variable)
    rows = np.moveaxis(kernel, member.axis, 0).reshape(len(member.index_map), -1)
    own = np.flatnonzero(member.index_map >= 0)
    channels = member.index_map[own]
    order = np.argsort(channels, kind="stable")
    numbers = np.bincount(channels, minlength=size)
    first = np.cumsum(numbers) - numbers
    place = np.empty(len(own), int)  # of an entry among those of its channel
    place[order] = np.arange(len(own)) - first[channels[order]]
    filters = np.zeros((size, numbers.max(initial=0), rows.shape[1]), rows.dtype)
    filters[channels, place] = rows[own]
    return filters.reshape(size, -1)


@register
@dataclasses.dataclass(frozen=True)
class Random(ChannelScore):
    """Numbers drawn uniformly from [0, 1): what other scores have to be better than.

    They depend on the seed and on the name and size of a space, not on the weights.

    Args:
        seed: Integer of at least 0. Default 0.
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, name="hidden"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> bool((Random(1)(model)["hidden"] == Random(1)(model)["hidden"]).all())
    True
    """

    seed: int = 0
    normalize: str | None = "mean"

    def __post_init__(self):
        super().__post_init__()
        check_integer("Random", "seed", self.seed, 0, high=MOST_SEEDS)

    def raw(self, model, spaces):
        return {
            space.name: np.random.default_rng([self.seed, zlib.crc32(space.name.encode())]).random(
                space.size
            )
            for space in spaces
        }
