"""Quantization: every weight is one of few values."""

import dataclasses
import math

from keras import ops

from keras_compaware._math import binary_codes, codebook
from keras_compaware.base import (
    Code,
    Compressor,
    KernelAxes,
    as_kernel,
    check_choice,
    check_integer,
    register,
)


class _PerRow(Compressor):
    """A compressor that sees a kernel as rows and fits each by itself.

    With `axis=None` the kernel is one row; with `axis="outputs"` there is one for every output
    unit of every independent linear map.
    """

    def __post_init__(self):
        check_choice(type(self).__name__, "axis", self.axis, (None, "outputs"))

    def __call__(self, w, axes=None, budget=None):
        return self.decode(self.encode(w, axes=axes))

    def _check_integer(self, name, low, high):
        owner, value = type(self).__name__, getattr(self, name)
        check_integer(owner, name, value, low)
        if value > high:
            raise ValueError(f"{owner}: `{name}` must be in [{low}, {high}]. Received: {value}.")

    def _to_rows(self, tensor, axes):
        """Returns a tensor of the kernel's shape as (rows, number)."""
        shape = tuple(tensor.shape)
        number = self._number_of_rows(shape, axes)
        return ops.reshape(ops.transpose(tensor, self._order(len(shape), axes)), (number, -1))

    def _number_of_rows(self, shape, axes):
        return math.prod(shape[axis] for axis in self._row_axes(len(shape), axes))

    def _from_rows(self, rows, shape, axes):
        """Undoes `_to_rows`."""
        order = self._order(len(shape), axes)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return ops.transpose(ops.reshape(rows, tuple(shape[axis] for axis in order)), inverse)

    def _row_axes(self, ndim, axes):
        return () if self.axis is None else (*axes.batch(ndim), *axes.outputs)

    def _order(self, ndim, axes):
        first = self._row_axes(ndim, axes)
        return (*first, *(axis for axis in range(ndim) if axis not in first))


class _Grid(_PerRow):
    """A compressor whose codes are integers, to be multiplied by a scale of their row."""

    def encode(self, w, previous=None, axes=None, mask=None):
        return self._encode(w, axes, mask)

    def _encode(self, w, axes, mask=None, **how):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        mask = None if mask is None else self._to_rows(mask, axes)
        codes, scale = self._fit(self._to_rows(w, axes), mask, **how)
        codes = self._from_rows(codes, w.shape, axes)
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
        codes = self._to_rows(ops.cast(code.parts["codes"], "float32"), code.axes)
        w = self._from_rows(codes * code.parts["scale"], code.shape, code.axes)
        return ops.cast(w, code.dtype)


@register
@dataclasses.dataclass(frozen=True)
class UniformQuantization(_Grid):
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
        self._check_integer("bits", 2, 16)
        super().__post_init__()

    def basis_shape(self, shape, axes):
        return (self._number_of_rows(shape, axes), 1)

    def basis(self, w, axes=None):
        return self._share(self.encode(w, axes=axes), w, axes)

    def encode_on(self, basis, w, axes=None):
        return self._encode(w, axes, rounds=codebook.REFRESHED, start=basis)

    def follow(self, basis, w, axes=None):
        code = self.encode_on(basis, w, axes)
        return code, self._share(code, w, axes)

    def _share(self, code, w, axes):
        """The scale as a share of the largest magnitude, so that the grid grows with its kernel."""
        w, axes, _ = as_kernel(w, axes)
        largest = ops.max(ops.abs(self._to_rows(w, axes)), axis=-1, keepdims=True)
        return code.parts["scale"] / ops.where(largest > 0, largest, 1.0)

    def _fit(self, rows, mask, **how):
        # Entries that are not stored are zeros, which every grid holds: they change no scale.
        return codebook.fit_uniform(rows, 2 ** (self.bits - 1) - 1, **how)


@register
@dataclasses.dataclass(frozen=True)
class TernaryQuantization(_Grid):
    """Replaces every weight by -s, 0 or s (ternary weight networks; Li & Liu, 2016).

    The map is

        w -> s * q,   q = sign(w) where |w| > 0.7 * mean|w|, else 0,   s = mean of those |w|,

    with the scale that is best for these q. The threshold is that paper's rule for what is best
    for Gaussian weights: it leaves 19.2 % of their energy as error and 42 % of them zero. It is
    idempotent. `UniformQuantization(2)` fits the threshold to the kernel instead, at a higher
    cost; the code is the same.

    Args:
        axis: None (default): one scale and threshold for the kernel; "outputs": one for each
            output unit.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[1.0, -0.2], [0.4, -0.8]], "float32")  # mean|w| = .6, threshold .42
    >>> np.asarray(keras.ops.convert_to_numpy(TernaryQuantization()(w))).round(4)
    array([[ 0.9,  0. ],
           [ 0. , -0.9]], dtype=float32)
    """

    axis: str | None = None

    bits = 2

    def _fit(self, rows, mask):
        return codebook.fit_ternary(rows, mask)


class _Levels(_PerRow):
    """A compressor whose rows take few values, which `rounds` of a fit improve.

    What the values are made of is the part `_levels` of a code, `_num_levels` numbers a row. If
    the compressor `warm_starts`, a fit may begin with those of an earlier one. A subclass has
    `_fit(rows, rounds, stored, start)`, which returns integer codes and the levels, and
    `_code(codes, levels, **about)`.
    """

    def encode(self, w, previous=None, axes=None, mask=None):
        return self._encode(w, axes, mask, previous=previous)

    def basis_shape(self, shape, axes):
        return (self._number_of_rows(shape, axes), self._num_levels) if self.warm_starts else None

    def basis(self, w, axes=None):
        if not self.warm_starts:
            return super().basis(w, axes)
        return self.encode(w, axes=axes).parts[self._levels]

    def encode_on(self, basis, w, axes=None):
        if not self.warm_starts:
            return super().encode_on(basis, w, axes)
        return self._encode(w, axes, rounds=min(self.rounds, codebook.REFRESHED), start=basis)

    def follow(self, basis, w, axes=None):
        code = self.encode_on(basis, w, axes)
        return code, code.parts[self._levels]

    def _encode(self, w, axes, mask=None, previous=None, rounds=None, start=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        shape = tuple(w.shape)
        rows = self._to_rows(w, axes)
        stored = None if mask is None else self._to_rows(mask, axes)
        if previous is not None and self.warm_starts:
            start = _start(previous, self._levels, self.basis_shape(shape, axes))
        rounds = self.rounds if rounds is None else rounds
        codes, levels = self._fit(rows, rounds, stored, start)
        codes = codes if stored is None else ops.where(stored, codes, 0)
        return self._code(codes, levels, shape=shape, dtype=dtype, axes=axes)


@register
@dataclasses.dataclass(frozen=True)
class BinaryCodeQuantization(_Levels):
    """Replaces every weight by a sum of few signed scales (binary codes, multi-bit quantization).

    The map is

        w -> sum_i alpha_i * b_i,   b_i in {-1, +1} for each weight,   alpha_i >= 0 for all,

    with the scales and signs that `fit` finds for a small ||w - sum_i alpha_i * b_i||:

        "greedy":       one plane of signs after the other: b_i = sign(r), alpha_i = mean|r| of
                        what the earlier planes leave, r. Applied again and again it does not
                        stay (two bits of Gaussian weights shrink to nothing within 100
                        applications), so that it is here for comparison only.
        "refined":      the same signs, but after every new plane all scales are fitted again by
                        least squares. The error is at most that of the greedy fit of one or two
                        bits, in practice of any number.
        "alternating":  from the refined fit on, scales by least squares and signs of the nearest
                        of all 2^bits sums in turn (Xu et al., 2018), as long as that lowers the
                        error. From `previous`, if given, it starts instead with the scales of that
                        code, and ends with no greater error than these scales have on the
                        present kernel.

    One bit is the sign times the mean magnitude for every `fit`. Except for the greedy fit,
    kernels that are such sums already are a fixed point, to rounding, if they hold the largest
    sum and those with one of the smaller scales turned. Binary codes are how Lee et al. (2021)
    quantize.

    Args:
        bits: Integer in [1, 8]: planes of signs, 1 bit of a weight each.
        axis: None (default): scales for the kernel; "outputs": scales for each output unit.
        fit: "refined" (default), "alternating" or "greedy".
        rounds: Integer of at least 0: rounds of the alternating fit; other fits have none.
            Default 15.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[0.9, -0.4], [0.6, -1.1]], "float32")  # alphas .75 and .25
    >>> np.asarray(keras.ops.convert_to_numpy(BinaryCodeQuantization(2)(w))).round(4)
    array([[ 1. , -0.5],
           [ 0.5, -1. ]], dtype=float32)
    """

    bits: int
    axis: str | None = None
    fit: str = "refined"
    rounds: int = 15

    def __post_init__(self):
        self._check_integer("bits", 1, 8)
        super().__post_init__()
        check_choice(type(self).__name__, "fit", self.fit, ("refined", "alternating", "greedy"))
        check_integer(type(self).__name__, "rounds", self.rounds, 0)

    repeats = False
    keeps_zeros = False

    _levels = "alphas"

    @property
    def _num_levels(self):
        return self.bits

    @property
    def warm_starts(self):
        return self.fit == "alternating"

    def _fit(self, rows, rounds, stored, start):
        return binary_codes.fit_binary(rows, self.bits, self.fit, rounds, stored, start)

    def _code(self, codes, levels, **about):
        shape, axes = about["shape"], about["axes"]
        planes = [
            self._from_rows(binary_codes.plane(codes, number), shape, axes)
            for number in range(self.bits)
        ]
        return Code(
            parts={"planes": ops.stack(planes), "alphas": levels},
            bits={"planes": 1, "alphas": 32},
            payload={},
            entrywise=("planes",),
            **about,
        )

    def decode(self, code):
        planes, alphas = code.parts["planes"], code.parts["alphas"]
        rows = 0.0
        for number in range(self.bits):
            plane, alpha = self._to_rows(planes[number], code.axes), alphas[:, number, None]
            rows = rows + ops.where(plane, alpha, -alpha)
        return ops.cast(self._from_rows(rows, code.shape, code.axes), code.dtype)


@register
@dataclasses.dataclass(frozen=True)
class WeightClustering(_Levels):
    """Replaces every weight by the nearest of k values that are fitted to the weights (k-means).

    The map is

        w -> c[q],   (c, q) = argmin ||w - c[q]||^2   over codebooks c of k values and codes q,

    a local minimum found by Lloyd's algorithm from the best of several starts (weight sharing in
    Han et al., 2016). Kernels of at most k distinct values are a fixed point, bit for bit. From
    `previous`, if given, it starts instead with that codebook, and ends with no greater error
    than that codebook has on the present kernel, to rounding. In a `Chain` the next compressor
    acts on the codebook.

    Args:
        num_clusters: Integer in [2, 65536]: k; a weight takes ceil(log2(k)) bits.
        axis: None (default): one codebook for the kernel; "outputs": one for each output unit.
        rounds: Integer of at least 0: rounds of Lloyd's algorithm. Default 20.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[1.0, 1.2], [-0.5, -0.7]], "float32")
    >>> np.asarray(keras.ops.convert_to_numpy(WeightClustering(2)(w))).round(4)
    array([[ 1.1,  1.1],
           [-0.6, -0.6]], dtype=float32)
    """

    num_clusters: int
    axis: str | None = None
    rounds: int = 20

    warm_starts = True
    keeps_zeros = False
    _levels = "codebook"

    @property
    def _num_levels(self):
        return self.num_clusters

    def __post_init__(self):
        self._check_integer("num_clusters", 2, 65536)
        super().__post_init__()
        check_integer(type(self).__name__, "rounds", self.rounds, 0)

    def _fit(self, rows, rounds, stored, start):
        return codebook.fit_clusters(rows, self.num_clusters, rounds, stored, start)

    def _code(self, codes, levels, **about):
        codes = self._from_rows(codes, about["shape"], about["axes"])
        return Code(
            parts={"codes": ops.cast(codes, self._code_dtype), "codebook": levels},
            bits={"codes": (self.num_clusters - 1).bit_length(), "codebook": 32},
            payload={"codebook": KernelAxes(inputs=(1,), outputs=(0,))},
            entrywise=("codes",),
            **about,
        )

    def decode(self, code):
        codes = self._to_rows(ops.cast(code.parts["codes"], "int32"), code.axes)
        rows = codebook.gathered(code.parts["codebook"], codes)
        return ops.cast(self._from_rows(rows, code.shape, code.axes), code.dtype)

    @property
    def _code_dtype(self):
        sizes = {"uint8": 2**8, "int16": 2**15, "int32": 2**31}
        return next(dtype for dtype, size in sizes.items() if self.num_clusters <= size)


def _start(previous, name, shape):
    """Returns the part of an earlier code from which a fit may start, or None if it is a code."""
    part = previous.parts[name]
    if isinstance(part, Code):
        return None
    if tuple(part.shape) != shape:
        raise ValueError(
            f"`previous` must be a code of the same kernel by the same compressor, with '{name}' "
            f"of shape {shape}. Received: '{name}' of shape {tuple(part.shape)}."
        )
    return ops.cast(part, "float32")
