"""Which layer has which kernels: from a model to targets, in one table."""

import dataclasses
import itertools
import math
import re

import keras

from keras_compaware._graph import head_layers
from keras_compaware.base import KernelAxes, Target

_RULES = {}


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A kernel or layer that no map can be applied to, with the reason.

    Args:
        name: Path of the layer or kernel in the tree of layers.
        layer: The layer.
        reason: Text.
    """

    name: str
    layer: object
    reason: str


def register_kernels(layer_class, **kernels):
    """Tells which attributes of a layer class are kernels, and their axes.

    The nearest class in a layer's method resolution order counts, so subclasses inherit the entry.

    Args:
        layer_class: Subclass of `keras.layers.Layer`.
        **kernels: By attribute name: a `KernelAxes`, or a function `layer -> KernelAxes`, which may
            return None for a layer that does without this kernel.

    Example:
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.mixing = self.add_weight(shape=(input_shape[-1], 4))
    >>> register_kernels(Scale, mixing=KernelAxes(inputs=(0,), outputs=(1,)))
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(
            f"`layer_class` must be a class of Keras layers. Received: {layer_class!r}."
        )
    for name, axes in kernels.items():
        if not isinstance(axes, KernelAxes) and not callable(axes):
            raise TypeError(
                f"register_kernels({layer_class.__name__}): `{name}` must be a KernelAxes or a "
                f"function of the layer that returns one. Received: {axes!r}."
            )
    _RULES[layer_class] = dict(kernels)


def _convolution(layer):
    rank = layer.rank
    return KernelAxes((rank,), (rank + 1,), tuple(range(rank)), groups=layer.groups)


def _transposed_convolution(layer):
    rank = layer.rank  # kernel (window..., outputs, inputs)
    return KernelAxes((rank + 1,), (rank,), tuple(range(rank)))


def _depthwise(layer):
    rank = layer.rank  # kernel (window..., channels, multiplier): one small map per channel
    return KernelAxes((), (rank + 1,), tuple(range(rank)))


def _pointwise(layer):
    rank = layer.rank
    return KernelAxes((rank,), (rank + 1,), tuple(range(rank)))


def _einsum(layer):
    inputs, rest = layer.equation.replace(" ", "").split(",")
    kernel, outputs = rest.split("->")
    reduced = tuple(i for i, letter in enumerate(kernel) if letter not in outputs)
    made = tuple(i for i, letter in enumerate(kernel) if letter in outputs and letter not in inputs)
    return KernelAxes(reduced, made)


_MATRIX = KernelAxes((0,), (1,))

register_kernels(keras.layers.Dense, kernel=_MATRIX)
for _layer in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
    register_kernels(_layer, kernel=_convolution)
for _layer in (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D):
    register_kernels(_layer, kernel=_depthwise)
for _layer in (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D):
    register_kernels(_layer, depthwise_kernel=_depthwise, pointwise_kernel=_pointwise)
for _layer in (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
):
    register_kernels(_layer, kernel=_transposed_convolution)
register_kernels(keras.layers.EinsumDense, kernel=_einsum)
register_kernels(keras.layers.Embedding, embeddings=_MATRIX)
register_kernels(
    keras.layers.ReversibleEmbedding,
    embeddings=_MATRIX,
    reverse_embeddings=lambda layer: None if layer.tie_weights else _MATRIX,
)
# The gates of a recurrent layer lie side by side along its outputs.
for _layer in (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell):
    register_kernels(_layer, kernel=_MATRIX, recurrent_kernel=_MATRIX)


def find_targets(model):
    """Returns `(targets, skipped)` of a model or layer, in the order of its layers.

    A variable that several layers share is one target. Layers without a weight of two or more
    dimensions (activations, normalisation, biases) are not mentioned at all.
    """
    targets, skipped, seen = {}, [], {}
    heads = head_layers(model) if isinstance(model, keras.Model) else ()
    heads = {id(inner) for layer in heads for inner in layer._flatten_layers()}
    names = set()
    for path, layer in walk(model):
        rule = _rule_for(layer)
        if rule is None:
            skipped += _unknown(path, layer)
            continue
        reason = _reason_against(layer)
        if reason:
            skipped.append(Skipped(path, layer, reason))
            continue
        for attribute, axes in rule.items():
            axes = axes if isinstance(axes, KernelAxes) else axes(layer)
            if axes is None:
                continue
            variable = getattr(layer, attribute)
            name = unique_name(f"{path}/{attribute}" if path else attribute, names)
            if id(variable) in seen:
                first = seen[id(variable)]
                known = targets[first]
                targets[first] = dataclasses.replace(known, aliases=(*known.aliases, name))
                continue
            axes.batch(len(variable.shape))
            if 0 in variable.shape:
                skipped.append(Skipped(name, layer, f"it has no entries: {tuple(variable.shape)}"))
                continue
            seen[id(variable)] = name
            targets[name] = Target(name, (variable,), axes, layer, (), id(layer) in heads)
    return list(targets.values()), skipped


def kernel_axes(layer, attribute):
    """Returns the `KernelAxes` of one of a layer's kernels, which its class has registered."""
    axes = _rule_for(layer)[attribute]
    return axes if isinstance(axes, KernelAxes) else axes(layer)


def walk(layer, path="", visited=None):
    """Yields `(path, layer)` for a layer and everything inside it, each layer once."""
    visited = set() if visited is None else visited
    if id(layer) in visited:
        return
    visited.add(id(layer))
    yield path, layer
    for child in layer._flatten_layers(include_self=False, recursive=False):
        # A wrapper that bears the name of what it wraps is no level of its own.
        same = isinstance(layer, keras.layers.Wrapper) and child.name == layer.name
        yield from walk(child, path if same else f"{path}/{child.name}".lstrip("/"), visited)


def _rule_for(layer):
    for kind in type(layer).__mro__:
        if kind in _RULES:
            return _RULES[kind]
    return None


def _reason_against(layer):
    if not layer.built:
        return "not built yet: call the model on data, or give its first layer an input shape"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantized by Keras ({layer.quantization_mode})"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled: its kernel is a sum of several variables"
    if not layer.trainable:
        return "frozen (trainable=False)"
    return None


def _unknown(path, layer):
    """Reasons for the weights of two or more dimensions that a layer without a rule owns itself."""
    inside = {
        id(variable)
        for child in layer._flatten_layers(include_self=False, recursive=False)
        for variable in child.variables
    }
    own = [v for v in layer.weights if id(v) not in inside and len(v.shape) > 1]
    if not own:
        return []
    kind = type(layer).__name__
    return [
        Skipped(
            f"{path}/{variable.name}".lstrip("/"),
            layer,
            f"no rule for the layer {kind}: register_kernels({kind}, {variable.name}=...)",
        )
        for variable in own
        if math.prod(variable.shape) > 1
    ]


def unique_name(name, names):
    """Returns a name that is not among `names`, numbered if need be, and adds it to them."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    unique = next(candidate for candidate in candidates if candidate not in names)
    names.add(unique)
    return unique


def matches(where, target):
    """Returns whether a selection takes a target (or a `Skipped`).

    Args:
        where: None (all but the layers that produce the model's outputs), a regular expression
            that is searched in the name, a layer, a class of layers, or a function of the target.
        target: A `Target` or `Skipped`.
    """
    if where is None:
        return not getattr(target, "is_head", False)
    if isinstance(where, str):
        return any(
            re.search(where, name) for name in (target.name, *getattr(target, "aliases", ()))
        )
    if isinstance(where, type):
        return isinstance(target.layer, where)
    if isinstance(where, keras.layers.Layer):
        return target.layer is where or target.layer in where._flatten_layers()
    return bool(where(target))


def reason_to_skip(subject, target):
    """Returns why a compressor or regularizer has nothing to gain on a target, or None.

    Raises:
        ValueError: If its arguments do not fit the target, named in the message.
    """
    check = getattr(subject, "reason_to_skip", None)
    if check is None:
        return None
    try:
        return check(target.shape, target.axes)
    except ValueError as error:
        raise ValueError(f"Target '{target.name}': {error}") from error


def check_where(owner, where):
    """Raises unless `where` is a kind of selection that `matches` knows."""
    if isinstance(where, str):
        try:
            re.compile(where)
        except re.error as error:
            raise ValueError(
                f"{owner}: `where` is not a valid regular expression: {where!r} ({error})."
            ) from error
        return
    known = where is None or isinstance(where, keras.layers.Layer) or callable(where)
    if isinstance(where, type):
        known = issubclass(where, keras.layers.Layer)
    if not known:
        raise TypeError(
            f"{owner}: `where` must be a regular expression on target names, a layer, a class of "
            f"layers, a function of a target, or None. Received: {where!r}."
        )
