"""A layer whose kernel has low rank, as two smaller layers."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_compaware._math.axes import matricise, matrix_shape
from keras_compaware._math.svd import svd
from keras_compaware.base import KernelAxes
from keras_compaware.compaction.rebuild import copy_variable

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
FACTORISABLE = (keras.layers.Dense, *CONVOLUTIONS)


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """Two factors that stand in for a kernel.

    Args:
        split: "channel" or "spatial".
        rank: Rank of each of the kernel's matrices.
        full_rank: The largest rank they could have.
        left: Kernel of the first layer.
        right: Kernel of the second layer.
    """

    split: str
    rank: int
    full_rank: int
    left: np.ndarray
    right: np.ndarray

    @property
    def num_parameters(self):
        return self.left.size + self.right.size


def find_factorisation(layer, kernel, input_shapes=(), code=None):
    """Returns the `Factorisation` that saves most without loss, or the reason why there is none.

    The rank is the numerical one: singular values of at most max(m, n) * 2^-23 times the largest
    count as zero. A factorisation must save parameters and multiply-accumulates.

    Args:
        layer: A layer of one of the `FACTORISABLE` classes.
        kernel: Its kernel, a float32 array.
        input_shapes: Shapes of the tensors that the layer is called on. Without padding, the first
            of two convolutions runs at more positions than the second; how many is known from
            these only.
        code: The kernel's `Code` of two factors, if there is one: these factors are taken.
    """
    axes = _kernel_axes(layer)
    if code is not None:
        candidates = [_coded_factors(kernel, code)]
    else:
        splits = ("channel", "spatial") if max(kernel.shape[1:-2], default=1) > 1 else ("channel",)
        candidates = (_decomposed_factors(kernel, axes, split) for split in splits)
    best, reasons = None, []
    for split, left, right in candidates:
        _, rows, columns = matrix_shape(kernel.shape, axes, split)
        rank, full_rank = left.shape[-1], min(rows, columns)
        if not _saves(layer, kernel, input_shapes, split, rank, left.size + right.size):
            reasons.append(f"rank {rank} of {full_rank} ({split}) saves nothing")
        elif best is None or left.size + right.size < best.num_parameters:
            first, second = _layer_kernels(left, right, kernel.shape, axes, split)
            best = Factorisation(split, rank, full_rank, first, second)
    return best if best is not None else "; ".join(reasons)


def _decomposed_factors(kernel, axes, split):
    """Returns `(split, left, right)`, the singular values shared evenly between the factors."""
    _, rows, columns = matrix_shape(kernel.shape, axes, split)
    matrix, _ = matricise(ops.convert_to_tensor(kernel, "float32"), axes, split)
    left, values, right = (ops.convert_to_numpy(part) for part in svd(matrix))
    rank = _numerical_rank(values, rows, columns)
    root = np.sqrt(values[:, :rank])
    return split, left[:, :, :rank] * root[:, None, :], right[:, :rank, :] * root[:, :, None]


def _coded_factors(kernel, code):
    left, right = (ops.convert_to_numpy(code.parts[name]) for name in ("left", "right"))
    _, fold = matricise(ops.convert_to_tensor(kernel, "float32"), code.axes, code.split)
    product = ops.convert_to_numpy(fold(ops.convert_to_tensor(left @ right)))
    if np.max(np.abs(product - kernel)) > 1e-4 * np.max(np.abs(kernel)):
        raise ValueError(
            "the kernel has changed since its code was made. Expected: the codes of the callback "
            "that ended the last training of this very model, `callback.codes`; without codes, "
            "compact() decomposes the kernels."
        )
    return code.split, left, right


def factorised_layer(layer, found, config):
    """Returns `(Sequential of two plain layers, function that fills its variables)`.

    Strides and dilation go with the window axes, bias and activation into the second layer.

    Args:
        layer: The layer that is replaced.
        found: Its `Factorisation`.
        config: Its configuration, already stripped.
    """
    if isinstance(layer, keras.layers.Dense):
        first, second = {"units": found.rank}, {"units": layer.units}
    else:
        first, second = _convolution_configs(layer, found)
    kind = type(layer)
    shared = {**config, "kernel_regularizer": None, "kernel_constraint": None}
    plain = {"use_bias": False, "activation": "linear", "bias_regularizer": None}
    plain |= {"activity_regularizer": None, "bias_constraint": None}
    sequence = keras.Sequential(
        [
            kind.from_config({**shared, **plain, **first, "name": f"{layer.name}_left"}),
            kind.from_config({**shared, **second, "name": f"{layer.name}_right"}),
        ],
        name=layer.name,
        trainable=layer.trainable,
    )

    def fill(built):
        left, right = built.layers
        left.kernel.assign(found.left)
        right.kernel.assign(found.right)
        if layer.use_bias:
            copy_variable(layer.bias, right.bias)

    return sequence, fill


def _kernel_axes(layer):
    if isinstance(layer, keras.layers.Dense):
        return KernelAxes((0,), (1,))
    rank = layer.rank
    return KernelAxes((rank,), (rank + 1,), tuple(range(rank)), layer.groups)


def _numerical_rank(values, rows, columns):
    """Largest rank in the stack, at least one."""
    tolerance = max(rows, columns) * np.finfo(np.float32).eps
    above = values > tolerance * np.maximum(values[:, :1], np.finfo(np.float32).tiny)
    return max(1, int(above.sum(axis=-1).max()))


def _saves(layer, kernel, input_shapes, split, rank, parameters):
    if parameters >= kernel.size:
        return False
    if split == "channel":
        return True  # both layers run at the positions of the output: the same ratio
    # Between the two layers only the first window axis has been reduced.
    window, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    first = window[0] * inputs * rank * layer.groups
    second = math.prod(window[1:]) * rank * outputs
    known = [ratio for shape in input_shapes for ratio in [_widening(layer, shape)] if ratio]
    return first * max(known, default=_strided_widening(layer)) + second < kernel.size


def _strides(layer):
    return [layer.strides] * layer.rank if isinstance(layer.strides, int) else layer.strides


def _strided_widening(layer):
    return math.prod(_strides(layer)[1:])


def _widening(layer, input_shape):
    """Positions between the two layers over positions of the output, or None if not known."""
    first = 1 if layer.data_format == "channels_last" else 2
    inputs = input_shape[first + 1 : first + layer.rank]
    outputs = layer.compute_output_shape(input_shape)[first + 1 : first + layer.rank]
    if None in inputs or None in outputs:
        return None
    return math.prod(inputs) / math.prod(outputs)


def _layer_kernels(left, right, shape, axes, split):
    """Folds factors (stack, rows, r) and (stack, r, columns) into kernels of two layers."""
    stack, _, rank = left.shape
    if not axes.spatial:
        return left[0], right[0]
    window, inputs = shape[:-2], shape[-2]
    inner = window if split == "channel" else (window[0],) + (1,) * (len(window) - 1)
    outer = (1,) * len(window) if split == "channel" else (1, *window[1:])
    first = np.moveaxis(left, 0, 1).reshape(*inner, inputs, stack * rank)
    second = right.reshape(stack, rank, math.prod(outer), -1)
    second = second.transpose(2, 1, 0, 3).reshape(*outer, rank, shape[-1])
    return first, second


def _convolution_configs(layer, found):
    ones = (1,) * layer.rank
    strides, dilation = (
        tuple(value) if isinstance(value, (tuple, list)) else (value,) * layer.rank
        for value in (layer.strides, layer.dilation_rate)
    )
    filters = {"filters": found.rank * layer.groups}
    if found.split == "channel":
        first = {
            "kernel_size": tuple(layer.kernel_size),
            "strides": strides,
            "dilation_rate": dilation,
        }
        second = {"kernel_size": ones, "strides": ones, "dilation_rate": ones}
    else:
        window = tuple(layer.kernel_size)
        first, second = {}, {}
        for name, values in (
            ("kernel_size", window),
            ("strides", strides),
            ("dilation_rate", dilation),
        ):
            first[name] = (values[0], *ones[1:])
            second[name] = (1, *values[1:])
    return {**first, **filters}, second
