"""Least squares on activations: a smaller model learns the outputs of a larger one's layers."""

import collections
import dataclasses
import itertools
import math
import string

import keras
import numpy as np
from keras import ops

from keras_compaware._batches import batches, inputs_of
from keras_compaware._graph import Run, has_graph, trace
from keras_compaware._math.backend import compiled
from keras_compaware._text import text_table
from keras_compaware.base import check_integer, check_number
from keras_compaware.compaction.factorise import CONVOLUTIONS, each
from keras_compaware.compaction.factorise_layers import reason_against_equation
from keras_compaware.compaction.factorise_parts import array
from keras_compaware.compaction.rebuild import copy_weights, made_anew, zeros_at_first

_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense, *CONVOLUTIONS)
_TARGETS = (*_LINEAR, keras.layers.Embedding)


@dataclasses.dataclass(frozen=True)
class RecoveredRow:
    """What recovery did with one layer.

    Args:
        name: Path of the layer in the small model.
        before: Squared difference to the outputs of the layer that it replaces, before activations,
            over the variance of these, summed over units and examples.
        after: The same with the new weights, by the calibration data.
    """

    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class RecoverResult:
    """What recovery did; `print` shows a table.

    Args:
        rows: Tuple of `RecoveredRow`s, in the order of the layers.
    """

    rows: tuple

    def __str__(self):
        return text_table(
            ("layer", "error before", "after"),
            [(row.name, f"{row.before:.3g}", f"{row.after:.3g}") for row in self.rows],
        )


def recover(model, teacher, data, num_batches=None, ridge=1e-4):
    """Fits the last factor and the bias of factorised layers to a larger model's activations.

    Layer by layer, from the inputs to the outputs, for the layer of outputs Y (before its
    activation) in the teacher, and Z what its last factor reads in the model whose earlier layers
    are fitted already,

        argmin_{B, b} ||Z B + b - Y||^2 + ridge * mean(diag(Z^T Z)) * ||B - B_0||^2

    so that each layer also makes up for the errors of those before it, as the asymmetric
    reconstruction of Zhang et al. (2016, arXiv 1505.06798, section 3.3), there with the rank
    constraint on B and the activation in the loss. B_0 are the present weights; in the ridge Z is
    centred if there is a bias. Of a convolution Z are the patches, and each of its groups is a
    problem of its own. No labels are needed.

    What is fitted, frozen or not: Dense, EinsumDense and convolution layers that are the last in
    the `Sequential` that `compact` has put in the place of such a layer, or of an Embedding; or
    that read fewer channels than in the teacher, and return as many. All others stay as they are:
    also layers that are called several times, subclasses, quantized layers and those with LoRA,
    what `compact` has put around attention and recurrent layers, and batch normalisation. A bias of
    EinsumDense that differs along other axes than those of the kernel's outputs stays, too.

    Memory holds, for all batches, the tensors of both models that are still to be read, and the
    outputs Y of the layer under way; for one batch Z, and one matrix (columns of Z)^2. Sums over a
    batch are of float32, all else is of float64.

    Args:
        model: The small model. Its weights are changed.
        teacher: The model that it came from, with the same inputs and names of layers. It is not
            changed.
        data: Iterable of batches: x, or (x, y, ...), of which x is used; a generator serves once.
        num_batches: Integer of at least 1: how many batches are taken. Default None: all.
        ridge: Number of at least 0: pull towards the present weights. Default 1e-4. With 0, and
            too few data to tell, the nearest solution to the present weights is taken.

    Returns:
        A `RecoverResult`.

    Raises:
        TypeError: If a model is not a Keras model, or `data` are no batches.
        ValueError: If a model has no static graph, the models have no layer in common that could
            be fitted, there is no batch, a batch does not fit them, or activations are not finite.

    Example:
    >>> from keras_compaware import LowRank, compact, compress
    >>> rng = np.random.default_rng(0)
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(8, name="wide"), keras.layers.Dense(1)]
    ... )
    >>> _ = model.layers[0].kernel.assign(rng.normal(size=(8, 8)))
    >>> small = compact(compress(model, LowRank(rank=3))).model
    >>> x = rng.normal(size=(100, 3)) @ rng.normal(size=(3, 8)) + rng.normal(size=(100, 8))
    >>> print(recover(small, model, [x]))
    layer            error before  after
    ------------------------------------
    wide/wide_right  0.4           0.188
    """
    check_integer("recover", "num_batches", num_batches, 1, optional=True)
    check_number("recover", "ridge", ridge, 0.0, float("inf"))
    graphs = [_graph_of("model", model), _graph_of("teacher", teacher)]
    pairs = _pairs(*graphs)
    if not pairs:
        raise ValueError(
            f"recover: no layer of the model '{model.name}' stands for a layer of the teacher "
            f"'{teacher.name}' in fewer weights. Expected: a model that `compact` or `shrink` made "
            "of the teacher, so that layers have kept their names, with a Dense, EinsumDense or "
            "convolution layer in factors or with fewer input channels."
        )
    runs, teachers = [], []
    for batch in itertools.islice(batches("recover", data), num_batches):
        runs.append(Run(graphs[0], inputs_of("recover", model, batch)))
        teachers.append(Run(graphs[1], inputs_of("recover", teacher, batch)))
    if not runs:
        raise ValueError("recover: `data` yields no batch.")
    wanted = {id(call) for call in pairs.values()}
    targets, rows = {}, []
    for place, call in enumerate(graphs[0].calls[: max(pairs) + 1]):
        if place in pairs:
            target = id(pairs[place])
            while target not in targets:
                _step(teachers, wanted, targets)
            rows.append(_fit(call, runs, targets.pop(target), ridge))
        for run in runs:
            run.step()
    return RecoverResult(tuple(rows))


def _graph_of(name, model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"recover: `{name}` must be a keras.Model. Received: a {type(model).__name__}."
        )
    if not has_graph(model):
        raise ValueError(
            f"recover: `{name}`, the model '{model.name}' ({type(model).__name__}), has no static "
            "graph (subclassed, or not built), so it is not known what its layers read. Build it "
            "as a functional or Sequential model that begins with keras.Input(shape)."
        )
    return trace(model)


def _pairs(graph, teacher):
    """Returns for the place of each call that is fitted the teacher's call that it stands for."""
    targets = {call.path: call for call in _called_once(teacher) if _is_plain(call, _TARGETS)}
    once = set(map(id, _called_once(graph)))
    last = {}
    for place, call in enumerate(graph.calls):
        outer = call.path.rpartition("/")[0]
        last[outer if outer in targets else call.path] = place
    pairs = {}
    for path, target in targets.items():
        call = graph.calls[last[path]] if path in last else None
        if call is not None and id(call) in once and _stands_for(call, target):
            pairs[last[path]] = target
    return pairs


def _called_once(graph):
    number = collections.Counter(id(call.operation) for call in graph.calls)
    return [call for call in graph.calls if number[id(call.operation)] == 1]


def _is_plain(call, kinds):
    """Whether an operation is a layer of one of these classes, as Keras computes it."""
    layer = call.operation
    return (
        type(layer) in kinds
        and getattr(layer, "quantization_mode", None) is None
        and not getattr(layer, "lora_enabled", False)
    )


def _stands_for(call, target):
    if not _is_plain(call, _LINEAR) or call.outputs[0].shape != target.outputs[0].shape:
        return False
    layer, other = call.operation, target.operation
    if isinstance(layer, keras.layers.EinsumDense):
        equation = _expanded(layer.equation, len(call.inputs[0].shape))
        if reason_against_equation(*equation, is_elided=False) is not None:
            return False
    is_factor = call.path != target.path
    return is_factor or (
        type(layer) is type(other) and math.prod(layer.kernel.shape) < math.prod(other.kernel.shape)
    )


def _step(runs, wanted, targets):
    """Carries out the next call of each run; keeps its outputs before activation if wanted."""
    call = runs[0].call
    if id(call) in wanted:
        plain = _without_activation(call)
        targets[id(call)] = [_outputs(plain, run) for run in runs]
    for run in runs:
        run.step()


def _outputs(plain, run):
    args, kwargs = run.arguments()
    return ops.stop_gradient(plain(*args, **kwargs))


def _without_activation(call):
    """Returns a layer of the same weights that computes in float32, without an activation."""
    layer = call.operation
    config = {**layer.get_config(), "dtype": "float32", "activity_regularizer": None}
    if "activation" in config:
        config["activation"] = "linear"
    plain = made_anew(layer, config)
    with zeros_at_first(plain):
        plain.build(call.inputs[0].shape)
    copy_weights(layer, plain)
    return plain


def _fit(call, runs, targets, ridge):
    """Sets kernel and bias of the called layer; returns its `RecoveredRow`."""
    layer, plain, product = call.operation, _without_activation(call), _Product(call)
    summed = compiled(_sums)
    totals, number, centre, level = [0.0] * 7, 0, 0.0, None
    for run, target in zip(runs, targets, strict=True):
        error = product.written(target - _outputs(plain, run))
        target = product.written(target)
        read = product.read(ops.cast(run.values[id(call.inputs[0])], "float32"))
        if level is None:  # near the mean, so that float32 is exact enough
            level = ops.mean(target, axis=1, keepdims=True)
            centre = ops.mean(read, axis=1, keepdims=True) * product.has_bias
        sums = summed(read - centre, error, target - level)
        totals = [total + _float64(part) for total, part in zip(totals, sums, strict=True)]
        number += read.shape[1]
    if not all(np.isfinite(total).all() for total in totals):
        raise ValueError(
            f"recover: what the layer '{call.path}' reads, or should return, is not finite, "
            "because the data or weights are not."
        )
    gram, cross, reads, errors, square, levels, variance = totals
    before = square
    variance = max(variance - np.sum(levels**2) / number, np.finfo(np.float32).tiny)
    if product.has_bias:
        gram = gram - reads[:, :, None] * reads[:, None, :] / number
        cross = cross - reads[:, :, None] * errors[:, None, :] / number
        square = square - np.sum(errors**2) / number
    change = _solve(gram, cross, ridge)
    layer.kernel.assign(array(layer.kernel) + product.kernel(change))
    if product.has_bias:
        mean = reads[:, None, :] / number + _float64(centre)
        layer.bias.assign(array(layer.bias) + product.bias(errors / number - (mean @ change)[:, 0]))
    after = max(square + np.sum(change * (gram @ change - 2 * cross)), 0.0)
    return RecoveredRow(call.path, float(before / variance), float(after / variance))


def _sums(read, error, target):
    turned = ops.swapaxes(read, 1, 2)
    return (
        ops.matmul(turned, read),
        ops.matmul(turned, error),
        ops.sum(read, axis=1),
        ops.sum(error, axis=1),
        ops.sum(ops.square(error)),
        ops.sum(target, axis=1),
        ops.sum(ops.square(target)),
    )


def _float64(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def _solve(gram, cross, ridge):
    """Returns D of smallest norm with (gram + ridge * mean(diag(gram)) * I) D = cross, in stacks.

    What the rounding of the sums hides stays out.
    """
    size = gram.shape[1]
    values, vectors = np.linalg.eigh(gram)
    pulled = values + ridge * np.trace(gram, axis1=1, axis2=2)[:, None] / size
    seen = values > size * np.finfo(np.float32).eps * values[:, -1:]
    inverse = np.divide(1.0, pulled, out=np.zeros_like(pulled), where=seen)
    return vectors @ (inverse[:, :, None] * (np.swapaxes(vectors, 1, 2) @ cross))


class _Product:
    """What a layer adds its bias to, as one einsum of what it reads and its kernel.

    The indices of the einsum are batch ones (in all three: groups), free ones (examples and
    positions), reduced ones and made ones. Arrays are taken as stacks of matrices: of Z (batch,
    free, reduced), of Y (batch, free, made), of B (batch, reduced, made).

    Args:
        call: Call of a layer.
    """

    def __init__(self, call):
        self._layer = layer = call.operation
        if isinstance(layer, CONVOLUTIONS):
            self._letters = "nwgi", "wigo", "ngo"
            *window, inputs, outputs = layer.kernel.shape
            groups = layer.groups
            shape = (math.prod(window), inputs, groups, outputs // groups)
        else:
            equation = "...i,io->...o"
            if isinstance(layer, keras.layers.EinsumDense):
                equation = layer.equation
            self._letters = _expanded(equation, len(call.inputs[0].shape))
            shape = layer.kernel.shape
        inputs, kernel, outputs = self._letters
        self._sizes = dict(zip(kernel, shape, strict=True))
        self._batch = "".join(index for index in kernel if index in inputs and index in outputs)
        self._reduced = "".join(letter for letter in kernel if letter not in outputs)
        self._made = "".join(letter for letter in kernel if letter not in inputs)
        self._free = "".join(letter for letter in inputs if letter not in kernel)
        self.has_bias = layer.bias is not None and (
            not isinstance(layer, keras.layers.EinsumDense)
            or set(layer.bias_axes) == set(self._batch + self._made)
        )

    def read(self, x):
        """Returns Z (batch, free, reduced)."""
        if isinstance(self._layer, CONVOLUTIONS):
            window, channels, groups, _ = self._sizes.values()
            x = ops.reshape(_patches(self._layer, x), (-1, window, groups, channels))
        return self._matrices(x, self._letters[0], self._reduced)

    def written(self, y):
        """Returns Y (batch, free, made)."""
        if isinstance(self._layer, CONVOLUTIONS):
            *_, groups, outputs = self._sizes.values()
            y = ops.reshape(_channels_last(self._layer, y), (-1, groups, outputs))
        return self._matrices(y, self._letters[2], self._made)

    def _matrices(self, tensor, letters, role):
        sizes = dict(zip(letters, tensor.shape, strict=True))
        roles = self._batch, self._free, role
        tensor = ops.transpose(tensor, [letters.index(letter) for letter in "".join(roles)])
        return ops.reshape(tensor, [math.prod(sizes[letter] for letter in r) for r in roles])

    def kernel(self, matrices):
        """Folds an array (batch, reduced, made) into the shape of the kernel."""
        letters = self._batch + self._reduced + self._made
        return self._folded(matrices, letters, self._letters[1], self._layer.kernel.shape)

    def bias(self, rows):
        """Folds an array (batch, made) into the shape of the bias."""
        letters = self._batch + self._made
        order = [letter for letter in self._letters[2] if letter in letters]
        return self._folded(rows, letters, order, self._layer.bias.shape)

    def _folded(self, values, letters, order, shape):
        values = values.reshape([self._sizes[letter] for letter in letters])
        return values.transpose([letters.index(letter) for letter in order]).reshape(shape)


def _expanded(equation, ndim):
    """Returns the indices of inputs, kernel and outputs, with letters for those left out."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    elided = "".join(unused[: ndim - len(inputs.replace(".", ""))])
    return tuple(part.replace("...", elided) for part in (inputs, kernel, outputs))


def _channels_last(layer, x):
    return x if layer.data_format == "channels_last" else ops.moveaxis(x, 1, -1)


def _patches(layer, x):
    """Returns what each output of a convolution reads: (batch, positions..., window, channels)."""
    positions = list(layer.compute_output_shape(tuple(x.shape)))
    x = _channels_last(layer, x)
    positions = positions[1:-1] if layer.data_format == "channels_last" else positions[2:]
    steps = [each(layer, value) for value in (layer.strides, layer.dilation_rate)]
    pads, slices = [(0, 0)], []
    axes = zip(positions, x.shape[1:-1], layer.kernel_size, *steps, strict=True)
    for number, size, window, stride, dilation in axes:
        reach, covered = (window - 1) * dilation, (number - 1) * stride + 1
        missing = max(covered + reach - size, 0)
        left = {"valid": 0, "same": missing // 2, "causal": reach}[layer.padding]
        pads.append((left, max(missing - left, 0)))
        starts = range(0, reach + 1, dilation)
        slices.append([slice(start, start + covered, stride) for start in starts])
    x = ops.pad(x, [*pads, (0, 0)])
    return ops.stack([x[(slice(None), *part)] for part in itertools.product(*slices)], axis=-2)
