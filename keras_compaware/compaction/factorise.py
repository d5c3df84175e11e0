"""Kernels of low rank as two or three factors."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_compaware._math.axes import matricise, matrix_shape, tensor_shape
from keras_compaware._math.svd import above_rounding, svd
from keras_compaware.kernels import kernel_axes

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
FACTORISABLE = (
    keras.layers.Dense,
    *CONVOLUTIONS,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
)

# form -> names of its layers, first to last, each with the window axes that it takes care of
FORMS = {
    "channel": {"left": slice(None), "right": slice(0, 0)},
    "spatial": {"left": slice(0, 1), "right": slice(1, None)},
    "tucker": {"input": slice(0, 0), "core": slice(None), "output": slice(0, 0)},
}


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """Factors that stand in for a kernel.

    Args:
        form: "channel" or "spatial" (two factors), or "tucker" (three).
        ranks: The rank of each of the kernel's matrices, or the two ranks of its unfoldings.
        full_ranks: The largest that they could be.
        kernels: Kernels of the layers by name, first to last.
    """

    form: str
    ranks: tuple
    full_ranks: tuple
    kernels: dict

    def __str__(self):
        of = [f"{rank} of {full}" for rank, full in zip(self.ranks, self.full_ranks, strict=True)]
        return f"rank {of[0]}" if len(of) == 1 else f"ranks {' and '.join(of)}"

    @property
    def num_parameters(self):
        return sum(kernel.size for kernel in self.kernels.values())


def find_factorisation(layer, kernel, input_shapes=(), code=None):
    """Returns the `Factorisation` that saves most without loss, or the reason why there is none.

    The ranks are the numerical ones: singular values of at most max(m, n) * 2^-23 times the largest
    count as zero. A factorisation must save parameters and multiply-accumulates (of an `Embedding`,
    which multiplies nothing, parameters).

    Args:
        layer: A layer of one of the `FACTORISABLE` classes.
        kernel: Its kernel, a float32 array.
        input_shapes: Shapes of the tensors that the layer is called on. With strides, or without
            padding, the first of several convolutions runs at more positions than the last; how
            many is known from these only.
        code: The kernel's `Code` of factors, if there is one: these factors are taken.
    """
    axes = kernel_axes(layer, kernel_name(layer))
    if code is not None:
        found = [_coded(kernel, axes, code)]
    else:
        window = [kernel.shape[axis] for axis in axes.spatial]
        forms = ["channel"]
        forms += ["spatial"] if max(window[1:], default=1) > 1 else []
        forms += ["tucker"] if math.prod(window) > 1 else []
        found = (_decomposed(kernel, axes, form) for form in forms)
    best, reasons = None, []
    for candidate in found:
        if not _saves(layer, kernel, input_shapes, candidate):
            reasons.append(_saves_nothing(candidate))
        elif best is None or candidate.num_parameters < best.num_parameters:
            best = candidate
    return best if best is not None else "; ".join(reasons)


def find_shared_factors(kernels, extra=0):
    """Returns the `Factorisation` of kernels that read the same inputs, or why there is none.

    Side by side they are one matrix: its left factor is "left", each kernel's share of the right
    one has the kernel's name.

    Args:
        kernels: Dict from names to `(float32 array, KernelAxes, Code or None)`; the axes of the
            inputs come before those of the outputs, and there are no others. With a code, the
            factors of each kernel are its own, and their ranks add up.
        extra: Integer: further parameters that each unit of rank costs.
    """
    rows = None
    matrices = []
    for kernel, axes, _ in kernels.values():
        rows = kernel.shape[: len(axes.inputs)]
        matrices.append(kernel.reshape(math.prod(rows), -1))
    widths = [matrix.shape[1] for matrix in matrices]
    if any(code is not None for *_, code in kernels.values()):
        left, right = _side_by_side(kernels.values(), widths)
    else:
        left, right = _factors(np.concatenate(matrices, axis=1)[None])
    rank = left.shape[-1]
    parts = {"left": left.reshape(*rows, rank)}
    shares = np.split(right.reshape(rank, -1), np.cumsum(widths)[:-1], axis=1)
    for (name, (kernel, axes, _)), share in zip(kernels.items(), shares, strict=True):
        parts[name] = share.reshape(rank, *kernel.shape[len(axes.inputs) :])
    full_rank = min(math.prod(rows), sum(widths))
    found = Factorisation("channel", (rank,), (full_rank,), parts)
    saves = found.num_parameters + extra * rank < sum(matrix.size for matrix in matrices)
    return found if saves else _saves_nothing(found)


def _side_by_side(kernels, widths):
    """The factors of each kernel by itself, in blocks of a joint pair of factors."""
    lefts, blocks = [], []
    for number, (kernel, axes, code) in enumerate(kernels):
        own = _coded(kernel, axes, code) if code else _decomposed(kernel, axes, "channel")
        rank = own.ranks[0]
        lefts.append(own.kernels["left"].reshape(-1, rank))
        around = (sum(widths[:number]), sum(widths[number + 1 :]))
        blocks.append(np.pad(own.kernels["right"].reshape(rank, -1), ((0, 0), around)))
    return np.concatenate(lefts, axis=1), np.concatenate(blocks)


def kernel_name(layer):
    """Returns the name of the attribute that is the kernel of a layer with one kernel."""
    return "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"


def _saves_nothing(found):
    verb = "saves" if len(found.ranks) == 1 else "save"
    return f"{found} ({found.form}) {verb} nothing"


def _decomposed(kernel, axes, form):
    """Returns the `Factorisation` that a decomposition finds."""
    if form == "tucker":
        return _decomposed_by_tucker(kernel, axes)
    matrix, _ = matricise(ops.convert_to_tensor(kernel, "float32"), axes, form)
    left, right = _factors(matrix)
    return _factorisation(kernel, axes, form, {"left": left, "right": right})


def _factors(matrix):
    """Returns two factors of a stack of matrices, its singular values shared evenly."""
    left, values, right = _svd(matrix)
    rank = _numerical_rank(values, matrix.shape[1:])
    root = np.sqrt(values[:, :rank])
    return left[:, :, :rank] * root[:, None, :], right[:, :rank, :] * root[:, :, None]


def _decomposed_by_tucker(kernel, axes):
    stack, window, inputs, outputs = tensor_shape(kernel.shape, axes)
    matrix, _ = matricise(ops.convert_to_tensor(kernel, "float32"), axes)
    tensor = ops.convert_to_numpy(matrix).reshape(stack, window, inputs, outputs)
    bases = []
    for axis in (2, 3):
        unfolding = np.moveaxis(tensor, axis, 1).reshape(stack, tensor.shape[axis], -1)
        left, values, _ = _svd(unfolding)
        bases.append(left[:, :, : _numerical_rank(values, unfolding.shape[1:])])
    p, q = bases
    core = np.swapaxes(p, 1, 2)[:, None] @ tensor @ q[:, None]
    parts = {"input": p, "core": core, "output": np.swapaxes(q, 1, 2)}
    return _factorisation(kernel, axes, "tucker", parts)


def _coded(kernel, axes, code):
    """Returns the `Factorisation` by the factors of a code."""
    parts = {
        name: ops.convert_to_numpy(code.parts[name]).astype("float32") for name in FORMS[code.split]
    }
    form = code.split
    split = "channel" if form == "tucker" else form
    matrix, fold = matricise(ops.zeros(kernel.shape, "float32"), axes, split)
    if form == "tucker":
        first, core, last = parts.values()
        product = (first[:, None] @ core @ last[:, None]).reshape(matrix.shape)
    else:
        product = parts["left"] @ parts["right"]
    same = product.shape == tuple(matrix.shape)
    if same:
        restored = ops.convert_to_numpy(fold(ops.convert_to_tensor(product)))
        same = np.max(np.abs(restored - kernel)) <= 1e-4 * np.max(np.abs(kernel))
    if not same:
        raise ValueError(
            "the kernel has changed since its code was made. Expected: the codes of the callback "
            "that ended the last training of this very model, `callback.codes`; without codes, "
            "compact() decomposes the kernels."
        )
    return _factorisation(kernel, axes, form, parts)


def cut_code(code, masks):
    """Returns a code of factors without what belongs to removed channels of its kernel.

    Args:
        code: A `Code` whose parts are arrays.
        masks: Dict from axes of the kernel to boolean masks of what is kept along them.
    """
    kept = np.ones(code.shape, "float32")
    for axis, mask in masks.items():
        np.moveaxis(kept, axis, 0)[~mask] = 0
    split = "channel" if code.split == "tucker" else code.split
    matrix, _ = matricise(ops.convert_to_tensor(kept), code.axes, split)
    matrix = ops.convert_to_numpy(matrix) > 0
    stack = matrix.any(axis=(1, 2))
    rows, columns = matrix[stack][0].any(axis=1), matrix[stack][0].any(axis=0)
    parts = {name: ops.convert_to_numpy(part) for name, part in code.parts.items()}
    parts = {name: part[stack] for name, part in parts.items()}
    if code.split == "tucker":
        rows = rows.reshape(-1, parts["input"].shape[1]).any(axis=0)
        parts |= {"input": parts["input"][:, rows], "output": parts["output"][:, :, columns]}
    else:
        parts |= {"left": parts["left"][:, rows], "right": parts["right"][:, :, columns]}
    return dataclasses.replace(code, parts=parts)


def _svd(matrix):
    return [ops.convert_to_numpy(part) for part in svd(ops.convert_to_tensor(matrix))]


def _factorisation(kernel, axes, form, parts):
    """Returns the `Factorisation` with stacks of factors folded into kernels of layers."""
    if form == "tucker":
        full_ranks = tensor_shape(kernel.shape, axes)[2:]
        ranks = parts["core"].shape[2:]
    else:
        full_ranks = (min(matrix_shape(kernel.shape, axes, form)[1:]),)
        ranks = parts["left"].shape[2:]
        if not axes.spatial and axes.groups == 1:
            kernels = _plain_kernels(kernel.shape, axes, *ranks, **parts)
            return Factorisation(form, tuple(ranks), tuple(full_ranks), kernels)
        stack, _, outputs = matrix_shape(kernel.shape, axes)
        right = parts["right"].reshape(stack, *ranks, -1, outputs)
        parts = {**parts, "right": np.swapaxes(right, 1, 2)}  # the window before the inputs
    kernels = {
        name: _layer_kernel(parts[name], window_of(kernel.shape[:-2], own))
        for name, own in FORMS[form].items()
    }
    return Factorisation(form, tuple(ranks), tuple(full_ranks), kernels)


def _plain_kernels(shape, axes, rank, left, right):
    """Folds stacks of factors into (batch..., inputs..., rank) and (batch..., rank, outputs...)."""
    batch, inputs, outputs = (
        tuple(shape[axis] for axis in role)
        for role in (axes.batch(len(shape)), axes.inputs, axes.outputs)
    )
    return {
        "left": left.reshape(*batch, *inputs, rank),
        "right": right.reshape(*batch, rank, *outputs),
    }


def _layer_kernel(part, window):
    """Folds a stack of factors (blocks, ..., outputs) into a kernel (window..., inputs, outputs).

    The inputs of a factor are those of one block; the outputs of all blocks lie side by side.
    """
    blocks, *_, outputs = part.shape
    folded = part.reshape(blocks, *window, -1, outputs)
    return np.moveaxis(folded, 0, -2).reshape(*window, -1, blocks * outputs)


def window_of(values, own):
    """Values of the window axes that a layer takes care of, and ones for the others."""
    mine = range(len(values))[own]
    return tuple(value if axis in mine else 1 for axis, value in enumerate(values))


def _numerical_rank(values, matrix_sizes):
    """Largest rank in the stack, at least one."""
    return max(1, int(above_rounding(values, matrix_sizes).sum(axis=-1).max()))


def _saves(layer, kernel, input_shapes, found):
    if found.num_parameters >= kernel.size:
        return False
    if not isinstance(layer, CONVOLUTIONS):
        return True  # all layers run at the same positions: the same ratio
    # Per position of the output, before the window has been applied along an axis and afterwards.
    for positions in [_positions(layer, shape) for shape in input_shapes] or [_strides(layer)]:
        macs, pending = 0.0, np.array(positions, "float64")
        for name, part in found.kernels.items():
            pending[FORMS[found.form][name]] = 1.0
            macs += part.size * np.prod(pending)
        if macs >= kernel.size:
            return False
    return True


def _positions(layer, input_shape):
    """Positions of the input for each one of the output, along the axes of the window."""
    first = 1 if layer.data_format == "channels_last" else 2
    inputs = input_shape[first : first + layer.rank]
    outputs = layer.compute_output_shape(input_shape)[first : first + layer.rank]
    return [
        stride if None in (before, after) else before / after
        for before, after, stride in zip(inputs, outputs, _strides(layer), strict=True)
    ]


def _strides(layer):
    return each(layer, layer.strides)


def each(layer, value):
    """Returns a value of a convolution for each axis of its window."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * layer.rank
