"""Which channels and which ranks to keep, so that a whole model meets a budget."""

import dataclasses
import fractions
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware import export
from keras_compaware._text import text_table
from keras_compaware.base import AtEnd, check_choice
from keras_compaware.compaction import CompactResult, compact, shrink
from keras_compaware.compressors import GroupPruning, LowRank
from keras_compaware.recipe import Recipe, compress
from keras_compaware.rules import Rule
from keras_compaware.scores._arguments import checked_budget
from keras_compaware.search.groups import CHANNELS, Group, Groups, JointCost
from keras_compaware.search.sensitivities import Sensitivity, measure_groups

_FRACTIONS = ("params", "macs")
_MEASURED = {"bytes": "params", "latency_ms": "macs"}
_ATTEMPTS = 8
_UNITS = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency_ms": "ms"}


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Which channels and ranks are kept: what `fit_budget` has found, to be read and edited.

    Args:
        keep: Mapping from names of channel spaces to the channels kept, increasing integers; a
            space that is not named stays whole. As of `shrink`.
        ranks: Mapping from names of kernels to ranks; a kernel that is not named stays whole.
        target: What was asked for, such as {"macs": 0.5}.
        costs: Mapping from "params" and "macs" to pairs: of the model, and with this allocation,
            before `compact` finds what else can go.
        sizes: Mapping from those names to what there is: number of channels, or (rows, columns).
        losses: Mapping from those names to by how much the loss grows if it is this alone.
        allow_inexact: As of `channel_spaces`.
    """

    keep: Mapping[str, Sequence[int]]
    ranks: Mapping[str, int]
    target: Mapping[str, float]
    costs: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    allow_inexact: bool = False

    def apply(self, model: keras.Model) -> CompactResult:
        """Returns the smaller model, untrained, as `compact` does. The model is not changed.

        Channels go first; the ranks are those of what is left of the kernels.
        """
        small = model
        if self.keep:
            keep = {name: np.asarray(kept, int) for name, kept in self.keep.items()}
            small = shrink(small, keep, allow_inexact=self.allow_inexact)
        if self.ranks:
            small = compress(small, Recipe(self._of_ranks(lambda c: (AtEnd(c),))))
        return compact(small)

    def recipe(self, *when: Callable[[Any], Any]) -> Recipe:
        """Returns a recipe that trains a model towards these numbers of channels and ranks.

        Channels are chosen by their norms when it acts, not those of `keep`.

        Args:
            *when: What makes an action of a compressor, such as `lambda c: Every(200, c)`. Default:
                `AtEnd`.
        """
        makes = when or (AtEnd,)

        def actions(compressor):
            return tuple(make(compressor) for make in makes)

        channels = []
        for name, kept in self.keep.items():
            share = 1.0 - len(kept) / self.sizes[name]
            pattern = f"^{re.escape(name)}/channels$"
            channels.append(Rule(pattern, *actions(GroupPruning(sparsity=share))))
        return Recipe(self._of_ranks(actions), channels=channels)

    def _of_ranks(self, actions):
        return [
            Rule(f"^{re.escape(name)}$", *actions(LowRank(rank=rank)))
            for name, rank in self.ranks.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns it as what JSON can hold."""
        return {
            **dataclasses.asdict(self),
            "keep": {name: [int(n) for n in kept] for name, kept in self.keep.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Allocation":
        """The inverse of `to_json`.

        Raises:
            ValueError: If there is a key that does not belong there.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = set(value) - set(names)
        if unknown:
            raise ValueError(
                f"Allocation: unknown key {min(unknown)!r}. Expected: {', '.join(names)}."
            )
        return cls(**value)

    def __str__(self) -> str:
        rows = [
            [name, "channels", f"{self.sizes.get(name, '?')} -> {len(kept)}", self._loss(name)]
            for name, kept in self.keep.items()
        ]
        for name, rank in self.ranks.items():
            shape = " x ".join(map(str, self.sizes.get(name, ())))
            rows.append([name, "rank", f"{shape} -> {rank}", self._loss(name)])
        lines = [text_table(["name", "what", "how many", "loss by itself"], rows)] if rows else []
        for kind, (before, after) in self.costs.items():
            lines.append(f"{_UNITS[kind]}: {before:,} -> {after:,} ({after / max(1, before):.1%})")
        return "\n".join(lines)

    def _loss(self, name):
        return f"+{self.losses[name]:.3g}" if name in self.losses else ""


Solver = Callable[[Sequence[Group], Sequence[np.ndarray], JointCost, float], Sequence[int]]


def fit_budget(
    model: keras.Model,
    data: Iterable | None,
    target: Mapping[str, float],
    *,
    measured: Sensitivity | None = None,
    solver: str | Solver = "greedy",
    score: Any = "l2",
    channels: bool = True,
    ranks: bool = True,
    round_to: int = 1,
    exclude: str | Sequence[str] | None = None,
    allow_inexact: bool = False,
    **arguments: Any,
) -> Allocation:
    """Finds numbers of channels and ranks with which a model meets a budget and suffers least.

    Looked for is the least sum of what each choice costs by itself,

        argmin sum_g loss_g(n_g)   subject to   cost(n) <= budget

    with the losses of `sensitivity`, and the exact cost of all choices together. That losses add up
    is an approximation; nothing is trained.

    Solvers: "greedy" goes from the whole model down, each time where the loss grows least per cost
    saved (along the lower convex hull of each curve), and then gives back what still fits; it does
    not promise the optimum. "uniform" keeps the same share everywhere, to compare with. A function
    `(groups, losses, cost, limit) -> amounts` may be given as well.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        data: As of `sensitivity`; None: from the weights alone.
        target: Mapping with one entry: the fraction in (0, 1] of "params" or of "macs" that may be
            left; or the most "bytes" of the float32 LiteRT file; or the most "latency_ms" of it
            with one thread on this machine. The last two are measured, on files of up to 8 models,
            and need TensorFlow and LiteRT.
        measured: A `Sensitivity` of this model, instead of measuring it now.
        solver: "greedy" (default), "uniform" or a function.
        score: As of `choose_channels`.
        channels: Whether channels may be removed.
        ranks: Whether kernels may be factorised.
        round_to: Integer of at least 1: all numbers are multiples of it, as hardware likes, but
            those of heads of attention.
        exclude: As of `sensitivity`.
        allow_inexact: As of `channel_spaces`.
        **arguments: Further ones of `sensitivity`: `loss`, `steps`, `num_batches`, `cache`,
            `verbose`.

    Returns:
        An `Allocation`, whose `apply` makes the smaller model and whose `recipe` trains towards it.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or the budget cannot be met.

    Example:
    >>> from keras_compaware import measure
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(16, "relu", name="hidden"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> found = fit_budget(model, None, {"macs": 0.5}, round_to=4, ranks=False)
    >>> len(found.keep["hidden"])
    8
    >>> measure.macs(model), measure.macs(found.apply(model).model)
    (160, 80)
    """
    kind, limit = checked_target(target)
    options = {
        "score": score,
        "channels": channels,
        "ranks": ranks,
        "round_to": round_to,
        "exclude": exclude,
        "allow_inexact": allow_inexact,
    }
    solve = solver if callable(solver) else _SOLVERS.get(solver)
    if solve is None:
        check_choice("fit_budget", "solver", solver, tuple(_SOLVERS))
    if measured is not None and arguments:
        raise TypeError(
            f"fit_budget: {', '.join(arguments)} would be for measuring the sensitivity, which is "
            "given by `measured`."
        )
    groups = Groups(model, **options)
    if measured is None:
        measured = measure_groups(model, data, groups, **arguments)
    losses = [measured.losses(group) for group in groups.all]

    def allocation(kind, fraction):
        cost = groups.cost(model, kind)
        amounts = solve(groups.all, losses, cost, fraction * cost.total * (1 + 1e-12))
        return _allocation(model, groups, losses, amounts, target, allow_inexact)

    if kind in _FRACTIONS:
        return allocation(kind, limit)
    return _by_measuring(model, allocation, kind, limit)


def checked_target(target: Mapping[str, float]) -> tuple[str, float]:
    """Returns kind and limit of a target of `fit_budget`.

    Raises:
        TypeError: If it is no mapping, or its limit no number.
        ValueError: If it has not exactly one of the known kinds, or its limit is out of range.
    """
    kinds = (*_FRACTIONS, *_MEASURED)
    return checked_budget("fit_budget", target, kinds, unbounded=_MEASURED, name="target")


def _allocation(model, groups, losses, amounts, target, allow_inexact):
    keep, ranks, sizes, alone = {}, {}, {}, {}
    numbers = groups.choices.sizes.copy()
    costs = {kind: groups.cost(model, kind) for kind in _FRACTIONS}
    before = {kind: cost.total for kind, cost in costs.items()}
    for cost in costs.values():
        for place, amount in enumerate(amounts):
            cost.set(place, amount)
    for place, (group, amount) in enumerate(zip(groups.all, amounts, strict=True)):
        if amount == group.whole:
            continue
        if group.kind == CHANNELS:
            numbers[group.place] = amount
            sizes[group.name] = int(groups.choices.sizes[group.place])
        elif costs["params"].change(place, group.whole) <= 0:
            continue  # with so few channels left, the factors would save nothing
        else:
            ranks[group.name] = int(amount)
            sizes[group.name] = groups.sizes(group)
        found = losses[place][np.searchsorted(group.amounts, amount)]
        alone[group.name] = float(found)
    keep = {name: kept.tolist() for name, kept in groups.choices.kept(numbers).items()}
    return Allocation(
        keep=keep,
        ranks=ranks,
        target=dict(target),
        costs={kind: (before[kind], cost.total) for kind, cost in costs.items()},
        sizes=sizes,
        losses=alone,
        allow_inexact=allow_inexact,
    )


def _by_measuring(model, allocation, kind, limit):
    """The largest allocation whose file is measured to be within the limit, by bisection."""
    with tempfile.TemporaryDirectory() as folder:

        def measured(small, name):
            path = os.path.join(folder, f"{name}.tflite")
            export.to_litert(small, path)
            if kind == "bytes":
                return os.path.getsize(path)
            return export.latency([path])[path].median_ms

        best, low, high = None, fractions.Fraction(0), fractions.Fraction(1)
        whole = measured(model, "whole")
        share = fractions.Fraction(1) if whole <= limit else fractions.Fraction(limit / whole)
        received = []
        for attempt in range(_ATTEMPTS):
            try:
                found = allocation(_MEASURED[kind], float(share))
            except ValueError:
                low, share = share, (share + high) / 2
                continue
            value = measured(found.apply(model).model, attempt)
            received.append(value)
            if value <= limit:
                best, low = found, share
                if share == 1 or value > 0.98 * limit:
                    break
            else:
                high = share
            if best is None:
                share = high * fractions.Fraction(limit / value) * fractions.Fraction(95, 100)
            else:
                share = (low + high) / 2
    if best is None:
        least = f"; the smallest tried has {min(received):.4g}" if received else ""
        raise ValueError(
            f"fit_budget: {limit:.4g} {_UNITS[kind]} were not reached in {_ATTEMPTS} attempts. The "
            f"whole model has {whole:.4g}{least}. Raise the budget."
        )
    return best


# ---- solvers ------------------------------------------------------------------------------------


def greedy(groups, losses, cost, limit):
    """As "greedy" of `fit_budget`: down the convex hulls, then back up where it fits."""
    places = [len(group.amounts) - 1 for group in groups]

    def at(g, place):
        return float(cost.change(g, int(groups[g].amounts[place])))

    def move(g, place):
        places[g] = place
        cost.set(g, int(groups[g].amounts[place]))

    hulls = []
    for g, (group, lost) in enumerate(zip(groups, losses, strict=True)):
        hulls.append(_hull([-at(g, place) for place in range(len(group.amounts))], lost))

    def down(g):
        """`(loss gained per cost saved, next place)`, or None at the bottom."""
        for place in hulls[g]:
            if place < places[g] and (saved := -at(g, place)) > 0:
                return float(losses[g][place] - losses[g][places[g]]) / saved, place
        return None

    def up(g):
        """What may come next above: `[(cost spent, loss regained, place)]`."""
        present, last = places[g], len(groups[g].amounts) - 1
        better = np.flatnonzero(losses[g][present:] < losses[g][present])  # beyond a plateau
        following = {min(present + 1, last), last, *(present + better[:1]).tolist()}
        return [
            (at(g, place), float(losses[g][present] - losses[g][place]), place)
            for place in sorted(following - {present})
        ]

    steps = {g: step for g in range(len(groups)) if (step := down(g))}
    while cost.total > limit:
        if not steps:
            raise ValueError(_unmet(cost.total, limit))
        _, g = min((steps[g][0], g) for g in steps)
        move(g, steps[g][1])
        for other in cost.neighbours(g):
            steps[other] = down(other)
        steps = {g: step for g, step in steps.items() if step}
    ups = [up(g) for g in range(len(groups))]
    while True:
        room = limit - cost.total
        fitting = [
            (-gained / spent if spent > 0 else -math.inf, g, place)
            for g, options in enumerate(ups)
            for spent, gained, place in options
            if spent <= room and (gained > 0 or spent <= 0)
        ]
        if not fitting:
            return [int(group.amounts[p]) for group, p in zip(groups, places, strict=True)]
        _, g, place = min(fitting)
        move(g, place)
        for other in cost.neighbours(g):
            ups[other] = up(other)


def uniform(groups, losses, cost, limit):
    """As "uniform" of `fit_budget`: the same share of channels, and of the ranks that save."""

    def amounts(share):
        found = []
        for group in groups:
            most = group.whole if group.kind == CHANNELS else group.amounts[-2]
            nearest = np.searchsorted(group.amounts, share * most * (1 + 1e-9), side="right") - 1
            found.append(int(group.amounts[max(0, nearest)]))
        return found

    def total(chosen):
        for place, amount in enumerate(chosen):
            cost.set(place, amount)
        return cost.total

    whole = [group.whole for group in groups]
    if total(whole) <= limit:
        return whole
    shares = np.linspace(0.0, 1.0, 1025)
    low, high = -1, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        if total(amounts(shares[middle])) <= limit:
            low = middle
        else:
            high = middle
    if low < 0:
        raise ValueError(_unmet(total(amounts(0.0)), limit))
    chosen = amounts(shares[low])
    total(chosen)
    return chosen


_SOLVERS = {"greedy": greedy, "uniform": uniform}


def _hull(saved, losses):
    """Places of the lower convex hull of loss over cost saved, from the largest amount down."""
    hull = []
    for c in reversed(range(len(saved))):
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (losses[b] - losses[a]) * (saved[c] - saved[a])
            if slope < (losses[c] - losses[a]) * (saved[b] - saved[a]):
                break
            hull.pop()
        hull.append(c)
    return hull


def _unmet(least, limit):
    return (
        f"fit_budget: the budget cannot be met: at least {least:,} is left, and {limit:,.0f} is "
        "asked for. Raise it, exclude less, or lower `round_to`."
    )
