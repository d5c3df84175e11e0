"""Choosing the rank of every kernel, by its singular values, for a budget of the whole model."""

import collections
import fractions
import heapq
import math
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_compaware import measure
from keras_compaware._graph import Call, trace
from keras_compaware._math.axes import matricise, matrix_shape
from keras_compaware._math.svd import above_rounding
from keras_compaware.base import Target, check_choice, check_integer, check_number
from keras_compaware.compressors import LowRank
from keras_compaware.kernels import check_where, find_targets, matches
from keras_compaware.scores._arguments import checked_budget, excluded_names
from keras_compaware.scores.score import shares_beyond

_BUDGETS = ("params", "macs")
_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_KINDS = (keras.layers.Dense, *_CONVOLUTIONS)
_ROUNDING = 1e-9  # relative: a share may lie this much beside its value


def choose_ranks(
    model: keras.Model,
    budget: Mapping[str, float],
    *,
    split: str = "channel",
    round_to: int = 1,
    min_rank: int = 1,
    max_ratio: float = 1.0,
    where: str | type | keras.layers.Layer | Callable[[Target], bool] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, LowRank]:
    """Chooses the rank of every kernel for one budget of the whole model.

    What is looked for is

        argmax_r sum_k e_k(r_k)   subject to   cost(r) <= fraction * cost(model),
        e_k(r) = sum_{i <= r} s_ki^2 / sum_i s_ki^2

    over the ranks r_k of the kernels k with the singular values s_ki, where a kernel may also stay
    whole (e = 1). Relative energies make kernels of different scale comparable; that all kernels
    count alike is our choice.

    The search is greedy: from the smallest ranks on, the step is taken that gains most energy per
    cost, for as long as one fits. Each rank of a kernel costs the same and gains less than the one
    before, for which this is optimal but for the last step. Leaving a kernel whole is a step of its
    own, since m n entries are cheaper than the factors of high ranks and have all of the energy: it
    is taken from the rank at which it gains more per cost than the next rank does, and where it
    does not fit, ranks go on one by one. What is found is never below the optimum by more than what
    the first step that did not fit would have gained.

    What a choice costs is computed from shapes, and equals what is measured after `compress` and
    `compact` (which may find more that can go, such as channels that nothing reads). Ranks at which
    the factors would save no parameters, or no multiply-accumulates at the strides of their layer,
    are not chosen. Only Dense and Conv1D/2D/3D kernels that no other layer shares are; all else
    counts as it is.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        budget: Mapping with one entry: the fraction in (0, 1] of "params" or of "macs" of the whole
            model that may be left.
        split: "channel" (default) or "spatial", as of `LowRank`.
        round_to: Integer of at least 1: ranks are multiples of it. A kernel too small for one
            stays whole. Default 1.
        min_rank: Integer of at least 1: the least rank, rounded up to such a multiple. Default 1.
        max_ratio: Number in (0, 1]: largest share of a kernel's parameters that its factors may
            have; a kernel of which more is to be kept stays whole. Default 1.
        where: Which kernels may be factorised, as in a `Rule`: a regular expression searched in
            their names, a layer, a class of layers, a function of a `Target`, or None (default):
            all but those that produce an output of the model.
        exclude: Regular expression or a sequence of them, searched in the names of kernels: those
            stay whole. Default: none.

    Returns:
        Dict from names of kernels to the `LowRank` of each. Kernels that stay whole are left out.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, a selection matches no kernel, the model has no
            static graph, a kernel is not finite, or the budget cannot be met.

    Example:
    >>> import re
    >>> import keras_compaware as kc
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((16,)),
    ...         keras.layers.Dense(16, name="flat"),
    ...         keras.layers.Dense(16, name="steep"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    >>> _ = model.layers[0].kernel.assign(basis)
    >>> _ = model.layers[1].kernel.assign(basis * 0.5 ** np.arange(16.0) @ basis.T)
    >>> ranks = choose_ranks(model, {"macs": 0.75})
    >>> {name: compressor.rank for name, compressor in ranks.items()}
    {'steep/kernel': 3}
    >>> rules = [kc.Rule(f"^{re.escape(name)}$", kc.AtEnd(c)) for name, c in ranks.items()]
    >>> small = kc.compact(kc.compress(model, kc.Recipe(rules))).model
    >>> measure.macs(model), measure.macs(small)
    (544, 384)
    """
    kind, fraction = checked_budget("choose_ranks", budget, _BUDGETS)
    check_choice("choose_ranks", "split", split, ("channel", "spatial"))
    check_integer("choose_ranks", "round_to", round_to, 1)
    check_integer("choose_ranks", "min_rank", min_rank, 1)
    check_number("choose_ranks", "max_ratio", max_ratio, 0.0, 1.0, low_open=True)
    check_where("choose_ranks", where)
    places = _Places(model)
    total = places.total(kind)
    limits = {"round_to": round_to, "min_rank": min_rank, "max_ratio": max_ratio}
    ladders = [
        _Ladder(target, places, kind, split, **limits)
        for target in _selected(model, places, where, exclude)
    ]
    ladders = [ladder for ladder in ladders if len(ladder.ranks)]
    limit = fraction * total * (1.0 + 1e-12)
    least = total - sum(ladder.whole - ladder.costs[0] for ladder in ladders)
    if least > limit:
        share = math.ceil(1e4 * least / total) / 1e4
        what = {"params": "parameters", "macs": "MACs"}[kind]
        given = ", ".join(f"{name}={value}" for name, value in limits.items())
        raise ValueError(
            f"choose_ranks: the budget of {fraction:.4g} of the {what} cannot be met. At least "
            f"{share:.4f} ({math.ceil(least):,} of {total:,}) is left with {given} and "
            f"split={split!r}; kernels that may be factorised: {len(ladders)}. Raise the budget, "
            "loosen these, or remove channels first (`choose_channels`)."
        )
    found = _climb(ladders, limit - least)
    return {
        ladder.name: LowRank(rank=int(ladder.ranks[step]), split=split)
        for ladder, step in zip(ladders, found, strict=True)
        if step is not None
    }


def cost_of_ranks(model: keras.Model, ranks: Mapping[str, LowRank], kind: str) -> int:
    """Computes what a model costs when its kernels are factorised, without changing it.

    Args:
        model: A Sequential or functional model.
        ranks: Mapping from names of kernels to `LowRank`s of given rank, as `choose_ranks` returns
            it.
        kind: "params" or "macs".

    Returns:
        The number of parameters, or of multiply-accumulates of one example, after `compress` and
        `compact`. A kernel whose factors would not save both counts as it is.

    Raises:
        TypeError: If a value of `ranks` is no `LowRank`.
        ValueError: If `kind` is unknown, there is no kernel of a name that could be factorised, or
            a `LowRank` has tiles, or takes its rank from the kernel's values.

    Example:
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a")])
    >>> cost_of_ranks(model, {}, "macs"), cost_of_ranks(model, {"a/kernel": LowRank(2)}, "macs")
    (64, 32)
    """
    check_choice("cost_of_ranks", "kind", kind, _BUDGETS)
    places = _Places(model)
    targets = {target.name: target for target in find_targets(model)[0] if places.knows(target)}
    cost = places.total(kind)
    for name, compressor in ranks.items():
        if name not in targets:
            raise ValueError(
                f"cost_of_ranks: there is no kernel '{name}' that could be factorised. Those of "
                f"the model: {', '.join(targets) or 'none'}."
            )
        target = targets[name]
        rank = _given_rank(target, compressor)
        costs = places.costs(target, compressor.split)
        if rank <= min(most for _, _, most in costs.values()):
            whole, each, _ = costs[kind]
            cost += rank * each - whole
    return math.ceil(cost)


def splittable_kernels(model: keras.Model) -> list[Target]:
    """Returns the kernels that `choose_ranks` may factorise, of one matrix each: no groups."""
    places = _Places(model)
    targets = _selected(model, places, None, None)
    return [target for target in targets if matrix_shape(target.shape, target.axes)[0] == 1]


def _given_rank(target, compressor):
    if not isinstance(compressor, LowRank):
        raise TypeError(
            f"cost_of_ranks: '{target.name}' needs a LowRank. Received: {compressor!r}."
        )
    rank = compressor.rank_of(target.shape, target.axes)
    if compressor.tile is not None or rank is None:
        raise ValueError(
            f"cost_of_ranks: '{target.name}' needs a LowRank of a rank or ratio, without tiles, "
            "which no pair of layers computes; `settle` turns one chosen by energy into one of a "
            f"rank. Received: {compressor!r}."
        )
    return rank


class _Places:
    """Where the layers of a model run, and what that costs."""

    def __init__(self, model):
        graph = trace(model, batch_size=1)
        self._model = model
        self._batch = max((t.shape[0] for t in graph.inputs if t.shape), default=1)
        self._calls: dict[int, list[Call]] = collections.defaultdict(list)
        for call in graph.calls:
            self._calls[id(call.operation)].append(call)

    def total(self, kind):
        """Returns what the model costs as it is."""
        if kind == "params":
            return measure.parameters(self._model)
        return sum(filter(None, measure.macs_by_layer(self._model).values()))

    def knows(self, target):
        """Whether the kernel is that of one layer that `compact` splits."""
        return (
            type(target.layer) in _KINDS and not target.aliases and id(target.layer) in self._calls
        )

    def costs(self, target, split):
        """Returns `{kind: (cost of the whole kernel, of each rank, largest rank that saves)}`.

        The second layer runs at every position of the output. Split "spatial", the first one
        takes only the first axis of the window, so along the others it runs at the positions of the
        input.
        """
        stack, rows, columns = matrix_shape(target.shape, target.axes, split)
        size, left, right = math.prod(target.shape), stack * rows, stack * columns
        found = {"params": (size, left + right, _below(size, left + right))}
        whole, each, most = 0, 0, min(rows, columns)
        for call in self._calls[id(target.layer)]:
            outputs, ratio = self._positions(call, target, split)
            whole, each = whole + outputs * size, each + outputs * (left * ratio + right)
            most = min(most, _below(size, left * ratio + right))
        return {**found, "macs": (_integer(whole), _integer(each), most)}

    def _positions(self, call, target, split):
        """`(positions of the output, those of the first layer over these)`."""
        layer = call.operation
        before, after = call.inputs[0].shape, call.outputs[0].shape
        if isinstance(layer, keras.layers.Dense):
            return fractions.Fraction(math.prod(s or 1 for s in after[:-1]), self._batch), 1
        channels = 1 if layer.data_format == "channels_first" else len(after) - 1
        rest = [s or 1 for axis, s in enumerate(after) if axis != channels]
        ratio, window = fractions.Fraction(1), target.shape[:-2]
        if split == "spatial" and math.prod(window[1:]) > 1:
            axes = [axis for axis in range(1, len(after)) if axis != channels]
            strides = np.broadcast_to(layer.strides, layer.rank).tolist()
            for axis, stride in list(zip(axes, strides, strict=True))[1:]:
                known = None not in (before[axis], after[axis])
                ratio *= fractions.Fraction(before[axis], after[axis]) if known else stride
        return fractions.Fraction(math.prod(rest), self._batch), ratio


def _below(whole, each):
    """The largest integer whose multiple of `each` is below `whole`."""
    return math.ceil(whole * (1 - _ROUNDING) / each) - 1


def _integer(number):
    return int(number) if number == int(number) else number


class _Ladder:
    """The ranks that a kernel may have, with what they cost and what they keep.

    Attributes:
        name: Name of the kernel.
        ranks: Integer array, increasing; empty if the kernel stays whole.
        costs: Their costs.
        lost: The share of the energy that each loses.
        whole: Cost of the whole kernel.
    """

    def __init__(self, target, places, kind, split, round_to, min_rank, max_ratio):
        self.name = target.name
        costs = places.costs(target, split)
        self.whole, self._each, _ = costs[kind]
        size, of_rank, _ = costs["params"]
        most = min(largest for _, _, largest in costs.values())
        most = min(most, math.floor(max_ratio * size / of_rank * (1 + _ROUNDING)))
        least = -(-min_rank // round_to) * round_to
        self.ranks = np.arange(least, most + 1, round_to)
        self.costs = [int(rank) * self._each for rank in self.ranks]
        if len(self.ranks):
            self.lost = lost_energies(target, split)[self.ranks]

    def next_step(self, step, whole=True):
        """Returns `(energy gained per cost, cost, next step)`; None as a step is the whole kernel.

        Returns None if nothing more can be gained.

        Args:
            step: Place of the present rank.
            whole: Whether the whole kernel may be the next step.
        """
        slope, found = 0.0, None
        if step + 1 < len(self.ranks):
            cost = self.costs[step + 1] - self.costs[step]
            slope = float(self.lost[step] - self.lost[step + 1]) / float(cost)
            found = slope, cost, step + 1
        if whole:
            cost = self.whole - self.costs[step]
            last = float(self.lost[step]) / float(cost)
            if last >= slope:
                slope, found = last, (last, cost, None)
        return found if slope > 0 else None


def lost_energies(target, split):
    """Returns the shares of the squared singular values beyond the ranks 0, 1, ..., the full one.

    Those that are zero up to rounding, by the measure of `compact`, have no energy.
    """
    w = ops.stop_gradient(ops.cast(target.read(), "float32"))
    if not bool(ops.all(ops.isfinite(w))):
        raise ValueError(
            f"choose_ranks: the kernel '{target.name}' is not finite. Train again from the last "
            "checkpoint without NaN."
        )
    matrix, _ = matricise(w, target.axes, split)
    values = np.array(ops.convert_to_numpy(ops.svd(matrix, compute_uv=False)), np.float64)
    values[~above_rounding(values, matrix.shape[1:])] = 0.0
    largest = values.max()
    energies = np.square(values / (largest if largest > 0 else 1.0)).sum(axis=0)
    return shares_beyond(energies)


def _climb(ladders, limit):
    """Returns the step of each ladder, None for the whole kernel.

    Args:
        ladders: `_Ladder`s.
        limit: What may be spent beyond the first steps.
    """
    found = [0] * len(ladders)
    may_be_whole = [True] * len(ladders)
    heap = []

    def offer(place):
        step = ladders[place].next_step(found[place], may_be_whole[place])
        if step is not None:
            slope, cost, following = step
            heapq.heappush(heap, (-slope, place, cost, following))

    for place in range(len(ladders)):
        offer(place)
    while heap:
        _, place, cost, following = heapq.heappop(heap)
        if cost <= limit:
            limit -= cost
            found[place] = following
            if following is not None:
                offer(place)
        elif following is None:
            may_be_whole[place] = False
            offer(place)
    return found


def _selected(model, places, where, exclude):
    """Returns the targets that may be factorised."""
    targets, _ = find_targets(model)
    names = [target.name for target in targets]
    excluded = excluded_names("choose_ranks", exclude, names, "kernel")
    chosen = [target for target in targets if matches(where, target)]
    if where is not None and not chosen:
        raise ValueError(
            f"choose_ranks: `where` ({where!r}) matches no kernel. Those of the model: "
            f"{', '.join(names) or 'none'}."
        )
    return [t for t in chosen if t.name not in excluded and places.knows(t)]
