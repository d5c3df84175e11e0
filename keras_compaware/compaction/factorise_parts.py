"""What stands in for a layer, how it is put together, and what must be known about the model."""

import collections
import contextlib
import dataclasses
import inspect

import keras
from keras import ops

from keras_compaware._graph import calls, has_graph
from keras_compaware.compaction.rebuild import zeros_at_first
from keras_compaware.kernels import kernel_axes, unique_name


@dataclasses.dataclass(frozen=True)
class Parts:
    """What stands in for a layer.

    Args:
        new: A layer, or `Around` one.
        fill: Function of `new` that sets its weights, once it is built.
        note: What was done.
        saved: Number of parameters that the model loses.
    """

    new: object
    fill: object
    note: str
    saved: int


class Around:
    """A layer with others before some of its inputs and behind its first output.

    In a functional model they are called where the layer was; all of them are layers of that model.

    Args:
        core: The layer.
        before: Dict from argument names of its call to lists of layers.
        after: List of layers.
        defaults: Dict from argument names to the arguments that take their places when omitted.
    """

    def __init__(self, core, before, after=(), defaults=None):
        self.core, self.before, self.after = core, before, list(after)
        self.defaults = defaults or {}

    def __call__(self, *args, **kwargs):
        names = list(inspect.signature(self.core.call).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, other in self.defaults.items():
            if given.get(name) is None and {name, other} & set(self.before):
                given[name] = given[other]
        for name, chain in self.before.items():
            for layer in chain:
                given[name] = layer(given[name])
        leading = [given.pop(name) for name in names[: len(args)]]
        first, *rest = outputs = keras.tree.flatten(self.core(*leading, **given))
        for layer in self.after:
            first = layer(first)
        return first if len(outputs) == 1 else (first, *rest)

    def _flatten_layers(self):
        chains = [[self.core], *self.before.values(), self.after]
        return [part for chain in chains for layer in chain for part in layer._flatten_layers()]


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What is known about a model besides its layers.

    Args:
        codes: Dict from the ids of kernels to their `Code`s of factors.
        calls: Dict from the ids of layers to their calls.
        in_sequence: Ids of the layers that stand in a `Sequential`.
        names: Set of the names of all layers.
        recurrent_kernels: Whether recurrent kernels may be split, too.
    """

    codes: dict
    calls: dict
    in_sequence: frozenset
    names: set
    recurrent_kernels: bool

    def shapes(self, layer):
        """Shapes of the first inputs of a layer, without repetitions."""
        inputs = [call.inputs[0].shape for call in self.calls.get(id(layer), ()) if call.inputs]
        return list(dict.fromkeys(map(tuple, inputs)))

    def code(self, variable):
        """The code of a kernel, or None."""
        return self.codes.get(id(variable))

    def name(self, layer, part):
        """A name for a part of a layer that no other layer has."""
        return unique_name(f"{layer.name}_{part}", self.names)


def surroundings(model, codes=None, recurrent_kernels=False):
    """Returns the `Surroundings` of the layers of a model."""
    called = collections.defaultdict(list)
    if has_graph(model):
        for call in calls(model):
            called[id(call.operation)].append(call)
    layers = model._flatten_layers()
    sequences = [layer for layer in layers if isinstance(layer, keras.Sequential)]
    return Surroundings(
        codes or {},
        called,
        frozenset(id(layer) for sequence in sequences for layer in sequence.layers),
        {layer.name for layer in layers},
        recurrent_kernels,
    )


def in_sequence(layer, layers, known, input_dtype=None):
    """Returns a `Sequential` of layers under the name of the one that they stand in for.

    Args:
        layer: The old layer.
        layers: List of unbuilt layers.
        known: `Surroundings`.
        input_dtype: Dtype of the inputs, where it is not the layers' own.
    """
    shapes = known.shapes(layer)
    inputs = []
    if input_dtype is not None or len(shapes) > 1:
        merged = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
        inputs = [keras.Input(batch_shape=merged, dtype=input_dtype)]
    with contextlib.ExitStack() as stack:
        for part in layers:
            stack.enter_context(zeros_at_first(part))
        return keras.Sequential([*inputs, *layers], name=layer.name, trainable=layer.trainable)


def reason_against_sequence(layer, known):
    """Returns why a `Sequential` cannot be called as the layer is, or None."""
    if len({len(shape) for shape in known.shapes(layer)}) > 1:
        return "it is called on tensors of different ranks"
    return None


def array(variable):
    """Returns a kernel as a float32 array."""
    return ops.convert_to_numpy(ops.cast(variable.value, "float32"))


def as_kernel(layer, attribute, known):
    """Returns `(float32 array, KernelAxes, Code or None)` of one of a layer's kernels."""
    variable = getattr(layer, attribute)
    return array(variable), kernel_axes(layer, attribute), known.code(variable)


# The kernel's own regularizer, constraint and random numbers do not fit its factors.
NOT_TAKEN_OVER = {"kernel_regularizer": None, "kernel_constraint": None}


def dense_factor(layer, units, name, **config):
    """Returns a `Dense` layer for a factor of another layer, without bias unless asked for."""
    settings = {"use_bias": False, "trainable": layer.trainable, "dtype": layer.dtype_policy}
    return keras.layers.Dense(units, name=name, **{**settings, **config})
