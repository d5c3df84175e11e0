"""What a model costs when channels are cut, from its analysis alone: nothing is rebuilt."""

import fractions
import math

from keras_compaware import measure
from keras_compaware.scores.score import is_kernel


class Cost:
    """A sum of products: `constant + sum of factor * number kept of ids_1 * number of ids_2 ...`.

    Args:
        constant: Integer: what does not change.
        terms: Sequence of `(integer or Fraction, tuple of label arrays)`.
    """

    def __init__(self, constant, terms):
        self._constant = constant
        self._terms = tuple(terms)

    def __call__(self, keep):
        """Returns the cost, an integer, of what a `Keep` keeps."""
        counts = {}

        def count(ids):
            if id(ids) not in counts:
                counts[id(ids)] = keep.count(ids)
            return counts[id(ids)]

        return self._constant + math.ceil(
            sum(factor * math.prod(map(count, axes)) for factor, axes in self._terms)
        )


def parameters(model, analysis):
    """Returns the `Cost` in parameters, as of `measure.parameters`."""
    axes = _cut_axes(analysis)
    constant, terms = 0, []
    for weight in {id(weight): weight for weight in model.weights}.values():
        if id(weight) in axes:
            terms.append(_term(1, weight, axes))
        else:
            constant += math.prod(weight.shape)
    return Cost(constant, terms)


def macs(model, analysis):
    """Returns the `Cost` in multiply-accumulates, as of `measure.macs`.

    The MACs of a layer are those of its kernels, each used at so many positions; along an axis of
    a kernel they shrink with what is kept of it. That holds for a grouped convolution as well: its
    inputs per group stay, and the axis of its outputs counts the groups. All of attention, the
    products of queries, keys and values included, is proportional to its heads, as its kernels are.
    """
    axes = _cut_axes(analysis)
    operations = {call.path: call.operation for call in analysis.graph.calls}
    constant, terms = 0, []
    for path, number in measure.macs_by_layer(model).items():
        weights = list(filter(is_kernel, getattr(operations[path], "weights", ())))
        if not number:  # nothing, or of a kind that is not known
            continue
        if not any(id(weight) in axes for weight in weights):
            constant += number
            continue
        entries = sum(math.prod(weight.shape) for weight in weights)
        positions = fractions.Fraction(number, entries)
        for weight in weights:
            terms.append(_term(positions, weight, axes))
    return Cost(constant, terms)


def _cut_axes(analysis):
    """Returns the axes of every weight along which channels stand: `{axis: labels}` by its id."""
    axes = {}
    for binding in analysis.flow.bindings.values():
        axes.setdefault(id(binding.variable), {})[binding.axis] = binding.ids
    return axes


def _term(factor, weight, axes):
    cut = axes.get(id(weight), {})
    rest = math.prod(size for axis, size in enumerate(weight.shape) if axis not in cut)
    return factor * rest, tuple(cut.values())
