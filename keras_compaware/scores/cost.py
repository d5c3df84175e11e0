"""What a model costs when channels are cut, from its analysis alone: nothing is rebuilt."""

import fractions
import math
from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np

from keras_compaware import measure
from keras_compaware.scores.score import is_kernel


class Term(NamedTuple):
    """What one weight adds to a cost: a factor times its size along every axis.

    Args:
        variable: The weight.
        factor: Integer or Fraction.
        axes: Dict from its axes along which channels stand to their label arrays.
    """

    variable: keras.Variable
    factor: int | fractions.Fraction
    axes: Mapping[int, np.ndarray]

    def sizes(self, count):
        """Returns the size along every axis, given how many are kept of a label array."""
        return [
            count(self.axes[axis]) if axis in self.axes else size
            for axis, size in enumerate(self.variable.shape)
        ]


class Cost:
    """A sum: a constant and the products of `terms`.

    Args:
        constant: Integer: what does not change.
        terms: Sequence of `Term`s.
    """

    def __init__(self, constant, terms):
        self.constant = constant
        self.terms = tuple(terms)

    def __call__(self, keep):
        """Returns the cost, an integer, of what a `Keep` keeps."""
        counts = {}

        def count(ids):
            if id(ids) not in counts:
                counts[id(ids)] = keep.count(ids)
            return counts[id(ids)]

        return self.constant + math.ceil(
            sum(term.factor * math.prod(term.sizes(count)) for term in self.terms)
        )


def parameters(model, analysis):
    """Returns the `Cost` in parameters, as of `measure.parameters`."""
    axes = _cut_axes(analysis)
    weights = {id(weight): weight for weight in model.weights}
    return Cost(0, [Term(weight, 1, axes.get(key, {})) for key, weight in weights.items()])


def macs(model, analysis):
    """Returns the `Cost` in multiply-accumulates, as of `measure.macs`.

    The MACs of a layer are those of its kernels, each used at so many positions; along an axis of
    a kernel they shrink with what is kept of it. That holds for a grouped convolution as well: its
    inputs per group stay, and the axis of its outputs counts the groups. All of attention, the
    products of queries, keys and values included, is proportional to its heads, as its kernels are.
    """
    axes = _cut_axes(analysis)
    parts = [part for call in analysis.graph.calls for part in measure.parts_of(call)]
    operations = {part.path: part.operation for part in parts}
    constant, terms = 0, []
    for path, number in measure.macs_by_layer(model, parts=True).items():
        weights = list(filter(is_kernel, getattr(operations[path], "weights", ())))
        if not number:  # nothing, or of a kind that is not known
            continue
        if not weights:
            constant += number
            continue
        entries = sum(math.prod(weight.shape) for weight in weights)
        positions = fractions.Fraction(number, entries)
        terms += [Term(weight, positions, axes.get(id(weight), {})) for weight in weights]
    return Cost(constant, terms)


def _cut_axes(analysis):
    """Returns the axes of every weight along which channels stand: `{axis: labels}` by its id."""
    axes = {}
    for binding in analysis.flow.bindings.values():
        axes.setdefault(id(binding.variable), {})[binding.axis] = binding.ids
    return axes
