"""Low rank of two modes: a kernel as a small core between two thin matrices."""

import dataclasses
import functools
import math

import numpy as np
from keras import ops

from keras_compaware._math.axes import matricise, tensor_shape
from keras_compaware._math.svd import svd
from keras_compaware.base import (
    Code,
    Compressor,
    KernelAxes,
    as_kernel,
    check_number,
    check_pair,
    register,
)
from keras_compaware.compressors._ranks import (
    VBMF,
    check_limits,
    known,
    limited,
    rank_by_energy,
    rank_by_vbmf,
    rounded_down,
)

_FACTOR_AXES = KernelAxes(inputs=(1,), outputs=(2,))
_CORE_AXES = KernelAxes(inputs=(2,), outputs=(3,), spatial=(1,))
_SWEEPS = 2


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
    lowers it. It is idempotent for fixed ranks.

    The ranks are given, follow from the size of the kernel (`ratio`), or are chosen from its
    values, each from the unfolding of its mode by itself: by `energy`, or by variational Bayes
    (`ranks="vbmf"`, see `LowRank`) as Kim et al. do. The callback takes those of the first firing
    and keeps them. No rank is above the other one times the size of the window, since no kernel
    has such ranks.

    With the energy e, the error is at most sqrt(2 (1 - e)) ||K||_F: what each of the unfoldings
    loses adds up.

    Args:
        ranks: Pair of integers of at least 1, `(r_in, r_out)`, "vbmf", or None. Neither may be
            above its number of units, nor above the other times the size of the window.
        ratio: Number in (0, 1], or None: parameters of the three factors over parameters of the
            kernel. From (1, 1) on, the ranks grow in proportion to S and T, one by one (that of
            fewer units first if both are due), for as long as the factors have at most that
            fraction; neither grows above the other one times the size of the window.
        energy: Number in (0, 1], or None: of each mode, the smallest rank whose squared singular
            values have this fraction of the sum of all.
        min_rank: Integer of at least 1: the least of the ranks that are chosen. Default 1.
        max_ratio: Number in (0, 1], or None (default): largest share of the kernel's parameters
            that the factors of ranks chosen from the values may have. If they have more, both
            ranks fall in proportion. Where it contradicts `min_rank`, that one counts.
        round_to: Integer of at least 1: ranks that are chosen are multiples of it: the next ones,
            for `ratio` and under the limits those before. The full rank, and one that is smaller
            than the first multiple, stay. Default 1.

    Exactly one of `ranks`, `ratio` and `energy` must be given.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or there is nothing for it to act on (a limit of
            ranks that are given).

    Example:
    >>> import numpy as np
    >>> from keras_compaware.base import axes_by_rank
    >>> code = Tucker2(ranks=(2, 3)).encode(np.ones((3, 3, 8, 8), "float32"))
    >>> {name: tuple(part.shape) for name, part in code.parts.items()}
    {'input': (1, 8, 2), 'core': (1, 9, 2, 3), 'output': (1, 3, 8)}
    >>> Tucker2(ratio=0.25).ranks_of((3, 3, 64, 64), axes_by_rank(4))
    (26, 25)
    >>> Tucker2(ratio=0.25, round_to=8).ranks_of((3, 3, 64, 64), axes_by_rank(4))
    (24, 24)
    >>> Tucker2(energy=0.9).settle(np.ones((3, 3, 8, 8), "float32")).ranks
    (1, 1)
    """

    ranks: tuple | str | None = None
    ratio: float | None = None
    _: dataclasses.KW_ONLY
    energy: float | None = None
    min_rank: int = 1
    max_ratio: float | None = None
    round_to: int = 1

    needs_decomposition = True

    def __post_init__(self):
        given = [name for name in ("ranks", "ratio", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "Tucker2: give exactly one of `ranks`, `ratio` and `energy`. Received: "
                f"ranks={self.ranks!r}, ratio={self.ratio!r}, energy={self.energy!r}."
            )
        for name in ("ratio", "energy"):
            value = getattr(self, name)
            check_number("Tucker2", name, value, 0.0, 1.0, low_open=True, optional=True)
        by_hand = self.ranks is not None and not isinstance(self.ranks, str)
        if by_hand:
            meaning = 'for the inputs and for the outputs (or "vbmf")'
            ranks = check_pair("Tucker2", "ranks", self.ranks, 1, meaning)
            object.__setattr__(self, "ranks", ranks)
        elif self.ranks not in (VBMF, None):
            raise ValueError(
                f'Tucker2: `ranks` must be a pair of integers, or "vbmf". Received: {self.ranks!r}.'
            )
        limits = self.min_rank, self.max_ratio, self.round_to
        check_limits("Tucker2", by_hand, given[0], *limits)
        if by_hand and any(rank % self.round_to for rank in self.ranks):
            raise ValueError(
                "Tucker2: `ranks` must be multiples of `round_to`. Received: "
                f"ranks={self.ranks}, round_to={self.round_to}."
            )

    @property
    def settles(self):
        return self.energy is not None or self.ranks == VBMF

    @property
    def budget(self):
        return None if self.ratio is None else "ratio"

    def ranks_of(self, shape, axes):
        """Returns `(r_in, r_out)` for a kernel of this shape, or None (chosen from the values).

        Raises:
            ValueError: If `ranks` are above the largest that a kernel of this shape can have.
        """
        _, window, inputs, outputs = tensor_shape(shape, axes)
        if self.settles:
            return None
        if self.ratio is not None:
            return self._largest(self.ratio, window, inputs, outputs, (inputs, outputs))
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
        least = min(self.min_rank, inputs), min(self.min_rank, outputs)
        ranks = _within_window(*least, window) if ranks is None else ranks
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
            ranks = self._ranks(w.shape, axes, tensor)
        else:
            ranks = self._ramped_ranks(budget, *tensor.shape[1:])
        return cast(fold(_expand(*_factors(tensor, *_fit(tensor, *ranks)))))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        p, q = _fit(tensor, *self._ranks(w.shape, axes, tensor))
        return self._code(p, q, tensor, w, dtype, axes)

    def decode(self, code):
        _, fold = _tensorise(ops.zeros(code.shape, "float32"), code.axes)
        parts = (code.parts[name] for name in ("input", "core", "output"))
        return ops.cast(fold(_expand(*parts)), code.dtype)

    def settle(self, w, axes=None):
        if not self.settles:
            return self
        w, axes, _ = as_kernel(w, axes)
        return Tucker2(ranks=self._ranks(w.shape, axes, _tensorise(w, axes)[0]))

    def basis_shape(self, shape, axes):
        stack, _, inputs, outputs = tensor_shape(shape, axes)
        return (stack, inputs + outputs, max(self.ranks_of(shape, axes) or (inputs, outputs)))

    def basis(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        ranks = self._ranks(w.shape, axes, tensor)
        widest = self.basis_shape(w.shape, axes)[-1]
        both = [
            ops.pad(part, ((0, 0), (0, 0), (0, widest - rank)))
            for part, rank in zip(_fit(tensor, *ranks), ranks, strict=True)
        ]
        return ops.concatenate(both, axis=1)

    def encode_on(self, basis, w, axes=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        tensor, _ = _tensorise(w, axes)
        first, second = self.ranks_of(w.shape, axes) or (None, None)
        inputs = tensor.shape[2]
        p, q = basis[:, :inputs, :first], basis[:, inputs:, :second]
        return self._code(p, q, tensor, w, dtype, axes)

    def _ranks(self, shape, axes, tensor):
        """The ranks for a kernel of these values, a pair of integers."""
        if not self.settles:
            return self.ranks_of(shape, axes)
        window, inputs, outputs = tensor.shape[1:]
        found = []
        for unfolding in (_unfolded(tensor), _unfolded(ops.swapaxes(tensor, 2, 3))):
            values = svd(unfolding)[1]
            if self.energy is None:
                rank = rank_by_vbmf("Tucker2", unfolding, values)
            else:
                rank = int(known("Tucker2", rank_by_energy(values, self.energy)))
            full = min(unfolding.shape[1:])
            found.append(limited(rank, full, full, self.min_rank, self.round_to))
        ranks = _within_window(*found, window, self.round_to)
        most = math.inf if self.max_ratio is None else self.max_ratio * window * inputs * outputs
        if _cost(window, inputs, outputs, *ranks) <= most:
            return ranks
        return self._largest(self.max_ratio, window, inputs, outputs, ranks)

    def _largest(self, ratio, window, inputs, outputs, most):
        """The largest ranks up to `most` whose factors have at most that share."""
        limits = self.min_rank, self.round_to
        ranks, costs = _ranks_by_cost(window, inputs, outputs, most, *limits)
        limit = ratio * window * inputs * outputs * (1 + 1e-9)
        return tuple(map(int, ranks[max(0, np.searchsorted(costs, limit, "right") - 1)]))

    def _ramped_ranks(self, ratio, window, inputs, outputs):
        """The ranks for a ratio that may be traced."""
        limits = (inputs, outputs), self.min_rank, self.round_to
        ranks, costs = _ranks_by_cost(window, inputs, outputs, *limits)
        ratios = ops.convert_to_tensor((costs / (window * inputs * outputs)).astype("float32"))
        fitting = ratios <= ops.cast(ratio, "float32") * (1 + 1e-6)
        last = ops.maximum(ops.sum(ops.cast(fitting, "int32")) - 1, 0)
        first, second = (ops.convert_to_tensor(column) for column in ranks.T)
        return ops.take(first, last), ops.take(second, last)

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


def _within_window(first, second, window, round_to=1):
    """Returns the ranks with neither above the other times the window, rounded down to that."""
    most = window * second
    first = np.where(first > most, rounded_down(most, round_to), first)
    most = window * first
    second = np.where(second > most, rounded_down(most, round_to), second)
    return (first, second) if first.ndim else (int(first), int(second))


@functools.lru_cache(maxsize=256)
def _ranks_by_cost(window, inputs, outputs, most, min_rank, round_to):
    """Returns `(pairs of ranks (number, 2), their costs (number,))`, from the cheapest on.

    They grow in proportion to the largest ones, `most`.
    """
    steps = [
        (rank / size, size, side) for side, size in enumerate(most) for rank in range(2, size + 1)
    ]
    sides = np.array([side for _, _, side in sorted(steps)], int)
    grown = np.stack([np.cumsum(np.append(1, sides == side)) for side in (0, 1)])
    floors = np.minimum(min_rank, [inputs, outputs])[:, None]
    grown = np.maximum(rounded_down(grown, round_to), floors)
    pairs = np.stack(_within_window(*grown, window, round_to), axis=1)
    pairs = pairs[np.append(True, np.any(np.diff(pairs, axis=0), axis=1))]
    costs = _cost(window, inputs, outputs, *pairs.T)
    return pairs.astype("int32"), costs.astype("float64")


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
    left, _, _ = svd(_unfolded(tensor))
    if isinstance(rank, int):
        return left[:, :, :rank]
    return ops.where(ops.arange(left.shape[-1]) < rank, left, ops.zeros_like(left))


def _unfolded(tensor):
    """(stack, window, rows, columns) as matrices (stack, rows, window beside columns)."""
    rows = ops.swapaxes(tensor, 1, 2)
    return ops.reshape(rows, (*rows.shape[:2], rows.shape[2] * rows.shape[3]))


def _factors(tensor, p, q):
    """`(p, core, q transposed)` for given orthonormal p and q."""
    core = ops.matmul(ops.swapaxes(p, 1, 2)[:, None], ops.matmul(tensor, q[:, None]))
    return p, core, ops.swapaxes(q, 1, 2)


def _expand(p, core, output):
    return ops.matmul(ops.matmul(p[:, None], core), output[:, None])
