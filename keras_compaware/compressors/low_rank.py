"""Low rank: a kernel as the product of two thin factors."""

import dataclasses
import math

from keras import ops

from keras_compaware._math.axes import folding, matricise, matrix_shape, tile, tile_shape
from keras_compaware._math.svd import svd
from keras_compaware._math.truncation import truncated
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
from keras_compaware.compressors._ranks import (
    VBMF,
    check_limits,
    largest_rank,
    limited,
    rank_by_energy,
    rank_by_vbmf,
    rounded_down,
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

    The rank is given, follows from the size of the kernel (`ratio`), or is chosen from its
    values: by `energy`, or as the rank of the signal by variational Bayes (`rank="vbmf"`). Chosen
    from the values again and again it would erode; the callback takes the rank of the first firing
    and keeps it.

    "vbmf" is the global solution of empirical variational Bayesian matrix factorisation (Nakajima
    et al., 2013), by which Kim et al. (2016, arXiv 1511.06530) choose ranks: the matrix is taken to
    be one of low rank plus Gaussian noise of a variance that is estimated, and the singular values
    that stand out of it count. It is below m * n / (m + n), so that the factors are always smaller
    than the kernel. Of several matrices (tiles, blocks of a grouped convolution) the largest rank
    is taken, which is our choice.

    With `tile`, the matrix is cut into square tiles, each of which is truncated by itself, as in
    the tiled SVD of Lee et al. (2019): at rank r a kernel shrinks by the factor tile / (2 r). No
    pair of layers computes such a kernel, so it stays one layer when the model is compacted; its
    code is smaller all the same. Tiles at the edge are padded with zeros, which are stored as well.

    A rank that is small for a large kernel, and one that the callback has reduced before, takes no
    full decomposition where the result is certified to have an error of at most 0.1 % above the
    least one (with a failure probability below 1e-4); otherwise, while a ramp runs, and where the
    rank is chosen from the values, the decomposition is computed.

    Args:
        rank: Integer of at least 1, "vbmf", or None.
        ratio: Number in (0, 1], or None: parameters of the two factors over parameters of the
            kernel; r = floor(ratio * m * n / (m + n)), at least 1.
        energy: Number in (0, 1], or None: the smallest r whose singular values have this fraction
            of the energy of all.
        split: "channel" (default) or "spatial".
        tile: Integer of at least 2, or None (default): rows and columns of a tile, cut down to the
            matrix. Then m and n are those of a tile, `rank` and `ratio` refer to each tile, and
            `energy` to all tiles of the kernel together.
        energy_of: What the energy is the sum of, "squares" (default) or "sums": squared singular
            values, or the singular values themselves. Which of them Alvarez & Salzmann mean by
            their percentage of the energy, we could not recover.
        min_rank: Integer of at least 1: the least rank that is chosen. Default 1.
        max_ratio: Number in (0, 1], or None (default): largest share of the kernel's parameters
            that the two factors of a rank chosen from the values may have. Where it contradicts
            `min_rank`, that one counts.
        round_to: Integer of at least 1: a rank that is chosen is a multiple of it, as hardware
            likes it: the next one, for `ratio` and under the limits the one before. The full rank,
            and one that is smaller than the first multiple, stay. Default 1.

    Exactly one of `rank`, `ratio` and `energy` must be given.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or there is nothing for it to act on (a limit of
            a rank that is given).

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.outer([1.0, 2.0], [3.0, 4.0]).astype("float32") + np.eye(2, dtype="float32") * 0.1
    >>> np.linalg.matrix_rank(keras.ops.convert_to_numpy(LowRank(rank=1)(w)), tol=1e-5)
    np.int64(1)
    >>> w = np.diag([8.0, 4.0, 2.0, 1.0, 1.0]).astype("float32")
    >>> LowRank(energy=0.9).settle(w).rank, LowRank(energy=0.9, energy_of="sums").settle(w).rank
    (2, 4)
    >>> noise = np.random.default_rng(0).normal(size=(60, 40))
    >>> w = np.outer(np.arange(60.0), np.ones(40)) + noise
    >>> LowRank(rank="vbmf").settle(w).rank, LowRank(rank="vbmf", round_to=8).settle(w).rank
    (1, 8)
    """

    rank: int | str | None = None
    ratio: float | None = None
    energy: float | None = None
    split: str = "channel"
    tile: int | None = None
    _: dataclasses.KW_ONLY
    energy_of: str = "squares"
    min_rank: int = 1
    max_ratio: float | None = None
    round_to: int = 1

    needs_decomposition = True
    warm_starts = True

    def __post_init__(self):
        given = [name for name in ("rank", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "LowRank: give exactly one of `rank`, `ratio` and `energy`. "
                f"Received: rank={self.rank!r}, ratio={self.ratio!r}, energy={self.energy!r}."
            )
        if isinstance(self.rank, str):
            if self.rank != VBMF:
                raise ValueError(
                    'LowRank: `rank` must be an integer of at least 1, or "vbmf". '
                    f"Received: {self.rank!r}."
                )
        else:
            check_integer("LowRank", "rank", self.rank, 1, optional=True)
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            check_number("LowRank", name, value, 0.0, 1.0, low_open=True, optional=True)
        check_choice("LowRank", "split", self.split, ("channel", "spatial"))
        check_integer("LowRank", "tile", self.tile, 2, optional=True)
        check_choice("LowRank", "energy_of", self.energy_of, ("squares", "sums"))
        if self.energy_of != "squares" and self.energy is None:
            raise ValueError(
                "LowRank: `energy_of` says what `energy` is the sum of, which is not given. "
                f"Received: energy_of={self.energy_of!r}, {given[0]}={getattr(self, given[0])!r}."
            )
        by_hand = self.rank is not None and not self.settles
        limits = self.min_rank, self.max_ratio, self.round_to
        check_limits("LowRank", by_hand, given[0], *limits)
        if by_hand and self.rank % self.round_to:
            raise ValueError(
                f"LowRank: `rank` must be a multiple of `round_to`. Received: rank={self.rank}, "
                f"round_to={self.round_to}."
            )

    @property
    def settles(self):
        return self.energy is not None or self.rank == VBMF

    @property
    def budget(self):
        return None if self.settles else "rank" if self.rank is not None else "ratio"

    def rank_of(self, shape, axes):
        """Returns r for a kernel of this shape, or None where it is chosen from the values.

        Raises:
            ValueError: If `rank` is above the largest rank that the kernel's matrix can have.
        """
        _, rows, columns = self._matrix_shape(shape, axes)
        full = min(rows, columns)
        if self.settles:
            return None
        if self.rank is not None:
            if self.rank > full:
                cut = "" if self.tile is None else " cut into tiles of"
                raise ValueError(
                    f"LowRank: rank={self.rank} is above the largest possible rank {full} of a "
                    f"kernel of shape {tuple(shape)}, whose {self.split} matrix is{cut} "
                    f"{rows} x {columns}. Use a smaller rank, or `ratio=`, which scales with the "
                    "kernel."
                )
            return self.rank
        rank = rounded_down(largest_rank(self.ratio, rows, columns), self.round_to)
        return min(full, max(self.min_rank, rank))

    def reason_to_skip(self, shape, axes):
        rank = self.rank_of(shape, axes)
        stack, *whole = matrix_shape(shape, axes, self.split)
        number, rows, columns = self._matrix_shape(shape, axes)
        before, each = math.prod(whole), number // stack * (rows + columns)
        cut = "" if self.tile is None else f" in tiles of {rows} x {columns}"
        matrix = f"a {whole[0]} x {whole[1]} matrix{cut}"
        least = 1 if rank is not None else min(self.min_rank, rows, columns)
        if least * each >= before:
            return f"{matrix} has no smaller factors, even at rank {least}"
        if rank is not None and rank * each >= before:
            return (
                f"rank {rank} saves nothing on {matrix} "
                f"({rank * each} parameters instead of {before})"
            )
        return None

    def __call__(self, w, axes=None, budget=None):
        self.refuse_variable(w)
        w, axes, cast = as_kernel(w, axes)
        matrix, fold = self._matricise(w, axes)
        if budget is None and not self.settles:
            left, right = truncated(matrix, self.rank_of(w.shape, axes))
            return cast(fold(ops.matmul(left, right)))
        left, values, right = svd(matrix)
        if budget is None:
            rank = self._rank(w.shape, axes, matrix, values)
        else:
            rank = self._ramped_rank(budget, matrix)
        kept = ops.where(ops.arange(values.shape[-1]) < rank, values, ops.zeros_like(values))
        return cast(fold(ops.matmul(left * kept[:, None, :], right)))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = self._matricise(w, axes)
        settled = self.settle(w, axes)
        rank = settled.rank_of(w.shape, axes)
        earlier = None if previous is None else (previous.parts["left"], previous.parts["right"])
        if earlier is not None and earlier[0].shape[-1] != rank:
            earlier = None
        return self._code(*truncated(matrix, rank, earlier), w, dtype, axes)

    def decode(self, code):
        if self._is_cut(code.shape, code.axes):
            _, fold = self._matricise(ops.zeros(code.shape, "float32"), code.axes)
        else:
            fold = folding(code.shape, code.axes, self.split)
        return ops.cast(fold(ops.matmul(code.parts["left"], code.parts["right"])), code.dtype)

    def settle(self, w, axes=None):
        if not self.settles:
            return self
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = self._matricise(w, axes)
        rank = int(self._rank(w.shape, axes, matrix, svd(matrix)[1]))
        return LowRank(rank=rank, split=self.split, tile=self.tile)

    def basis_shape(self, shape, axes):
        stack, rows, columns = self._matrix_shape(shape, axes)
        return (stack, columns, self.rank_of(shape, axes) or min(rows, columns))

    def basis(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = self._matricise(w, axes)
        _, values, right = svd(matrix)
        rank = self.rank_of(w.shape, axes)
        right = ops.swapaxes(right, -1, -2)
        if rank is not None:
            return right[:, :, :rank]
        kept = ops.arange(values.shape[-1]) < self._rank(w.shape, axes, matrix, values)
        return ops.where(kept, right, ops.zeros_like(right))

    def encode_on(self, basis, w, axes=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = self._matricise(w, axes)
        return self._code(ops.matmul(matrix, basis), ops.swapaxes(basis, -1, -2), w, dtype, axes)

    def _code(self, left, right, w, dtype, axes):
        return Code(
            parts={"left": left, "right": right},
            bits={"left": 32, "right": 32},
            payload={"left": _FACTOR_AXES, "right": _FACTOR_AXES},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
            split=None if self._is_cut(w.shape, axes) else self.split,
        )

    def _matrix_shape(self, shape, axes):
        """`(number, rows, columns)` of the matrices that are truncated: all, or all tiles."""
        stacked = matrix_shape(shape, axes, self.split)
        return stacked if self.tile is None else tile_shape(stacked, (self.tile, self.tile))

    def _is_cut(self, shape, axes):
        return self._matrix_shape(shape, axes) != matrix_shape(shape, axes, self.split)

    def _matricise(self, w, axes):
        matrix, fold = matricise(w, axes, self.split)
        if not self._is_cut(w.shape, axes):
            return matrix, fold
        tiles, join = tile(matrix, (self.tile, self.tile))
        return tiles, lambda tiles: fold(join(tiles))

    def _rank(self, shape, axes, matrix, values):
        """The rank for a kernel with these matrices and singular values; may be a tensor."""
        if not self.settles:
            return self.rank_of(shape, axes)
        if self.energy is not None:
            rank = rank_by_energy(values, self.energy, self.energy_of)
        else:
            rank = rank_by_vbmf("LowRank", matrix, values)
        rows, columns = matrix.shape[-2:]
        full = min(rows, columns)
        cap = full if self.max_ratio is None else largest_rank(self.max_ratio, rows, columns)
        return limited(rank, full, min(full, cap), self.min_rank, self.round_to)

    def _ramped_rank(self, budget, matrix):
        rows, columns = matrix.shape[-2:]
        budget = ops.cast(budget, "float32")
        if self.ratio is not None:
            budget = ops.floor(budget * (rows * columns / (rows + columns)) + 1e-4)
        rank = rounded_down(ops.cast(ops.round(budget), "int32"), self.round_to)
        return ops.maximum(rank, min(self.min_rank, rows, columns))
