"""Quantization: every weight is one of few values."""

import dataclasses

from keras import ops

from keras_compaware._math import codebook
from keras_compaware.base import Code, Compressor, as_kernel, check_choice, check_integer, register


@register
@dataclasses.dataclass(frozen=True)
class UniformQuantization(Compressor):
    """Rounds the weights to a symmetric uniform grid whose scale is fitted by least squares.

    The map is

        w -> s * q,   (s, q) = argmin ||w - s * q||^2   over s > 0, integers |q| <= 2^(bits-1) - 1,

    a local minimum found by alternating minimisation from the best of several starts. The scale is
    not anchored at max|w|: such a scale ratchets upward when it is applied again and again. Values
    that lie on such a grid already are a fixed point, to rounding.

    Args:
        bits: Integer in [2, 16]: bits of a weight; the grid has 2^bits - 1 levels, as the int8
            weights of LiteRT have (narrow range).
        axis: None (default): one scale for the kernel; "outputs": one scale for each output unit.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[-1.0, 0.1], [0.9, 1.1]], "float32")
    >>> np.asarray(keras.ops.convert_to_numpy(UniformQuantization(2)(w))).round(4)
    array([[-1.,  0.],
           [ 1.,  1.]], dtype=float32)
    """

    bits: int
    axis: str | None = None

    def __post_init__(self):
        check_integer("UniformQuantization", "bits", self.bits, 2)
        if self.bits > 16:
            raise ValueError(
                f"UniformQuantization: `bits` must be in [2, 16]. Received: {self.bits}."
            )
        check_choice("UniformQuantization", "axis", self.axis, (None, "outputs"))

    def __call__(self, w, axes=None, budget=None):
        return self.decode(self.encode(w, axes=axes))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        order = self._order(w.shape, axes)
        rows = ops.reshape(ops.transpose(w, order), (self._num_scales(w.shape, axes), -1))
        codes, scale = codebook.fit_uniform(rows, 2 ** (self.bits - 1) - 1)
        codes = _unflatten(codes, w.shape, order)
        return Code(
            parts={"codes": ops.cast(codes, "int8" if self.bits <= 8 else "int16"), "scale": scale},
            bits={"codes": self.bits, "scale": 32},
            payload={},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
            entrywise=("codes",),
        )

    def decode(self, code):
        order = self._order(code.shape, code.axes)
        codes = ops.cast(code.parts["codes"], "float32")
        scale = code.parts["scale"]
        rows = ops.reshape(ops.transpose(codes, order), (scale.shape[0], -1))
        return ops.cast(_unflatten(rows * scale, code.shape, order), code.dtype)

    def _scale_axes(self, ndim, axes):
        return () if self.axis is None else (*axes.batch(ndim), *axes.outputs)

    def _order(self, shape, axes):
        first = self._scale_axes(len(shape), axes)
        return (*first, *(axis for axis in range(len(shape)) if axis not in first))

    def _num_scales(self, shape, axes):
        number = 1
        for axis in self._scale_axes(len(shape), axes):
            number *= shape[axis]
        return number


def _unflatten(rows, shape, order):
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return ops.transpose(ops.reshape(rows, tuple(shape[axis] for axis in order)), inverse)
