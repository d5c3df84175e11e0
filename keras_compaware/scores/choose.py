"""Choosing the channels that stay, by their scores, for a budget."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from keras_compaware.base import check_choice, check_integer, check_number
from keras_compaware.coupling import Keep, analyse
from keras_compaware.scores import cost
from keras_compaware.scores._arguments import checked_budget, excluded_names
from keras_compaware.scores.from_weights import L1, L2, BatchNormScale, GeometricMedian, Random
from keras_compaware.scores.score import ChannelScore, label_table, leave_out, shares_beyond

_SCORES = {
    "l1": L1,
    "l2": L2,
    "batch_norm_scale": BatchNormScale,
    "geometric_median": GeometricMedian,
    "random": Random,
}
_BUDGETS = ("channels", "macs", "params")
_ROUNDING = 1e-9  # a fraction of a size, such as 0.29 * 100, may lie this much beside its value


def choose_channels(
    model: keras.Model,
    score: str | ChannelScore | Callable | Mapping[str, np.ndarray] = "l2",
    budget: Mapping[str, float] | None = None,
    *,
    scope: str = "space",
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float = 1.0,
    exclude: str | Sequence[str] | None = None,
    allow_inexact: bool = False,
) -> dict[str, np.ndarray]:
    """Chooses the channels to keep, those with the highest scores, for `shrink`.

    The largest choice that meets the budget is taken: with scope "space" every space keeps the
    same fraction of its channels, with scope "global" every channel above one threshold is kept,
    whatever its space. What a choice costs is computed from the analysis of the model and equals
    what is measured after `shrink`. The choice is deterministic; of equal scores the first wins.

    Every tensor and weight keeps at least one channel, where need be the best one that stands
    there in the place of a better one elsewhere in its space.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        score: "l1", "l2" (default), "batch_norm_scale", "geometric_median", "random", a
            `ChannelScore` such as `scores.Taylor(data)`, a function `(model, spaces) -> scores`,
            or the scores: a mapping from names of spaces to arrays (size of the space,).
        budget: Mapping with one entry: the fraction in (0, 1] of "channels" (of the free spaces
            that are not excluded), "macs" or "params" (of the whole model) that may be left.
            Default: {"channels": 0.5}.
        scope: "space" (default) or "global".
        round_to: Integer of at least 1: the number of channels kept in a space that is cut is a
            multiple of it, the nearest to what the fraction or threshold asks for. A space smaller
            than that stays whole. A channel of a space is one, be it a group of a grouped
            convolution or a pair of units of a Bidirectional layer; heads of attention, which are
            many entries wide (`ChannelSpace.is_wide`), are not rounded. Default 1.
        min_channels: Integer of at least 1: how many channels every space keeps (or all that it
            has). Default 1.
        max_ratio: Number in [0, 1]: largest fraction of a space's channels that may be removed.
            Default 1.
        exclude: Regular expression or a sequence of them, searched in the names of spaces: those
            stay whole. Default: none.
        allow_inexact: As of `channel_spaces`; give `shrink` the same. Default False.

    Returns:
        Dict from names of spaces to increasing integer arrays: the channels to keep. Spaces that
        keep all are left out.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, a pattern matches no space, scores are missing
            or do not fit, or the budget cannot be met.

    Example:
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, name="hidden"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> choose_channels(model, {"hidden": [0.1, 0.4, 0.3, 0.2]}, {"macs": 0.5})
    {'hidden': array([1, 2])}
    """
    kind, fraction = "channels", 0.5
    if budget is not None:
        kind, fraction = checked_budget("choose_channels", budget, _BUDGETS)
    check_choice("choose_channels", "scope", scope, ("space", "global"))
    check_number("choose_channels", "max_ratio", max_ratio, 0.0, 1.0)
    analysis = analyse(model, allow_inexact)
    choices = Choices.of(model, analysis, score, exclude, round_to, min_channels, max_ratio)
    spaces = choices.spaces
    wanted, last = choices.by_space() if scope == "space" else choices.by_threshold()

    if kind == "channels":
        total = int(choices.sizes.sum())

        def spent(numbers):
            return int(numbers.sum())

    else:
        costs = (cost.macs if kind == "macs" else cost.parameters)(model, analysis)
        total = costs(choices.keep(choices.sizes))

        def spent(numbers):
            return costs(choices.keep(numbers))

    limit = fraction * total * (1.0 + 1e-12)
    least = spent(choices.numbers(wanted(0)))
    if least > limit or (fraction < 1.0 and not spaces):
        raise ValueError(_too_small(analysis.spaces, spaces, kind, fraction, least, total, choices))
    low, high = 0, last + 1  # `low` meets the budget; `high` does not, or does not exist
    while high - low > 1:
        middle = (low + high) // 2
        if spent(choices.numbers(wanted(middle))) <= limit:
            low = middle
        else:
            high = middle
    return choices.kept(choices.numbers(wanted(low)))


class Choices:
    """The ranking of the channels of every space, and what may be kept of it."""

    @classmethod
    def of(cls, model, analysis, score, exclude=None, round_to=1, min_channels=1, max_ratio=1.0):
        """Makes them for arguments of `choose_channels`, which are checked."""
        check_integer("choose_channels", "round_to", round_to, 1)
        check_integer("choose_channels", "min_channels", min_channels, 1)
        spaces = _without(analysis.spaces, exclude)
        values = _scores(model, score, spaces, analysis.spaces)
        return cls(analysis, spaces, values, round_to, min_channels, max_ratio)

    def __init__(self, analysis, spaces, values, round_to, min_channels, max_ratio):
        self.spaces = spaces
        self._steps = np.array([1 if space.is_wide else round_to for space in spaces], int)
        self.limits = {
            "round_to": round_to,
            "min_channels": min_channels,
            "max_ratio": max_ratio,
        }
        self.sizes = np.array([space.size for space in spaces], int)
        scores = np.concatenate([[], *values])
        owner = np.repeat(np.arange(len(spaces)), self.sizes)
        starts = np.cumsum(self.sizes) - self.sizes
        best_first = np.argsort(-scores, kind="stable")
        self._ranking = owner[best_first]
        rank = np.empty(len(scores), int)
        rank[best_first] = np.arange(len(scores))
        space_of, channel_of = label_table(analysis, spaces)
        number_of = np.where(space_of < 0, -1, channel_of + np.append(starts, 0)[space_of])
        needed = _needed(analysis.flow, number_of, rank)
        # Channels of each space in the order in which they are kept: first what is needed.
        order = np.lexsort((rank, ~needed, owner))
        self._order = np.split(order, starts[1:]) if len(spaces) else []
        self._order = [order - start for order, start in zip(self._order, starts, strict=True)]
        energies = np.square(scores / (np.abs(scores).max(initial=0.0) or 1.0))
        self._energies = np.split(energies[order], starts[1:]) if len(spaces) else []
        place = np.empty(len(scores), int)
        place[order] = np.arange(len(scores)) - starts[owner]
        self._space_of = space_of
        self._place_of = np.append(place, -1)[number_of]
        least = np.maximum.reduce(
            [
                np.full_like(self.sizes, min_channels),
                self.sizes - np.floor(max_ratio * self.sizes + _ROUNDING).astype(int),
                np.bincount(owner[needed], minlength=len(spaces)),
            ]
        )
        self._least = self._steps * -(-least // self._steps)

    def by_space(self):
        """Returns `(function, last)`: what each space should keep at the steps 0 to `last`.

        Every space keeps the same fraction of its channels; there is a step wherever some space
        keeps more than before.
        """
        # At (k - 1/2) * step / size the nearest multiple becomes the k-th.
        steps = [
            (np.arange(1, size // step + 2) - 0.5) * step / size
            for size, step in sorted(set(zip(self.sizes, self._steps, strict=True)))
        ]
        fractions = np.unique(np.concatenate([[0.0, 1.0], *steps]))
        fractions = fractions[fractions <= 1.0]
        return lambda step: fractions[step] * self.sizes, len(fractions) - 1

    def by_threshold(self):
        """Returns the same for the best channels of all, wherever they are; one more each step."""
        return (
            lambda step: np.bincount(self._ranking[:step], minlength=len(self.sizes)),
            len(self._ranking),
        )

    def table(self, ids):
        """Returns `(constant, {space: table})`: how many of some labels are kept, and are there.

        With `numbers[s]` channels of the space s there are constant + sum_s table[s][numbers[s]].
        """
        places = collections.defaultdict(list)
        for space, place in zip(self._space_of[ids], self._place_of[ids], strict=True):
            places[int(space)].append(place)
        constant = len(places.pop(-1, ()))
        return constant, {
            space: np.searchsorted(np.sort(found), np.arange(self.sizes[space] + 1))
            for space, found in places.items()
        }

    def lost_energies(self, place):
        """Returns the share of the squared scores of a space that goes, by the number kept."""
        return shares_beyond(self._energies[place])

    def numbers(self, wanted):
        """Returns how many channels each space keeps, within the limits."""
        wanted = wanted + _ROUNDING
        nearest = self._steps * np.floor(wanted / self._steps + 0.5).astype(int)
        numbers = np.where(wanted >= self.sizes, self.sizes, np.maximum(nearest, self._least))
        return np.minimum(numbers, self.sizes)

    def keep(self, numbers):
        """Returns the `Keep` for a number of channels of every space."""
        allowed = np.append(numbers, 0)[self._space_of]
        return Keep((self._space_of < 0) | (self._place_of < allowed))

    def kept(self, numbers):
        """Returns the channels of the spaces that are cut."""
        return {
            space.name: np.sort(order[:number])
            for space, order, number in zip(self.spaces, self._order, numbers, strict=True)
            if number < space.size
        }


def _needed(flow, number_of, rank):
    """Returns which channels have to stay, so that no tensor or weight is left without any.

    Args:
        flow: The `Flow`.
        number_of: For every label the number of its channel among all that can be cut, or -1.
        rank: For every channel its place in the ranking.
    """
    everywhere = [binding.ids for binding in flow.bindings.values()]
    everywhere += [ids for _, ids in flow.tensors]
    places = []
    for ids in {id(ids): ids for ids in everywhere}.values():
        channels = number_of[ids]
        if (channels >= 0).all():
            places.append(np.unique(channels))
    needed = np.zeros(len(rank), bool)
    for channels in sorted(places, key=len):  # what serves a small place often serves a large one
        if not needed[channels].any():
            needed[channels[np.argmin(rank[channels])]] = True
    return needed


def _without(spaces, exclude):
    """Returns the free spaces that no pattern matches."""
    names = [space.name for space in spaces]
    excluded = excluded_names("choose_channels", exclude, names, "channel space")
    return tuple(space for space in spaces.free if space.name not in excluded)


def _scores(model, score, spaces, every):
    """Returns the scores of each of the spaces, float64 arrays."""
    if isinstance(score, str):
        check_choice("choose_channels", "score", score, tuple(_SCORES))
        score = _SCORES[score]()
    if not isinstance(score, Mapping):
        if not callable(score) or isinstance(score, type):
            raise TypeError(
                "choose_channels: `score` must be a ChannelScore, a function (model, spaces), a "
                f"mapping from names of spaces to arrays, or one of {', '.join(map(repr, _SCORES))}"
                f". Received: {score!r}."
            )
        score = score(model, spaces)
    unknown = set(score) - {space.name for space in every}
    if unknown:
        raise ValueError(
            f"choose_channels: `score` names '{min(unknown)}', which is no channel space of the "
            f"model. Those are: {', '.join(space.name for space in every) or 'none'}."
        )
    return [_checked_scores(score, space) for space in spaces]


def _checked_scores(scores, space):
    if space.name not in scores:
        raise ValueError(
            f"choose_channels: `score` has no entry for the channel space '{space.name}'. Add an "
            f"array of {space.size} numbers. {leave_out(space)}."
        )
    values = np.asarray(scores[space.name], np.float64)
    if values.shape != (space.size,):
        raise ValueError(
            f"choose_channels: the scores of '{space.name}' must be {space.size} numbers, one for "
            f"each channel. Received the shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"choose_channels: the scores of '{space.name}' are not all finite.")
    return values


def _too_small(every, spaces, kind, fraction, least, total, choices):
    what = {"channels": "channels", "macs": "MACs", "params": "parameters"}[kind]
    if not spaces:
        frozen = f"{len(every) - len(every.free)} of {len(every)} are frozen"
        return (
            f"choose_channels: the model has no channel space that may be cut ({frozen}, the "
            "others excluded); `print(channel_spaces(model))` shows why."
        )
    limits = ", ".join(f"{name}={value}" for name, value in choices.limits.items())
    share = math.ceil(1e4 * least / total) / 1e4
    return (
        f"choose_channels: the budget of {fraction:.4g} of the {what} cannot be met. At least "
        f"{share:.4f} ({least:,} of {total:,}) is left with {limits}, and with {len(spaces)} of "
        f"{len(every)} channel spaces free and not excluded. Raise the budget or loosen these."
    )
