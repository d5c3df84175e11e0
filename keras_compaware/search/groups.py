"""What a budget is spent on: channels of spaces and ranks of kernels, and what they cost."""

import collections
import math
import re

import numpy as np

from keras_compaware.base import check_integer
from keras_compaware.coupling import analyse
from keras_compaware.scores import cost
from keras_compaware.scores._arguments import excluded_names
from keras_compaware.scores.choose import Choices
from keras_compaware.scores.ranks import splittable_kernels

CHANNELS, RANK = "channels", "rank"


class Group:
    """A number that may be chosen: how many channels a space keeps, or the rank of a kernel.

    Attributes:
        kind: `CHANNELS` or `RANK`.
        place: Place among the spaces of the `Choices`, or among the kernels.
        name: Name of the space or of the kernel.
        amounts: Increasing integer array: what may be chosen. The last one means that the space or
            kernel stays whole; for a kernel it is the smaller of its two sizes.
    """

    def __init__(self, kind, place, name, amounts):
        self.kind = kind
        self.place = place
        self.name = name
        self.amounts = np.asarray(amounts, int)

    @property
    def whole(self):
        """The amount that leaves all as it is."""
        return int(self.amounts[-1])

    def __repr__(self):
        return f"Group({self.kind}, {self.name!r}, {self.amounts[0]} to {self.whole})"


class Groups:
    """All that may be chosen in a model.

    Args:
        model: A Sequential or functional model.
        score: As of `choose_channels`: which channels of a space stay.
        channels: Whether channels may be removed.
        ranks: Whether kernels may be factorised.
        round_to: Integer of at least 1: numbers of channels and ranks are multiples of it, but
            those of heads of attention.
        exclude: As of `choose_channels` and `choose_ranks`: regular expressions for the names of
            free spaces and of kernels. Each must match one of them.
        allow_inexact: As of `channel_spaces`.

    Attributes:
        choices: The `Choices` of channels.
        kernels: The `Target`s that may be factorised, a list.
        all: The `Group`s, a list.
    """

    def __init__(self, model, score, channels, ranks, round_to, exclude, allow_inexact):
        check_integer("fit_budget", "round_to", round_to, 1)
        self.allow_inexact = allow_inexact
        self.analysis = analyse(model, allow_inexact)
        spaces = [space.name for space in self.analysis.spaces.free]
        targets = splittable_kernels(model)
        names = [*spaces, *(target.name for target in targets)]
        excluded = excluded_names("fit_budget", exclude, names, "channel space or kernel")
        left_out = [name for name in spaces if name in excluded or not channels]
        patterns = [f"^{re.escape(name)}$" for name in left_out]
        self.choices = Choices.of(model, self.analysis, score, patterns, round_to)
        self.kernels = [t for t in targets if ranks and t.name not in excluded]
        self.all = [
            *self._of_channels(),
            *(
                Group(RANK, place, target.name, amounts)
                for place, target in enumerate(self.kernels)
                if len(amounts := _ranks(target, round_to)) > 1
            ),
        ]

    def _of_channels(self):
        sizes = self.choices.sizes
        most = int(sizes.max(initial=0))
        grid = np.array([self.choices.numbers(np.minimum(n, sizes)) for n in range(most + 1)])
        for place, space in enumerate(self.choices.spaces):
            amounts = np.unique(grid[:, place])
            if len(amounts) > 1:
                yield Group(CHANNELS, place, space.name, amounts)

    def sizes(self, group):
        """Returns `(rows, columns)` of the kernel of a group."""
        return sizes_of(self.kernels[group.place])

    def cost(self, model, kind):
        """Returns the `JointCost` in "params" or "macs"."""
        function = {"params": cost.parameters, "macs": cost.macs}[kind]
        return JointCost(function(model, self.analysis), self.choices, self.kernels, self.all)


def _ranks(target, round_to):
    """Returns the ranks at which the factors of a kernel are smaller, and that of the whole."""
    rows, columns = sizes_of(target)
    most = math.ceil(rows * columns / (rows + columns)) - 1
    return [*range(round_to, most + 1, round_to), min(rows, columns)]


def sizes_of(target):
    """Returns `(rows, columns)` of a kernel as one matrix, channel split."""
    columns = math.prod(target.shape[axis] for axis in target.axes.outputs)
    return math.prod(target.shape) // columns, columns


class JointCost:
    """What a model costs for given numbers of channels and ranks, exactly and quickly.

    With m rows and n columns left of a kernel, a rank r makes of m n entries r (m + n), where that
    is less; every entry costs what it costs in the whole model.

    Args:
        cost: `Cost` of the model.
        choices: The `Choices` of channels.
        kernels: The `Target`s that may be factorised.
        groups: The `Group`s.
    """

    def __init__(self, cost, choices, kernels, groups):
        self._constant = cost.constant
        self._tables = {}
        self._terms = []
        of_space, of_kernel = collections.defaultdict(set), collections.defaultdict(set)
        places = {id(target.variables[0]): place for place, target in enumerate(kernels)}
        for number, term in enumerate(cost.terms):
            for ids in term.axes.values():
                if id(ids) not in self._tables:
                    self._tables[id(ids)] = choices.table(ids)
                for space in self._tables[id(ids)][1]:
                    of_space[space].add(number)
            kernel = places.get(id(term.variable))
            if kernel is not None:
                of_kernel[kernel].add(number)
            outputs = () if kernel is None else kernels[kernel].axes.outputs
            self._terms.append((term, kernel, outputs))
        self._touched = [
            sorted((of_space if group.kind == CHANNELS else of_kernel)[group.place])
            for group in groups
        ]
        self._groups = groups
        self._numbers = choices.sizes.copy()
        self._ranks = [min(sizes_of(target)) for target in kernels]
        self._values = [self._value(number) for number in range(len(self._terms))]

    @property
    def total(self):
        """The present cost, an integer."""
        return self._constant + math.ceil(sum(self._values))

    def set(self, place, amount):
        """Chooses the amount of a group."""
        self._put(place, amount)
        for number in self._touched[place]:
            self._values[number] = self._value(number)

    def change(self, place, amount):
        """Returns by how much the cost would grow with another amount of a group, a Fraction."""
        before = self._put(place, amount)
        new = sum(self._value(number) for number in self._touched[place])
        self._put(place, before)
        return new - sum(self._values[number] for number in self._touched[place])

    def neighbours(self, place):
        """Returns the places of the groups whose changes depend on this group's amount."""
        own = set(self._touched[place])
        return [other for other, terms in enumerate(self._touched) if own.intersection(terms)]

    def _put(self, place, amount):
        group = self._groups[place]
        values = self._numbers if group.kind == CHANNELS else self._ranks
        before = int(values[group.place])
        values[group.place] = amount
        return before

    def _value(self, number):
        term, kernel, outputs = self._terms[number]
        sizes = term.sizes(self._count)
        entries = math.prod(sizes)
        if kernel is not None and entries:
            columns = math.prod(sizes[axis] for axis in outputs)
            entries = min(entries, int(self._ranks[kernel]) * (entries // columns + columns))
        return term.factor * entries

    def _count(self, ids):
        constant, tables = self._tables[id(ids)]  # the terms keep `ids` alive
        return constant + sum(int(table[self._numbers[space]]) for space, table in tables.items())
