"""Quantized .tflite files, in which kernels that lie on a grid keep its very codes and scales."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware._math.axes import matricise
from keras_compaware.export.interpreter import schema
from keras_compaware.kernels import find_targets

CONVERTED = ("float16", "dynamic_int8", "int8")
"""Modes of TensorFlow's converter."""

REWRITTEN = {"weight_int8": "weight_only_wi8_afp32", "weight_int4": "weight_only_wi4_afp32"}
"""Modes of ai-edge-quantizer, by the name of its recipe."""

MODES = (*CONVERTED, *REWRITTEN)

_MOST = 127  # the largest integer of a symmetric grid of 8 bits
_EXACT = 5e-5  # of a step: weights are float32
_FEW = 8
_PROPORTIONAL = 1e-5
# Places of the activation, the weights and the bias among an operator's inputs.
_INPUTS = {
    "CONV_2D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """A kernel that is a scale times integers, in every row.

    Attributes:
        name: Name of the kernel.
        codes: Integers (rows, number): a row for every output unit, batch axes (the channels of a
            depthwise convolution) first; in it the window and then the inputs, as in LiteRT.
    """

    name: str
    codes: np.ndarray


def find_grids(model: keras.Model) -> list[Grid]:
    """Returns the kernels that lie on symmetric uniform grids of at most 8 bits, exactly."""
    found = []
    for target in find_targets(model)[0]:
        rows = _rows(target)
        if not rows.size or _codes(rows[:_FEW]) is None:
            continue
        codes = _codes(rows)
        if codes is not None:
            found.append(Grid(target.name, codes))
    return found


def _rows(target):
    matrix, _ = matricise(keras.ops.cast(target.read(), "float32"), target.axes)
    columns = np.swapaxes(keras.ops.convert_to_numpy(matrix).astype("float64"), 1, 2)
    return columns.reshape(-1, columns.shape[-1])


def _codes(rows):
    """Returns integers of the coarsest grid of each row that holds it exactly, or None."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not (np.isfinite(largest).all() and largest.any()):
        return None
    levels = np.zeros(len(rows), int)  # of the largest weight; 0: not known yet
    open_rows = np.flatnonzero(largest[:, 0] > 0)
    for level in range(1, _MOST + 1):
        steps = rows[open_rows] * (level / largest[open_rows])
        fits = np.abs(steps - np.round(steps)).max(axis=1) <= _EXACT
        levels[open_rows[fits]] = level
        open_rows = open_rows[~fits]
    if len(open_rows):
        return None
    unit = levels[:, None] / np.where(largest > 0, largest, 1.0)
    return np.round(rows * unit).astype(np.int8)


# ---- quantizing ---------------------------------------------------------------------------------


def configure(converter: Any, mode: str, examples: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Tells TensorFlow's converter to quantize; `examples` are what "int8" is calibrated on."""
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if mode == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif mode == "int8":
        converter.representative_dataset = lambda: iter(examples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]


def rewritten(content: bytes, mode: str) -> bytes:
    """Returns a float32 file with its weights quantized by ai-edge-quantizer."""
    from ai_edge_quantizer import quantizer, recipe

    rules = getattr(recipe, REWRITTEN[mode])()
    return bytes(quantizer.Quantizer(content, rules).quantize().quantized_model)


# ---- grids that are kept ------------------------------------------------------------------------


def keep_grids(content: bytes, whole: bytes, grids: Sequence[Grid]) -> tuple[bytes, dict[str, str]]:
    """Stores kernels on exactly the grids that they were trained on.

    A quantizer takes scales from the largest weights, which need not lie at a grid's end; then
    it rounds anew. Here every such tensor gets the grid's integers, and the scale that makes of
    them what the float32 file holds: with batch normalisation folded in, the grid's own times
    |gamma| / sigma, the integers' sign being that of gamma. Nothing else is changed, but biases
    of 32 bits, whose unit is the product of the scales of the input and the weights.

    Args:
        content: The quantized file.
        whole: The float32 file of the same model.
        grids: What `find_grids` returns.

    Returns:
        The file, and what became of each kernel by name: "int8" or "int4", with its own codes;
        "float32" or "float16" where it was not quantized; "rounded" where it was, to another grid;
        "not found" where no tensor holds it alone.
    """
    buffer = bytearray(content)
    tensors = list(_tensors(buffer))
    constants = [tensor for tensor in _tensors(bytearray(whole)) if tensor.is_constant]
    fates = {}
    for grid in grids:
        fates[grid.name] = "not found"
        for constant in constants:
            factors = constant.factors(grid.codes)
            if factors is None:
                continue
            for tensor in tensors:
                if tensor.is_constant and tensor.holds(constant):
                    fates[grid.name] = tensor.put(grid.codes, factors)
    return bytes(buffer), fates


class _Tensor:
    """A tensor of a file whose bytes may be changed in place.

    Args:
        buffer: The file.
        model: Its root.
        subgraph: The subgraph.
        place: The tensor's place in it.
        users: `[(bias, input), ...]`: the other tensors of operators that use it as weights.
    """

    def __init__(self, buffer, model, subgraph, place, users):
        self._tensor = subgraph.Tensors(place)
        self._shape = tuple(self._tensor.ShapeAsNumpy()) if self._tensor.ShapeLength() else ()
        data = model.Buffers(self._tensor.Buffer())
        self._data = data.DataAsNumpy() if data.DataLength() else None
        if data.Size():  # ai-edge-quantizer puts much data behind the rest
            self._data = np.frombuffer(buffer, np.uint8, data.Size(), data.Offset())
        self._users = users
        self.type = _type_names()[self._tensor.Type()]

    @property
    def is_constant(self):
        """Whether it holds numbers of two or more dimensions."""
        return self._data is not None and len(self._shape) >= 2

    @property
    def scales(self):
        """Its scales, which may be written, or None."""
        quantization = self._tensor.Quantization()
        if quantization is None or not quantization.ScaleLength():
            return None
        return quantization.ScaleAsNumpy()

    @property
    def zero_points(self):
        """Its zero points: one, or one for each scale."""
        quantization = self._tensor.Quantization()
        return quantization.ZeroPointAsNumpy() if quantization.ZeroPointLength() else np.zeros(1)

    def values(self):
        """Returns its numbers, without scales."""
        if self.type == "INT4":
            pairs = self._data.view(np.int8)
            low, high = (pairs << 4) >> 4, pairs >> 4
            flat = np.stack([low, high], axis=1).reshape(-1)[: int(np.prod(self._shape))]
        else:
            dtypes = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8}
            flat = self._data.view(dtypes[self.type])
        return flat.reshape(self._shape)

    def rows(self, axis):
        """Returns its numbers as (size of an axis, number)."""
        return np.moveaxis(self.values(), axis, 0).reshape(self._shape[axis], -1)

    def factors(self, codes):
        """Returns `(axis, factors (rows, 1))` that make its rows of codes, or None."""
        if self.type != "FLOAT32" or codes.size != np.prod(self._shape):
            return None
        codes = codes.astype("float64")
        for axis in sorted({0, len(self._shape) - 1}):
            if self._shape[axis] != len(codes):
                continue
            rows = self.rows(axis).astype("float64")
            energy = np.sum(codes * codes, axis=1, keepdims=True)
            factors = np.sum(codes * rows, axis=1, keepdims=True) / np.maximum(energy, 1.0)
            largest = np.abs(rows).max(axis=1, keepdims=True)
            if np.all(np.abs(rows - factors * codes) <= _PROPORTIONAL * largest):
                return axis, factors
        return None

    def holds(self, other):
        """Whether it holds what another one, of float32, does, perhaps rounded."""
        if self._shape != other._shape or self.type not in ("FLOAT32", "FLOAT16", "INT8", "INT4"):
            return False
        values, expected = self.values().astype("float64"), other.values().astype("float64")
        if self.type.startswith("FLOAT"):
            return bool(np.allclose(values, expected, rtol=1e-3, atol=1e-6))
        if self.scales is None:
            return False
        steps = self._along(self.scales.astype("float64"))
        values = values - self._along(self.zero_points)
        return bool(np.all(np.abs(values * steps - expected) <= 0.51 * steps))

    def _along(self, numbers):
        if len(numbers) == 1:
            return numbers
        shape = [1] * len(self._shape)
        shape[self._tensor.Quantization().QuantizedDimension()] = -1
        return numbers.reshape(shape)

    def put(self, codes, factors):
        """Stores codes with the scales that belong to them, and says what it holds now."""
        axis, factors = factors
        if self.type.startswith("FLOAT"):
            return self.type.lower()
        scales = self.scales
        most = 7 if self.type == "INT4" else 127
        fits = len(scales) == len(codes) and np.abs(codes).max() <= most
        fits = fits and not self.zero_points.any()
        if not fits or self._tensor.Quantization().QuantizedDimension() != axis:
            return "rounded"
        factors = factors[:, 0]
        # A row of zeros has no factor, and any scale.
        new = np.where(factors == 0, scales, np.abs(factors)).astype("float32")
        signed = np.sign(factors)[:, None] * codes
        shape = (self._shape[axis], *(n for i, n in enumerate(self._shape) if i != axis))
        values = np.moveaxis(signed.reshape(shape), 0, axis).astype(np.int8).reshape(-1)
        if self.type == "INT4":
            values = np.append(values, np.zeros(len(values) % 2, np.int8))
            pairs = (values[0::2] & 0x0F) | ((values[1::2] & 0x0F) << 4)
            self._data.view(np.int8)[:] = pairs.astype(np.int8)
        else:
            self._data.view(np.int8)[:] = values
        for bias, activation in self._users:
            bias.change_unit(new, activation)
        scales[:] = new
        return self.type.lower()

    def change_unit(self, weight_scales, activation):
        """Expresses a bias of 32 bits in other units: scale of the input times of the weights."""
        if self.type != "INT32" or self.scales is None or activation.scales is None:
            return
        numbers, scales = self._data.view(np.int32), self.scales
        new = (activation.scales[0] * weight_scales).astype("float32")
        limits = np.iinfo(np.int32)
        biases = np.round(numbers.astype("float64") * scales.astype("float64") / new)
        numbers[:] = np.clip(biases, limits.min, limits.max).astype(np.int32)
        scales[:] = new


def _tensors(buffer: bytearray) -> Iterator[_Tensor]:
    """Yields the tensors of a file."""
    model = schema().Model.GetRootAs(buffer)
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        alone = functools.partial(_Tensor, buffer, model, subgraph)
        users: dict[int, list] = {}
        for i in range(subgraph.OperatorsLength()):
            operator = subgraph.Operators(i)
            places = _INPUTS.get(_operator_name(model, operator))
            inputs = operator.InputsAsNumpy() if places and operator.InputsLength() else ()
            if places and len(inputs) > places[2] and inputs[places[2]] >= 0:
                activation, bias = (alone(inputs[place], []) for place in (places[0], places[2]))
                users.setdefault(int(inputs[places[1]]), []).append((bias, activation))
        for place in range(subgraph.TensorsLength()):
            yield alone(place, users.get(place, []))


def _operator_name(model, operator):
    code = model.OperatorCodes(operator.OpcodeIndex())
    return _operator_names().get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))


@functools.cache
def _operator_names():
    return {value: name for name, value in vars(schema().BuiltinOperator).items()}


@functools.cache
def _type_names():
    return {value: name for name, value in vars(schema().TensorType).items() if name.isupper()}
