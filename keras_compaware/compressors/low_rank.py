"""Low rank: a kernel as the product of two or three thin factors."""

import dataclasses
import functools
import math

import numpy as np
from keras import ops

from keras_compaware._math.axes import matricise, matrix_shape, tensor_shape, tile, tile_shape
from keras_compaware._math.svd import svd
from keras_compaware.base import (
    Code,
    Compressor,
    KernelAxes,
    as_kernel,
    check_choice,
    check_integer,
    check_number,
    check_pair,
    register,
)

_FACTOR_AXES = KernelAxes(inputs=(1,), outputs=(2,))
_CORE_AXES = KernelAxes(inputs=(2,), outputs=(3,), spatial=(1,))
_SWEEPS = 2


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

    With `tile`, the matrix is cut into square tiles, each of which is truncated by itself, as in
    the tiled SVD of Lee et al. (2019): at rank r a kernel shrinks by the factor tile / (2 r). No
    pair of layers computes such a kernel, so it stays one layer when the model is compacted; its
    code is smaller all the same. Tiles at the edge are padded with zeros, which are stored as well.

    Args:
        rank: Integer of at least 1, or None.
        ratio: Number in (0, 1], or None: parameters of the two factors over parameters of the
            kernel; r = floor(ratio * m * n / (m + n)), at least 1.
        energy: Number in (0, 1], or None: the smallest r whose squared singular values sum up to
            this fraction of all. Applied again and again it would erode the rank; the callback
            takes the rank of the first firing and keeps it.
        split: "channel" (default) or "spatial".
        tile: Integer of at least 2, or None (default): rows and columns of a tile, cut down to the
            matrix. Then m and n are those of a tile, `rank` and `ratio` refer to each tile, and
            `energy` to all tiles of the kernel together.

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
    tile: int | None = None

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
        check_integer("LowRank", "tile", self.tile, 2, optional=True)

    @property
    def settles(self):
        return self.energy is not None

    @property
    def budget(self):
        return None if self.energy is not None else "rank" if self.rank is not None else "ratio"

    def rank_of(self, shape, axes):
        """Returns r for a kernel of this shape, or None where it depends on the values (energy).

        Raises:
            ValueError: If `rank` is above the largest rank that the kernel's matrix can have.
        """
        _, rows, columns = self._matrix_shape(shape, axes)
        full = min(rows, columns)
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
        if self.ratio is not None:
            exact = self.ratio * rows * columns / (rows + columns)
            return min(full, max(1, math.floor(exact + 1e-9)))
        return None

    def reason_to_skip(self, shape, axes):
        rank = self.rank_of(shape, axes)
        stack, *whole = matrix_shape(shape, axes, self.split)
        number, rows, columns = self._matrix_shape(shape, axes)
        before, each = math.prod(whole), number // stack * (rows + columns)
        cut = "" if self.tile is None else f" in tiles of {rows} x {columns}"
        matrix = f"a {whole[0]} x {whole[1]} matrix{cut}"
        if each >= before:
            return f"{matrix} has no smaller factors, even at rank 1"
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
        matrix, _ = self._matricise(w, axes)
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
        _, fold = self._matricise(ops.zeros(code.shape, "float32"), code.axes)
        return ops.cast(fold(ops.matmul(code.parts["left"], code.parts["right"])), code.dtype)

    def settle(self, w, axes=None):
        if self.energy is None:
            return self
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = self._matricise(w, axes)
        rank = int(self._rank_by_energy(svd(matrix)[1]))
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
        kept = ops.arange(values.shape[-1]) < self._rank_by_energy(values)
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


@register
@dataclasses.dataclass(frozen=True)
class Tucker2(Compressor):
    """Replaces a convolution kernel by a small core between two thin matrices (Tucker-2).

    The map looks for

        argmin_Z ||Z - K||_F   subject to   Z[x, s, t] = sum_ab P[s, a] C[x, a, b] Q[b, t]

    with P (inputs S x r_in) and Q (r_out x outputs T) of orthonormal columns and rows; x runs over
    the window and stays whole. When the model is compacted the layer falls apart into three: 1 x 1
    to r_in channels, the window to r_out channels, 1 x 1 to the outputs (Kim et al., 2016, arXiv
    1511.06530; occasional Tucker compression: Lee et al., 2019, arXiv 1905.10145).

    The fit starts from the singular vectors of the two unfoldings, whose error is at most sqrt(2)
    times the least one (De Lathauwer et al., 2000), and alternates between P and Q, which only
    lowers it. It is idempotent. Ranks are chosen by hand or by size, not by variational Bayes.

    Args:
        ranks: Pair of integers of at least 1, `(r_in, r_out)`, or None. Neither may be above its
            number of units, nor above the other times the size of the window.
        ratio: Number in (0, 1], or None: parameters of the three factors over parameters of the
            kernel. From (1, 1) on, the ranks grow in proportion to S and T, one by one (that of
            fewer units first if both are due), for as long as the factors have at most that
            fraction; neither grows above the other one times the size of the window.

    Exactly one of `ranks` and `ratio` must be given.

    Example:
    >>> import numpy as np
    >>> from keras_compaware.base import axes_by_rank
    >>> code = Tucker2(ranks=(2, 3)).encode(np.ones((3, 3, 8, 8), "float32"))
    >>> {name: tuple(part.shape) for name, part in code.parts.items()}
    {'input': (1, 8, 2), 'core': (1, 9, 2, 3), 'output': (1, 3, 8)}
    >>> Tucker2(ratio=0.25).ranks_of((3, 3, 64, 64), axes_by_rank(4))
    (26, 25)
    """

    ranks: tuple | None = None
    ratio: float | None = None

    needs_decomposition = True

    def __post_init__(self):
        if (self.ranks is None) == (self.ratio is None):
            raise ValueError(
                "Tucker2: give exactly one of `ranks` and `ratio`. "
                f"Received: ranks={self.ranks!r}, ratio={self.ratio!r}."
            )
        check_number("Tucker2", "ratio", self.ratio, 0.0, 1.0, low_open=True, optional=True)
        if self.ranks is None:
            return
        meaning = "for the inputs and for the outputs"
        object.__setattr__(self, "ranks", check_pair("Tucker2", "ranks", self.ranks, 1, meaning))

    @property
    def budget(self):
        return None if self.ratio is None else "ratio"

    def ranks_of(self, shape, axes):
        """Returns `(r_in, r_out)` for a kernel of this shape.

        Raises:
            ValueError: If `ranks` are above the largest that a kernel of this shape can have.
        """
        _, window, inputs, outputs = tensor_shape(shape, axes)
        if self.ratio is not None:
            ranks, costs = _ranks_by_cost(window, inputs, outputs)
            most = self.ratio * window * inputs * outputs * (1 + 1e-9)
            return tuple(map(int, ranks[max(0, np.searchsorted(costs, most, "right") - 1)]))
        first, second = self.ranks
        if first > min(inputs, window * second) or second > min(outputs, window * first):
            raise ValueError(
                f"Tucker2: ranks={self.ranks} do not fit a kernel of shape {tuple(shape)}, which "
                f"has {inputs} input units, {outputs} output units and a window of {window}: "
                f"expected at most ({inputs}, {outputs}), and neither above the other times "
                f"{window}. Use smaller ranks, or `ratio=`, which scales with the kernel."
            )
        return self.ranks

    def reason_to_skip(self, shape, axes):
        _, window, inputs, outputs = tensor_shape(shape, axes)
        if window == 1:
            return "it has no window: LowRank factorises it"
        ranks = self.ranks_of(shape, axes)
        before, after = window * inputs * outputs, _cost(window, inputs, outputs, *ranks)
        if after >= before:
            return (
                f"ranks {ranks[0]} and {ranks[1]} save nothing on {inputs} x {outputs} units and a "
                f"window of {window} ({after} parameters instead of {before})"
            )
        return None

    def __call__(self, w, axes=None, budget=None):
        self.refuse_variable(w)
        w, axes, cast = as_kernel(w, axes)
        tensor, fold = _tensorise(w, axes)
        if budget is None:
            ranks = self.ranks_of(w.shape, axes)
        else:
            ranks = _ramped_ranks(budget, *tensor.shape[1:])
        return cast(fold(_expand(*_factors(tensor, *_fit(tensor, *ranks)))))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        p, q = _fit(tensor, *self.ranks_of(w.shape, axes))
        return self._code(p, q, tensor, w, dtype, axes)

    def decode(self, code):
        _, fold = _tensorise(ops.zeros(code.shape, "float32"), code.axes)
        parts = (code.parts[name] for name in ("input", "core", "output"))
        return ops.cast(fold(_expand(*parts)), code.dtype)

    def basis_shape(self, shape, axes):
        stack, _, inputs, outputs = tensor_shape(shape, axes)
        return (stack, inputs + outputs, max(self.ranks_of(shape, axes)))

    def basis(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        ranks = self.ranks_of(w.shape, axes)
        widest = max(ranks)
        both = [
            ops.pad(part, ((0, 0), (0, 0), (0, widest - rank)))
            for part, rank in zip(_fit(tensor, *ranks), ranks, strict=True)
        ]
        return ops.concatenate(both, axis=1)

    def encode_on(self, basis, w, axes=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        first, second = self.ranks_of(w.shape, axes)
        inputs = tensor.shape[2]
        p, q = basis[:, :inputs, :first], basis[:, inputs:, :second]
        return self._code(p, q, tensor, w, dtype, axes)

    def _code(self, p, q, tensor, w, dtype, axes):
        parts = dict(zip(("input", "core", "output"), _factors(tensor, p, q), strict=True))
        return Code(
            parts=parts,
            bits=dict.fromkeys(parts, 32),
            payload={"input": _FACTOR_AXES, "core": _CORE_AXES, "output": _FACTOR_AXES},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
            split="tucker",
        )


def _tensorise(w, axes):
    """The kernel as (stack, window, inputs, outputs), and the function that folds one back."""
    matrix, fold = matricise(w, axes)
    tensor = ops.reshape(matrix, tensor_shape(w.shape, axes))
    return tensor, lambda tensor: fold(ops.reshape(tensor, matrix.shape))


def _cost(window, inputs, outputs, first, second):
    """Parameters of the three factors."""
    return inputs * first + window * first * second + second * outputs


@functools.lru_cache(maxsize=256)
def _ranks_by_cost(window, inputs, outputs):
    """Returns `(pairs of ranks (number, 2), their costs (number,))`, from the cheapest on."""
    steps = [
        (rank / size, size, side)
        for side, size in enumerate((inputs, outputs))
        for rank in range(2, size + 1)
    ]
    ranks, found = [1, 1], [(1, 1)]
    for _, _, side in sorted(steps):
        ranks[side] += 1
        pair = min(ranks[0], window * ranks[1]), min(ranks[1], window * ranks[0])
        if pair != found[-1]:
            found.append(pair)
    costs = [_cost(window, inputs, outputs, *pair) for pair in found]
    return np.array(found, "int32"), np.array(costs, "float64")


def _ramped_ranks(ratio, window, inputs, outputs):
    """The ranks for a ratio that may be traced."""
    ranks, costs = _ranks_by_cost(window, inputs, outputs)
    ratios = ops.convert_to_tensor((costs / (window * inputs * outputs)).astype("float32"))
    fitting = ratios <= ops.cast(ratio, "float32") * (1 + 1e-6)
    last = ops.maximum(ops.sum(ops.cast(fitting, "int32")) - 1, 0)
    first, second = (ops.convert_to_tensor(column) for column in ranks.T)
    return ops.take(first, last), ops.take(second, last)


def _fit(tensor, first, second):
    """Returns orthonormal `(p (stack, inputs, first), q (stack, outputs, second))`."""
    by_output = ops.swapaxes(tensor, 2, 3)
    p, q = _leading(tensor, first), _leading(by_output, second)
    for _ in range(_SWEEPS):
        p = _leading(ops.matmul(tensor, q[:, None]), first)
        q = _leading(ops.matmul(by_output, p[:, None]), second)
    return p, q


def _leading(tensor, rank):
    """The first left singular vectors of (stack, window, rows, columns), window beside columns.

    Of a rank that is traced, columns of zeros stand in for the others.
    """
    rows = ops.swapaxes(tensor, 1, 2)
    left, _, _ = svd(ops.reshape(rows, (*rows.shape[:2], rows.shape[2] * rows.shape[3])))
    if isinstance(rank, int):
        return left[:, :, :rank]
    return ops.where(ops.arange(left.shape[-1]) < rank, left, ops.zeros_like(left))


def _factors(tensor, p, q):
    """`(p, core, q transposed)` for given orthonormal p and q."""
    core = ops.matmul(ops.swapaxes(p, 1, 2)[:, None], ops.matmul(tensor, q[:, None]))
    return p, core, ops.swapaxes(q, 1, 2)


def _expand(p, core, output):
    return ops.matmul(ops.matmul(p[:, None], core), output[:, None])
