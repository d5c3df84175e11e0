"""Low rank: a kernel as the product of two thin factors."""

import dataclasses
import math

from keras import ops

from keras_compaware._math.axes import matricise, matrix_shape
from keras_compaware._math.svd import svd
from keras_compaware.base import (
    Code,
    Compressor,
    KernelAxes,
    as_kernel,
    check_choice,
    check_integer,
    check_number,
    register,
)

_FACTOR_AXES = KernelAxes(inputs=(1,), outputs=(2,))


@register
@dataclasses.dataclass(frozen=True)
class LowRank(Compressor):
    """Replaces the kernel's matrix by its best approximation of a given rank (truncated SVD).

    The map is the projection

        argmin_Z ||Z - W||_F   subject to   rank(Z) <= r

    of the matrix W (m x n) that the kernel is, by Eckart & Young; it is idempotent for a fixed r.
    `split` says which matrix a convolution kernel (kh, kw, in, out) is and so into which two
    layers it falls apart when the model is compacted:

        "channel":  (kh * kw * in) x out     r filters of kh x kw, then 1 x 1
        "spatial":  (kh * in) x (kw * out)   r filters of kh x 1, then 1 x kw (Jaderberg et al.)

    The frequency paper's group uses the channel matrix (Lee et al., 2019, arXiv 1905.10145,
    section on 2-D SVD); the compression-aware paper (Alvarez & Salzmann, 2017) truncates by energy.

    Args:
        rank: Integer of at least 1, or None.
        ratio: Number in (0, 1], or None: parameters of the two factors over parameters of the
            kernel; r = floor(ratio * m * n / (m + n)), at least 1.
        energy: Number in (0, 1], or None: the smallest r whose squared singular values sum up to
            this fraction of all. Applied again and again it would erode the rank; the callback
            takes the rank of the first firing and keeps it.
        split: "channel" (default) or "spatial".

    Exactly one of `rank`, `ratio` and `energy` must be given.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.outer([1.0, 2.0], [3.0, 4.0]).astype("float32") + np.eye(2, dtype="float32") * 0.1
    >>> np.linalg.matrix_rank(keras.ops.convert_to_numpy(LowRank(rank=1)(w)), tol=1e-5)
    np.int64(1)
    """

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    split: str = "channel"

    needs_decomposition = True

    def __post_init__(self):
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "LowRank: give exactly one of `rank`, `ratio` and `energy`. "
                f"Received: rank={self.rank!r}, ratio={self.ratio!r}, energy={self.energy!r}."
            )
        check_integer("LowRank", "rank", self.rank, 1, optional=True)
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            check_number("LowRank", name, value, 0.0, 1.0, low_open=True, optional=True)
        check_choice("LowRank", "split", self.split, ("channel", "spatial"))

    @property
    def budget(self):
        return None if self.energy is not None else "rank" if self.rank is not None else "ratio"

    def rank_of(self, shape, axes):
        """Returns r for a kernel of this shape, or None where it depends on the values (energy).

        Raises:
            ValueError: If `rank` is above the largest rank that the kernel's matrix can have.
        """
        _, rows, columns = matrix_shape(shape, axes, self.split)
        full = min(rows, columns)
        if self.rank is not None:
            if self.rank > full:
                raise ValueError(
                    f"LowRank: rank={self.rank} is above the largest possible rank {full} of a "
                    f"kernel of shape {tuple(shape)}, whose {self.split} matrix is "
                    f"{rows} x {columns}. Use a smaller rank, or `ratio=`, which scales with the "
                    "kernel."
                )
            return self.rank
        if self.ratio is not None:
            exact = self.ratio * rows * columns / (rows + columns)
            return min(full, max(1, math.floor(exact + 1e-9)))
        return None

    def reason_to_skip(self, shape, axes):
        rank = self.rank_of(shape, axes)
        _, rows, columns = matrix_shape(shape, axes, self.split)
        if rows + columns >= rows * columns:
            return f"a {rows} x {columns} matrix has no smaller factors, even at rank 1"
        if rank is not None and rank * (rows + columns) >= rows * columns:
            return (
                f"rank {rank} saves nothing on a {rows} x {columns} matrix "
                f"({rank * (rows + columns)} parameters instead of {rows * columns})"
            )
        return None

    def __call__(self, w, axes=None, budget=None):
        self.refuse_variable(w)
        w, axes, cast = as_kernel(w, axes)
        matrix, fold = matricise(w, axes, self.split)
        left, values, right = svd(matrix)
        if budget is None:
            rank = self.rank_of(w.shape, axes)
            rank = self._rank_by_energy(values) if rank is None else rank
        else:
            rank = self._ramped_rank(budget, matrix)
        kept = ops.where(ops.arange(values.shape[-1]) < rank, values, ops.zeros_like(values))
        return cast(fold(ops.matmul(left * kept[:, None, :], right)))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        left, values, right = svd(matrix)
        rank = self.settle(w, axes).rank_of(w.shape, axes) if self.energy else None
        rank = self.rank_of(w.shape, axes) if rank is None else rank
        root = ops.sqrt(values[:, :rank])
        return self._code(
            left[:, :, :rank] * root[:, None, :],
            right[:, :rank, :] * root[:, :, None],
            w,
            dtype,
            axes,
        )

    def decode(self, code):
        _, fold = matricise(ops.zeros(code.shape, "float32"), code.axes, self.split)
        return ops.cast(fold(ops.matmul(code.parts["left"], code.parts["right"])), code.dtype)

    def settle(self, w, axes=None):
        if self.energy is None:
            return self
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        return LowRank(rank=int(self._rank_by_energy(svd(matrix)[1])), split=self.split)

    def basis_shape(self, shape, axes):
        stack, rows, columns = matrix_shape(shape, axes, self.split)
        return (stack, columns, self.rank_of(shape, axes) or min(rows, columns))

    def basis(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        _, values, right = svd(matrix)
        rank = self.rank_of(w.shape, axes)
        right = ops.swapaxes(right, -1, -2)
        if rank is not None:
            return right[:, :, :rank]
        kept = ops.arange(values.shape[-1]) < self._rank_by_energy(values)
        return ops.where(kept, right, ops.zeros_like(right))

    def encode_on(self, basis, w, axes=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        return self._code(ops.matmul(matrix, basis), ops.swapaxes(basis, -1, -2), w, dtype, axes)

    def _code(self, left, right, w, dtype, axes):
        return Code(
            parts={"left": left, "right": right},
            bits={"left": 32, "right": 32},
            payload={"left": _FACTOR_AXES, "right": _FACTOR_AXES},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
            split=self.split,
        )

    def _rank_by_energy(self, values):
        largest = ops.max(values)
        unit = ops.where(largest > 0, largest, 1.0)
        values = values / unit  # squares neither overflow nor vanish
        energies = ops.cumsum(ops.sum(ops.square(values), axis=0))
        # Rank r is needed while the first r - 1 singular values do not suffice.
        before = ops.concatenate([ops.zeros_like(energies[:1]), energies[:-1]], axis=0)
        missing = before < (self.energy - 1e-7) * energies[-1]
        return ops.maximum(ops.sum(ops.cast(missing, "int32")), 1)

    def _ramped_rank(self, budget, matrix):
        rows, columns = matrix.shape[-2:]
        budget = ops.cast(budget, "float32")
        if self.ratio is not None:
            budget = ops.floor(budget * (rows * columns / (rows + columns)) + 1e-4)
        return ops.maximum(ops.cast(ops.round(budget), "int32"), 1)
