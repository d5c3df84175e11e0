"""Compaction: the same function in fewer parameters."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_compaware._graph import has_graph, trace
from keras_compaware._text import text_table
from keras_compaware.compaction.dead_channels import live_channels
from keras_compaware.compaction.factorise import cut_code
from keras_compaware.compaction.factorise_parts import Parts, surroundings
from keras_compaware.compaction.factorise_table import fall_apart
from keras_compaware.compaction.rebuild import clone
from keras_compaware.compaction.shrink import shrink
from keras_compaware.compaction.strip import compile_plainly, stripped_layer
from keras_compaware.coupling import analyse
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
class ChannelRow:
    """How many channels of a space compaction has left.

    Args:
        name: Name of the space.
        before: Number of channels before.
        after: Number of channels after: those that something reads.
    """

    name: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class CompactResult:
    """A compacted model and how it came about; `print` shows tables.

    Args:
        model: The new model: plain Keras layers only, unless recurrent kernels were split.
        rows: Tuple of `CompactRow`s, one for each layer that was considered for factors.
        max_error: Largest difference between the outputs of the two models on random inputs,
            relative to the largest output.
        channels: Tuple of `ChannelRow`s, one for each space that lost channels.
        whole: The model before its kernels were split into factors; the given one if no channels
            were removed. `export.save_codes` encodes its kernels.
        codes: The given codes, as they fit `whole`.
    """

    model: keras.Model
    rows: tuple
    max_error: float
    channels: tuple
    whole: keras.Model
    codes: dict

    def __str__(self):
        layers = text_table(
            ("layer", "class", "parameters", "what happened"),
            [(row.name, row.layer, f"{row.before} -> {row.after}", row.note) for row in self.rows],
        )
        if not self.channels:
            return layers
        channels = text_table(
            ("channels that nothing reads are removed", "channels"),
            [(row.name, f"{row.before} -> {row.after}") for row in self.channels],
        )
        return f"{channels}\n\n{layers}"


def compact(model, codes=None, recurrent_kernels=False):
    """Returns a smaller model that computes the same function, in plain Keras layers.

    Straight-through wrappers are replaced by their layers with the compressed kernels, and the
    regularizers, constraints and optimizer wrapper of this package are taken off. Channels that
    nothing reads are removed (see `shrink`): all weights that could read them are zero, or belong
    to channels that nothing reads. Then layers whose kernels have low rank fall apart, provided
    that this saves parameters and multiply-accumulates:

    - Dense, EinsumDense and convolution layers become a `Sequential` of two layers (of three, a
      convolution whose input and output modes have low rank: Tucker-2) under the old name.
    - An Embedding becomes a `Sequential` of a narrow one and a Dense layer; this saves parameters
      only.
    - LSTM, GRU, SimpleRNN and RNN layers with their cells become a `Sequential` of a Dense layer
      and the recurrent one, by the rank of the input kernel; Bidirectional ones, by that of both
      input kernels side by side. Dropout of the inputs moves in front of the Dense layer.
    - Before the inputs of attention layers whose projections have low rank, and behind their
      output, there are Dense layers. Around a recurrent layer that takes or returns states, as
      well, the layers stand in the model themselves, since a `Sequential` hands on one tensor.

    No recipe is needed: zeros and ranks are read off the kernels. The file of the new model loads
    with plain `keras.models.load_model`.

    Regularizers of the kernel are not taken over to its factors. A compiled model stays compiled,
    with a fresh optimizer of the same configuration.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        codes: Mapping from target names to `Code`s of factors, as a `CompressionCallback`
            leaves them in `codes` when it has quantized the factors of a low-rank kernel: these
            factors are taken, where a decomposition would find others that are not quantized.
            They lose the removed channels like the kernels.
        recurrent_kernels: Whether recurrent kernels of low rank are split, too: the cells become
            `layers.LowRankLSTMCell` and the like, so that `import keras_compaware` must come before
            the file of the new model is loaded. Default False.

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
    given, given_codes = model, dict(codes or {})
    factors = _known_codes(model, given_codes)
    model, channels, factors = _without_dead_channels(_without_wrappers(model), factors)
    whole, whole_codes = (model, factors) if channels else (given, given_codes)
    known = surroundings(model, _by_variable(model, factors), recurrent_kernels)
    rows, copies = [], []

    def change(layer):
        new, fill = stripped_layer(layer)
        found = _parts(layer, known) if layer.built else None
        if isinstance(found, Parts):
            new, fill = found.new, found.fill
        if found is not None:
            rows.append(_row(layer, found))
        copies.append((layer, new, fill))
        return new, None

    small = clone(model, change)
    for layer, new, fill in copies:
        fill(new)
        if not layer.trainable:  # the layers inside attention are made when it is built
            for part in new._flatten_layers():
                part.trainable = False
    compile_plainly(small)
    error = _compare(given, small)
    return CompactResult(small, tuple(rows), error, channels, whole, whole_codes)


def _without_wrappers(model):
    """Returns the model with its straight-through layers replaced by plain ones, if it has any."""
    if not compressed_layers(model):
        return model
    copies = []

    def change(layer):
        _refuse_hidden_wrappers(layer.layer if isinstance(layer, Compressed) else layer)
        new, fill = stripped_layer(layer)
        copies.append((new, fill))
        return new, None

    plain = clone(model, change)
    for new, fill in copies:
        fill(new)
    return plain


def _refuse_hidden_wrappers(outer):
    for layer in compressed_layers(outer):
        raise ValueError(
            f"compact: the straight-through wrapper of '{layer.layer.name}' is inside another "
            "layer and cannot be taken off. Wrap the outer layer instead: "
            "Compressed(TimeDistributed(...))."
        )


def _without_dead_channels(model, codes):
    """Returns `(model without channels that nothing reads, rows, codes cut like their kernels)`."""
    if not has_graph(model):
        return model, (), codes
    analysis = analyse(model)
    masks = live_channels(analysis)
    if not masks:
        return model, (), codes
    rows = tuple(
        ChannelRow(name, mask.size, int(np.count_nonzero(mask))) for name, mask in masks.items()
    )
    variables = {target.name: target.variables[0] for target in find_targets(model)[0]}
    keep, bindings = analysis.keep(masks), analysis.flow.bindings.values()
    cut = {}
    for name, code in codes.items():
        axes = {b.axis: keep.mask(b.ids) for b in bindings if b.variable is variables[name]}
        cut[name] = cut_code(code, axes)
    return shrink(model, masks), rows, cut


def _known_codes(model, codes):
    """Returns the codes of factors, by the names of their kernels."""
    known = {target.name for target in find_targets(model)[0]}
    for name in codes:
        if name not in known:
            raise ValueError(
                f"compact: there is no kernel '{name}', for which `codes` has a code. Kernels of "
                f"the model '{model.name}': {', '.join(sorted(known)) or 'none'}."
            )
    return {name: code.plain() for name, code in codes.items() if code.split is not None}


def _by_variable(model, codes):
    targets = find_targets(model)[0] if codes else ()
    return {id(t.variables[0]): codes[t.name] for t in targets if t.name in codes}


def _parts(layer, known):
    try:
        return fall_apart(layer, known)
    except ValueError as error:
        raise ValueError(f"compact: '{layer.name}': {error}") from error


def _row(layer, found):
    before = sum(math.prod(weight.shape) for weight in layer.weights)
    kind = type(layer).__name__
    if not isinstance(found, Parts):
        return CompactRow(layer.name, kind, before, before, f"as it is: {found}")
    return CompactRow(layer.name, kind, before, before - found.saved, found.note)


def _compare(model, small):
    is_sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs[0] if is_sequential else model.input
    limits = _limits(model)
    inputs = keras.tree.map_structure(lambda t: _random_input(t, limits.get(id(t), 1)), inputs)
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


def _limits(model):
    """Numbers of values that inputs may take which are read by embeddings only, by their ids."""
    if not has_graph(model):
        return {}
    graph = trace(model)
    limits = {}
    for declared, tensor in zip(model.inputs, graph.inputs, strict=True):
        readers = [c.operation for c in graph.calls if any(t is tensor for t in c.inputs)]
        tables = [r for r in readers if isinstance(r, keras.layers.Embedding)]
        # Besides a table, the inputs are compared with zero: its mask.
        if tables and all(r in tables or type(r).__name__ == "NotEqual" for r in readers):
            limits[id(declared)] = min(table.input_dim for table in tables)
    return limits


def _random_input(tensor, limit):
    shape = [
        2 if axis == 0 and size is None else size or 32 for axis, size in enumerate(tensor.shape)
    ]
    rng = np.random.default_rng(0)
    if tensor.dtype == "string":
        return ops.zeros(shape, tensor.dtype)
    if "float" not in tensor.dtype:
        return ops.convert_to_tensor(rng.integers(limit, size=shape), tensor.dtype)
    values = rng.uniform(-1.0, 1.0, shape)
    return ops.cast(values, tensor.dtype)
