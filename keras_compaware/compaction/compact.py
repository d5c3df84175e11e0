"""Compaction: the same function in fewer parameters."""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_compaware._graph import calls, has_graph
from keras_compaware._text import text_table
from keras_compaware.compaction.factorise import (
    FACTORISABLE,
    factorised_layer,
    find_factorisation,
)
from keras_compaware.compaction.rebuild import clone
from keras_compaware.compaction.strip import compile_plainly, plain_config, stripped_layer
from keras_compaware.kernels import find_targets
from keras_compaware.layers import Compressed
from keras_compaware.layers.compressed import compressed_layers

TOLERANCE = 1e-3
_ROUNDINGS = 32  # of the compute dtype: two layers round more often than one


@dataclasses.dataclass(frozen=True)
class CompactRow:
    """What compaction did with one layer.

    Args:
        name: Name of the layer.
        layer: Class name.
        before: Number of parameters before.
        after: Number of parameters after.
        note: What was done, or why nothing was.
    """

    name: str
    layer: str
    before: int
    after: int
    note: str


@dataclasses.dataclass(frozen=True)
class CompactResult:
    """A compacted model and how it came about; `print` shows a table.

    Args:
        model: The new model: plain Keras layers only.
        rows: Tuple of `CompactRow`s, one for each layer that was considered.
        max_error: Largest difference between the outputs of the two models on random inputs,
            relative to the largest output.
    """

    model: keras.Model
    rows: tuple
    max_error: float

    def __str__(self):
        return text_table(
            ("layer", "class", "parameters", "what happened"),
            [(row.name, row.layer, f"{row.before} -> {row.after}", row.note) for row in self.rows],
        )


def compact(model, codes=None):
    """Returns a smaller model that computes the same function, in plain Keras layers.

    Straight-through wrappers are replaced by their layers with the compressed kernels, and the
    regularizers, constraints and optimizer wrapper of this package are taken off; then every Dense
    and convolution layer whose kernel has low rank becomes a `Sequential` of two layers (of three,
    a convolution whose input and output modes have low rank: Tucker-2) under the old name,
    provided that this saves parameters and multiply-accumulates. No recipe is needed: ranks are
    read off the kernels. The file of the new model loads with plain `keras.models.load_model`.

    Regularizers of the kernel are not taken over to its factors. A compiled model stays compiled,
    with a fresh optimizer of the same configuration.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        codes: Mapping from target names to `Code`s of factors, as a `CompressionCallback`
            leaves them in `codes` when it has quantized the factors of a low-rank kernel: these
            factors are taken, where a decomposition would find others that are not quantized.

    Returns:
        A `CompactResult`.

    Raises:
        ValueError: If the model is subclassed, or a code does not belong to its kernel.
        RuntimeError: If the outputs of the new model differ from those of the old one.

    Example:
    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="wide")])
    >>> _ = model.layers[0].kernel.assign(np.outer(np.arange(64.0), np.ones(64)))
    >>> print(compact(model))
    layer  class  parameters   what happened
    ----------------------------------------
    wide   Dense  4160 -> 192  rank 1 of 64
    """
    rows, fills = [], []
    sizes = _input_sizes(model)
    codes = _codes_by_variable(model, codes or {})

    def change(layer):
        inner = layer.layer if isinstance(layer, Compressed) else layer
        _refuse_hidden_wrappers(inner)
        new, fill = stripped_layer(layer)
        if isinstance(inner, FACTORISABLE) and inner.built:
            code = codes.get(id(inner.kernel))
            reason, found = _factorisation(layer, inner, sizes.get(id(layer), ()), code)
            if found is not None:
                new, fill = factorised_layer(inner, found, plain_config(inner))
            rows.append(_row(inner, found, reason))
        fills.append((new, fill))
        return new, None

    small = clone(model, change)
    for new, fill in fills:
        fill(new)
    compile_plainly(small)
    max_error = _compare(model, small)
    return CompactResult(small, tuple(rows), max_error)


def _input_sizes(model):
    """Returns the shapes of what each layer is called on, by the layer's id."""
    sizes = collections.defaultdict(list)
    if has_graph(model):
        for call in calls(model):
            sizes[id(call.operation)] += [tensor.shape for tensor in call.inputs[:1]]
    return sizes


def _refuse_hidden_wrappers(outer):
    for layer in compressed_layers(outer):
        raise ValueError(
            f"compact: the straight-through wrapper of '{layer.layer.name}' is inside another "
            "layer and cannot be taken off. Wrap the outer layer instead: "
            "Compressed(TimeDistributed(...))."
        )


def _codes_by_variable(model, codes):
    known = {target.name: id(target.variables[0]) for target in find_targets(model)[0]}
    for name in codes:
        if name not in known:
            raise ValueError(
                f"compact: there is no kernel '{name}', for which `codes` has a code. Kernels of "
                f"the model '{model.name}': {', '.join(known) or 'none'}."
            )
    return {known[name]: code.plain() for name, code in codes.items() if code.split is not None}


def _factorisation(layer, inner, input_shapes, code):
    """Returns `(reason, None)` or `("", Factorisation)`."""
    if type(inner) not in FACTORISABLE:
        return (
            f"a subclass of a Keras layer ({type(inner).__name__}) may compute something else",
            None,
        )
    if getattr(inner, "quantization_mode", None) is not None:
        return f"quantized by Keras ({inner.quantization_mode})", None
    if getattr(inner, "lora_enabled", False):
        return "LoRA is enabled", None
    kernel = inner.kernel.value
    if isinstance(layer, Compressed):
        for target, forward in layer.forward_kernels():
            if target.variables[0] is inner.kernel:
                kernel = forward
    kernel = ops.convert_to_numpy(ops.cast(kernel, "float32"))
    try:
        found = find_factorisation(inner, kernel, input_shapes, code)
    except ValueError as error:
        raise ValueError(f"compact: '{inner.name}': {error}") from error
    return (found, None) if isinstance(found, str) else ("", found)


def _row(layer, found, reason):
    before = sum(math.prod(weight.shape) for weight in layer.weights)
    if found is None:
        return CompactRow(layer.name, type(layer).__name__, before, before, f"as it is: {reason}")
    after = before - math.prod(layer.kernel.shape) + found.num_parameters
    note = str(found)
    if not isinstance(layer, keras.layers.Dense):
        note += ", Tucker-2" if found.form == "tucker" else f", {found.form} split"
    return CompactRow(layer.name, type(layer).__name__, before, after, note)


def _compare(model, small):
    is_sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs[0] if is_sequential else model.input
    inputs = keras.tree.map_structure(_random_input, inputs)
    expected = keras.tree.flatten(model(inputs, training=False))
    received = keras.tree.flatten(small(inputs, training=False))
    error = 0.0
    for before, after in zip(expected, received, strict=True):
        before = ops.convert_to_numpy(ops.cast(before, "float32"))
        after = ops.convert_to_numpy(ops.cast(after, "float32"))
        scale = max(float(np.max(np.abs(before))), float(np.finfo(np.float32).tiny))
        error = max(error, float(np.max(np.abs(before - after))) / scale)
    tolerance = max(TOLERANCE, _ROUNDINGS * _coarsest_epsilon(model))
    if not error <= tolerance:
        raise RuntimeError(
            f"compact: the outputs of the new model differ by {error:.2g} (relative), more than "
            f"{tolerance:g}, so it is not returned. Please report the model's architecture; a "
            "layer whose output depends on more than its inputs and weights can be the reason."
        )
    return error


def _coarsest_epsilon(model):
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    digits = {"bfloat16": 7, "float16": 10}
    return max((2.0 ** -digits[dtype] for dtype in dtypes if dtype in digits), default=0.0)


def _random_input(tensor):
    shape = [
        2 if axis == 0 and size is None else size or 32 for axis, size in enumerate(tensor.shape)
    ]
    if "float" not in tensor.dtype:
        return ops.zeros(shape, tensor.dtype)
    values = np.random.default_rng(0).uniform(-1.0, 1.0, shape)
    return ops.cast(values, tensor.dtype)
