"""The table: a new compressor or regularizer is tested by one row.

A row states what the method promises; the batteries of this folder try it on every kernel of
`kernels_under_test` and on plain arrays, on whatever backend Keras runs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from keras_compaware import (
    L1,
    BinaryCodeQuantization,
    Chain,
    GroupLasso,
    GroupPruning,
    LowRank,
    LowRankGroupSparsity,
    MagnitudePruning,
    NMPruning,
    NuclearNorm,
    PartialGroupLasso,
    SparseGroupLasso,
    TernaryQuantization,
    TruncatedNuclearNorm,
    Tucker2,
    UniformQuantization,
    WeightClustering,
)
from keras_compaware.base import Compressor, ProximalRegularizer
from tests.laws.kernels_under_test import matrices, unit_groups
from tests.math.references import variational_solution


@dataclasses.dataclass(frozen=True)
class CompressorCase:
    """What a compressor promises.

    Args:
        name: Identifies the row.
        compressor: The compressor.
        num_bits: Function `(shape, axes) -> int`, by hand from the definition.
        exact: Whether decode(encode(w)) and compiled results equal C(w) bit for bit (selections)
            rather than to 1e-6 of the largest entry (factors).
        idempotent: Whether C(C(w)) = C(w), to 1e-6 of the largest entry.
        steady: How far 100 further applications may change the norm of C(w), as a fraction.
        oracle: Function `(w, axes) -> array` of float64 mathematics in NumPy, or None.
        budgets: Pairs of a budget and the compressor that has it as its argument.
        rank: The rank that a kernel's matrices must have at least, for `LowRank(rank=)`.
        ranks: The ranks that its unfoldings must have at least, for `Tucker2(ranks=)`.
        variant: Whether a row before it is of the same kind: slow tests on JAX, which compiles
            every operation anew for every shape.
    """

    name: str
    compressor: Compressor
    num_bits: Callable
    exact: bool = False
    idempotent: bool = True
    steady: float = 0.01
    oracle: Callable | None = None
    budgets: tuple = ()
    rank: int = 1
    ranks: tuple = (1, 1)
    variant: bool = False

    @property
    def id(self):
        return self.name

    def fits(self, shape, axes):
        """Whether the compressor has a meaning on kernels of this shape."""
        split = getattr(self.compressor, "split", "channel")
        window, inputs, outputs = tensor_sizes(shape, axes)
        first, second = self.ranks
        if first > min(inputs, window * second) or second > min(outputs, window * first):
            return False
        return all(min(m.shape) >= self.rank for m, _ in matrices(np.zeros(shape), axes, split))


@dataclasses.dataclass(frozen=True)
class RegularizerCase:
    """What a proximal regularizer promises.

    Args:
        name: Identifies the row.
        regularizer: The regularizer, of strength 0.7.
        value: Function `(w, axes) -> float`: the penalty in NumPy, float64.
        oracle: Function `(w, axes, threshold) -> array`: the proximal map, with
            threshold = step_size * strength.
        gradient: Function `(w, axes) -> array`: the (sub)gradient of the penalty at a generic w.
        groups: Function `(w, axes) -> [(mask, c)]`: the penalised groups and their weights; or
            None, for singular values.
        in_proportion: Names of the strengths that a budget scales as well.
        pair: The compressor that large steps end with, if not everything penalised vanishes.
        convex: Whether the penalty is convex.
        gap: How far the map's objective may lie above the optimum, as a fraction of it.
        in_loss: Whether it can be a `kernel_regularizer=`.
        exact: Whether a step of size zero leaves every bit alone.
        variant: Whether a row before it is of the same kind, see `CompressorCase`.
    """

    name: str
    regularizer: ProximalRegularizer
    value: Callable
    oracle: Callable
    gradient: Callable
    groups: Callable | None = None
    in_proportion: tuple = ()
    pair: Compressor | None = None
    convex: bool = True
    gap: float = 0.0
    in_loss: bool = True
    exact: bool = True
    variant: bool = False

    @property
    def id(self):
        return self.name


# ---- oracles, in NumPy ------------------------------------------------------------------------


def pruned(sparsity):
    """The k entries of largest magnitude by a stable sort: ties go to the lower index."""

    def oracle(w, axes):
        order = np.argsort(-np.abs(w.reshape(-1)), kind="stable")
        kept = np.zeros(w.size, bool)
        kept[order[: w.size - round(sparsity * w.size)]] = True
        return np.where(kept.reshape(w.shape), w, 0)

    return oracle


def truncated(rank_of, split="channel"):
    """The best approximation of a rank, for each linear map by itself."""

    def oracle(w, axes):
        result = w.astype("float64")
        rank = rank_of([matrix for matrix, _ in matrices(result, axes, split)])
        for matrix, write in matrices(result, axes, split):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            write(left[:, :rank] * values[:rank] @ right[:rank])
        return result

    return oracle


def rank_for_ratio(ratio):
    """The largest rank whose factors have at most that fraction of the parameters."""

    def rank_of(found):
        rows, columns = found[0].shape
        fitting = [
            r
            for r in range(1, min(rows, columns) + 1)
            if r * (rows + columns) <= ratio * rows * columns * (1 + 1e-12)
        ]
        return max(fitting, default=1)

    return rank_of


def rank_for_energy(energy, power=2):
    """The smallest rank that keeps that fraction of the singular values of all linear maps."""

    def rank_of(found):
        values = [np.linalg.svd(matrix, compute_uv=False) for matrix in found]
        total = sum(np.sum(v**power) for v in values)
        for rank in range(1, min(found[0].shape) + 1):
            if sum(np.sum(v[:rank] ** power) for v in values) >= energy * total:
                break
        return rank

    return rank_of


def rank_by_variational_bayes(least):
    """The largest of the ranks of the linear maps, without the channels that are zero."""

    def rank_of(found):
        found = [m[m.any(axis=1)][:, m.any(axis=0)] for m in found if m.any()]
        ranks = [variational_solution(matrix)[0] for matrix in found]
        return max(least, *ranks) if ranks else least

    return rank_of


def full_rank(found):
    return min(found[0].shape)


def rounded(rank_of, multiple, ratio=None):
    """The next multiple, but not above the full rank, nor what a ratio allows."""

    def rounded_rank_of(found):
        most = min(found[0].shape)
        rank = min(-(-rank_of(found) // multiple) * multiple, most)
        if ratio is None:
            return rank
        most = rank_for_ratio(ratio)(found)
        return min(rank, most if most < multiple else most - most % multiple)

    return rounded_rank_of


def factor_shapes(shape, axes, rank, split="channel"):
    """Shapes of the two stacks of factors."""
    found = matrices(np.zeros(shape), axes, split)
    rows, columns = found[0][0].shape
    return (len(found), rows, rank), (len(found), rank, columns)


def factor_bits(rank_of, split="channel"):
    def num_bits(shape, axes):
        rank = rank_of([matrix for matrix, _ in matrices(np.zeros(shape), axes, split)])
        return sum(32 * math.prod(s) for s in factor_shapes(shape, axes, rank, split))

    return num_bits


def quantized_factor_bits(rank_of, bits):
    def num_bits(shape, axes):
        rank = rank_of([matrix for matrix, _ in matrices(np.zeros(shape), axes)])
        return sum(bits * math.prod(s) + 32 for s in factor_shapes(shape, axes, rank))

    return num_bits


def num_scales(shape, axes):
    """One scale for each output unit of each linear map."""
    return len(unit_groups(shape, axes, "outputs"))


def kept(sparsity, shape):
    return math.prod(shape) - round(sparsity * math.prod(shape))


def pruned_in_blocks(keep, block):
    """The largest of every so many consecutive rows of each column, by a stable sort."""

    def oracle(w, axes):
        result = w.copy()
        for matrix, write in matrices(result, axes):
            for start in range(0, len(matrix), block):
                part = matrix[start : start + block]
                order = np.argsort(-np.abs(part), axis=0, kind="stable")
                np.put_along_axis(part, order[keep:], 0, axis=0)
            write(matrix)
        return result

    return oracle


def block_bits(keep, block, bits=32, extra=0):
    """A value and a position for every slot of every block; a shorter last block is filled up."""

    def num_bits(shape, axes):
        found = [matrix.shape for matrix, _ in matrices(np.zeros(shape), axes)]
        slots = sum(-(-rows // block) * keep * columns for rows, columns in found)
        return slots * (bits + math.ceil(math.log2(block))) + extra

    return num_bits


def tiles(shape, axes, size):
    """Masks of the tiles of the channel matrices, those of one matrix row by row."""
    number = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for matrix, _ in matrices(number, axes):
        for row in range(0, matrix.shape[0], size[0]):
            for column in range(0, matrix.shape[1], size[1]):
                tile = matrix[row : row + size[0], column : column + size[1]]
                found.append(np.isin(number, tile))
    return found


def in_order(masks):
    return sorted(masks, key=lambda mask: int(np.flatnonzero(mask)[0]))


def pruned_groups(sparsity, groups_of):
    """The groups of largest norm by a stable sort."""

    def oracle(w, axes):
        groups = groups_of(w.shape, axes)
        norms = np.array([np.linalg.norm(w[mask].astype("float64")) for mask in groups])
        # Equal ones differ by rounding only, in which NumPy need not agree with the backend.
        order = np.argsort(-norms.astype("float32"), kind="stable")
        result = w.copy()
        for index in order[num_groups_kept(sparsity, groups) :]:
            result[groups[index]] = 0
        return result

    return oracle


def num_groups_kept(sparsity, groups):
    return max(1, len(groups) - round(sparsity * len(groups)))


def group_bits(sparsity, groups_of, bits=32, scales=lambda shape, axes: 0):
    """A bit for every group, and the values of those that are kept."""

    def num_bits(shape, axes):
        groups = groups_of(shape, axes)
        values = num_groups_kept(sparsity, groups) * int(np.sum(groups[0]))
        return len(groups) + bits * values + 32 * scales(shape, axes)

    return num_bits


def input_units(shape, axes):
    return in_order(unit_groups(shape, axes, "inputs"))


def output_units(shape, axes):
    return in_order(unit_groups(shape, axes, "outputs"))


def tiled_shape(found, size):
    """`(tiles, rows, columns)` of matrices of one shape; tiles are not larger than these."""
    rows, columns = (min(size, extent) for extent in found[0].shape)
    down, across = (-(-extent // size) for extent in found[0].shape)
    return len(found) * down * across, rows, columns


def truncated_tiles(rank_of, size):
    def oracle(w, axes):
        result = w.astype("float64")
        for matrix, write in matrices(result, axes):
            rank = rank_of([np.zeros(tiled_shape([matrix], size)[1:])])
            for row in range(0, matrix.shape[0], size):
                for column in range(0, matrix.shape[1], size):
                    part = matrix[row : row + size, column : column + size]
                    left, values, right = np.linalg.svd(part, full_matrices=False)
                    part[...] = left[:, :rank] * values[:rank] @ right[:rank]
            write(matrix)
        return result

    return oracle


def tiled_bits(rank_of, size):
    def num_bits(shape, axes):
        found = [matrix for matrix, _ in matrices(np.zeros(shape), axes)]
        number, rows, columns = tiled_shape(found, size)
        return 32 * number * rank_of([np.zeros((rows, columns))]) * (rows + columns)

    return num_bits


def tensor_sizes(shape, axes):
    """`(window, inputs, outputs)` of one linear map."""
    matrix = matrices(np.zeros(shape), axes)[0][0]
    window = math.prod(shape[axis] for axis in axes.spatial)
    return window, matrix.shape[0] // window, matrix.shape[1]


def tucker_by_alternation(ranks_of, sweeps=2, of_values=False):
    """Leading singular vectors of the unfoldings, then of the kernel seen through the others."""

    def leading(tensor, axis, rank):
        unfolding = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        return np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]

    def oracle(w, axes):
        result = w.astype("float64")
        window, inputs, outputs = tensor_sizes(w.shape, axes)
        first, second = ranks_of(w, axes) if of_values else ranks_of(window, inputs, outputs)
        for matrix, write in matrices(result, axes):
            kernel = matrix.reshape(window, inputs, outputs)
            p, q = leading(kernel, 1, first), leading(kernel, 2, second)
            for _ in range(sweeps):
                p = leading(kernel @ q, 1, first)
                q = leading(np.einsum("xst,sa->xat", kernel, p), 2, second)
            write((p @ (p.T @ kernel @ q) @ q.T).reshape(matrix.shape))
        return result

    return oracle


def tucker_cost(window, inputs, outputs, first, second):
    return inputs * first + window * first * second + second * outputs


def ranks_for_ratio(ratio):
    """By trial: grow the rank that lags behind its share while the factors are small enough."""

    def ranks_of(window, inputs, outputs):
        best, first, second = (1, 1), 1, 1
        while first < inputs or second < outputs:
            lagging = [(first + 1) * outputs, (second + 1) * inputs]
            lagging = [lagging[0] if first < inputs else math.inf, lagging[1]]
            lagging[1] = lagging[1] if second < outputs else math.inf
            if lagging[0] == lagging[1]:
                lagging = [inputs, outputs + 0.5]
            if lagging[0] < lagging[1]:
                first += 1
            else:
                second += 1
            pair = min(first, window * second), min(second, window * first)
            cost = tucker_cost(window, inputs, outputs, *pair)
            if cost <= ratio * window * inputs * outputs * (1 + 1e-12):
                best = pair
        return best

    return ranks_of


def multiples_of_two(window, inputs, outputs):
    """For the ratio 0.8, as `ranks_for_ratio`, of all that grow on its way the even ones."""
    best, (first, second) = None, (1, 1)
    for ratio in np.linspace(0, 3, 2000):
        first, second = ranks_for_ratio(ratio)(window, inputs, outputs)
        even = [rank if rank < 2 else rank - rank % 2 for rank in (first, second)]
        pair = min(even[0], window * even[1]), min(even[1], window * even[0])
        cost = tucker_cost(window, inputs, outputs, *pair)
        if best is None or cost <= 0.8 * window * inputs * outputs * (1 + 1e-12):
            best = pair
    return best


def ranks_of_modes(rank_of):
    """Of either unfolding by itself, but neither above the other times the window."""

    def ranks_of(w, axes):
        window, inputs, outputs = tensor_sizes(w.shape, axes)
        found = [m.reshape(window, inputs, outputs) for m, _ in matrices(w.astype("f8"), axes)]
        first = rank_of([np.swapaxes(k, 0, 1).reshape(inputs, -1) for k in found])
        second = rank_of([np.moveaxis(k, 2, 0).reshape(outputs, -1) for k in found])
        first = min(first, window * second)
        return first, min(second, window * first)

    return ranks_of


def tucker_bits_of_values(ranks_of):
    """The bits for the kernel that the laws compress."""

    def num_bits(shape, axes):
        w = np.random.default_rng(0).normal(size=shape).astype("float32")
        return tucker_bits(lambda *sizes: ranks_of(w, axes))(shape, axes)

    return num_bits


def tucker_bits(ranks_of, bits=32, extra=0):
    def num_bits(shape, axes):
        sizes = tensor_sizes(shape, axes)
        cost = tucker_cost(*sizes, *ranks_of(*sizes))
        return len(matrices(np.zeros(shape), axes)) * cost * bits + extra

    return num_bits


def in_rows(of_row, axis=None):
    """A function of the values of the whole kernel, or of those of every output unit."""

    def oracle(w, axes):
        result = w.astype("float64")
        masks = unit_groups(w.shape, axes, axis) if axis else [np.ones(w.shape, bool)]
        for mask in masks:
            result[mask] = of_row(result[mask])
        return result

    return oracle


def binary_sums(bits, fit):
    """Signs of what is left, and their mean magnitudes or all scales by least squares."""

    def of_row(values):
        planes, rest, total = [], values, np.zeros_like(values)
        for _ in range(bits):
            planes.append(np.where(rest >= 0, 1.0, -1.0))
            if fit == "greedy":
                total = total + np.mean(np.abs(rest)) * planes[-1]
            else:
                every = np.stack(planes, axis=1)
                total = every @ np.linalg.lstsq(every, values, rcond=None)[0]
            rest = values - total
        return total

    return of_row


def ternary(values):
    magnitudes = np.abs(values)
    large = magnitudes > 0.7 * np.mean(magnitudes)
    return np.where(large, np.sign(values) * np.mean(magnitudes[large]), 0) if large.any() else 0


# ---- compressors ------------------------------------------------------------------------------

COMPRESSORS = (
    CompressorCase(
        "pruning 70 %",
        MagnitudePruning(0.7),
        num_bits=lambda shape, axes: math.prod(shape) + 32 * kept(0.7, shape),
        exact=True,
        oracle=pruned(0.7),
        budgets=tuple((s, MagnitudePruning(s)) for s in (0.0, 0.25, 0.5, 0.9375)),
    ),
    CompressorCase(
        "pruning nothing",
        MagnitudePruning(0.0),
        num_bits=lambda shape, axes: 33 * math.prod(shape),
        exact=True,
        oracle=lambda w, axes: w,
        variant=True,
    ),
    CompressorCase(
        "rank 1",
        LowRank(rank=1),
        num_bits=factor_bits(lambda found: 1),
        oracle=truncated(lambda found: 1),
    ),
    CompressorCase(
        "rank 2",
        LowRank(rank=2),
        num_bits=factor_bits(lambda found: 2),
        oracle=truncated(lambda found: 2),
        budgets=((1, LowRank(rank=1)), (2, LowRank(rank=2))),
        rank=2,
        variant=True,
    ),
    CompressorCase(
        "ratio 0.6",
        LowRank(ratio=0.6),
        num_bits=factor_bits(rank_for_ratio(0.6)),
        oracle=truncated(rank_for_ratio(0.6)),
        budgets=tuple((r, LowRank(ratio=r)) for r in (0.1, 0.25, 0.5, 0.9, 1.0)),
    ),
    CompressorCase(
        "ratio 0.5, spatial",
        LowRank(ratio=0.5, split="spatial"),
        num_bits=factor_bits(rank_for_ratio(0.5), "spatial"),
        oracle=truncated(rank_for_ratio(0.5), "spatial"),
        budgets=((0.75, LowRank(ratio=0.75, split="spatial")),),
        variant=True,
    ),
    CompressorCase(
        "energy 0.8",
        LowRank(energy=0.8),
        num_bits=lambda shape, axes: None,  # depends on the values
        oracle=truncated(rank_for_energy(0.8)),
        idempotent=False,  # until it is settled
        steady=1.0,
    ),
    CompressorCase(
        "energy 0.5 of the sums, multiples of 2, at most 0.9",
        LowRank(energy=0.5, energy_of="sums", max_ratio=0.9, round_to=2),
        num_bits=lambda shape, axes: None,
        oracle=truncated(rounded(rank_for_energy(0.5, power=1), 2, ratio=0.9)),
        idempotent=False,
        steady=1.0,
        variant=True,
    ),
    CompressorCase(
        "variational",
        LowRank(rank="vbmf"),
        num_bits=lambda shape, axes: None,
        oracle=truncated(rank_by_variational_bayes(1)),
        idempotent=False,
        steady=1.0,
    ),
    CompressorCase(
        "ratio 0.8, multiples of 2",
        LowRank(ratio=0.8, round_to=2),
        num_bits=factor_bits(rounded(full_rank, 2, ratio=0.8)),
        oracle=truncated(rounded(full_rank, 2, ratio=0.8)),
        budgets=tuple((r, LowRank(ratio=r, round_to=2)) for r in (0.3, 1.0)),
        variant=True,
    ),
    *(
        CompressorCase(
            f"{bits} bits",
            UniformQuantization(bits),
            num_bits=lambda shape, axes, bits=bits: bits * math.prod(shape) + 32,
            variant=bits != 4,
        )
        for bits in (2, 3, 4, 8, 16)
    ),
    *(
        CompressorCase(
            f"{bits} bits per output",
            UniformQuantization(bits, axis="outputs"),
            num_bits=lambda shape, axes, bits=bits: (
                bits * math.prod(shape) + 32 * num_scales(shape, axes)
            ),
            variant=bits != 8,
        )
        for bits in (3, 8)
    ),
    CompressorCase(
        "prune, then 4 bits",
        Chain([MagnitudePruning(0.5), UniformQuantization(4)]),
        num_bits=lambda shape, axes: math.prod(shape) + 4 * kept(0.5, shape) + 32,
    ),
    CompressorCase(
        "rank 1, then 8 bits",
        Chain([LowRank(rank=1), UniformQuantization(8)]),
        num_bits=quantized_factor_bits(lambda found: 1, 8),
        idempotent=False,  # balanced factors of a quantized product lie on another grid
        steady=0.02,
    ),
    *(
        CompressorCase(
            f"{keep} of {block}",
            NMPruning(keep=keep, block=block),
            num_bits=block_bits(keep, block),
            exact=True,
            oracle=pruned_in_blocks(keep, block),
            variant=block == 3,
        )
        for keep, block in ((2, 4), (1, 3))
    ),
    CompressorCase(
        "2 of 4, then 4 bits",
        Chain([NMPruning(keep=2, block=4), UniformQuantization(4)]),
        num_bits=block_bits(2, 4, bits=4, extra=32),
        variant=True,
    ),
    CompressorCase(
        "half of the inputs",
        GroupPruning(0.5),
        num_bits=group_bits(0.5, input_units),
        exact=True,
        oracle=pruned_groups(0.5, input_units),
        budgets=tuple((s, GroupPruning(s)) for s in (0.0, 0.25, 0.75)),
    ),
    CompressorCase(
        "half of the outputs",
        GroupPruning(0.5, axis="outputs"),
        num_bits=group_bits(0.5, output_units),
        exact=True,
        oracle=pruned_groups(0.5, output_units),
        variant=True,
    ),
    CompressorCase(
        "half of the tiles",
        GroupPruning(0.5, block=(2, 3)),
        num_bits=group_bits(0.5, functools.partial(tiles, size=(2, 3))),
        exact=True,
        oracle=pruned_groups(0.5, functools.partial(tiles, size=(2, 3))),
    ),
    CompressorCase(
        "half of the outputs, then 8 bits for each",
        Chain([GroupPruning(0.5, axis="outputs"), UniformQuantization(8, axis="outputs")]),
        num_bits=group_bits(
            0.5,
            output_units,
            bits=8,
            scales=lambda shape, axes: num_groups_kept(0.5, output_units(shape, axes)),
        ),
        variant=True,
    ),
    CompressorCase(
        "rank 1, tiles of 3",
        LowRank(rank=1, tile=3),
        num_bits=tiled_bits(lambda found: 1, 3),
        oracle=truncated_tiles(lambda found: 1, 3),
        variant=True,
    ),
    CompressorCase(
        "ratio 0.6, tiles of 4",
        LowRank(ratio=0.6, tile=4),
        num_bits=tiled_bits(rank_for_ratio(0.6), 4),
        oracle=truncated_tiles(rank_for_ratio(0.6), 4),
        budgets=((1.0, LowRank(ratio=1.0, tile=4)),),
    ),
    CompressorCase(
        "Tucker of ranks 2 and 2",
        Tucker2(ranks=(2, 2)),
        num_bits=tucker_bits(lambda *sizes: (2, 2)),
        oracle=tucker_by_alternation(lambda *sizes: (2, 2)),
        ranks=(2, 2),
        variant=True,
    ),
    CompressorCase(
        "Tucker of ratio 0.8",
        Tucker2(ratio=0.8),
        num_bits=tucker_bits(ranks_for_ratio(0.8)),
        oracle=tucker_by_alternation(ranks_for_ratio(0.8)),
        budgets=((0.5, Tucker2(ratio=0.5)),),
    ),
    CompressorCase(
        "Tucker of energy 0.7",
        Tucker2(energy=0.7),
        num_bits=tucker_bits_of_values(ranks_of_modes(rank_for_energy(0.7))),
        oracle=tucker_by_alternation(ranks_of_modes(rank_for_energy(0.7)), of_values=True),
        idempotent=False,  # until it is settled
        steady=1.0,
    ),
    CompressorCase(
        "variational Tucker",
        Tucker2(ranks="vbmf"),
        num_bits=tucker_bits_of_values(ranks_of_modes(rank_by_variational_bayes(1))),
        oracle=tucker_by_alternation(ranks_of_modes(rank_by_variational_bayes(1)), of_values=True),
        idempotent=False,
        steady=1.0,
        variant=True,
    ),
    CompressorCase(
        "Tucker of ratio 0.8, multiples of 2",
        Tucker2(ratio=0.8, round_to=2),
        num_bits=tucker_bits(multiples_of_two),
        oracle=tucker_by_alternation(multiples_of_two),
        budgets=((0.5, Tucker2(ratio=0.5, round_to=2)),),
        variant=True,
    ),
    CompressorCase(
        "Tucker of ranks 1 and 1, then 8 bits",
        Chain([Tucker2(ranks=(1, 1)), UniformQuantization(8)]),
        num_bits=tucker_bits(lambda *sizes: (1, 1), bits=8, extra=3 * 32),
        idempotent=False,  # orthonormal factors of a quantized product lie on another grid
        steady=0.02,
        variant=True,
    ),
    *(
        CompressorCase(
            f"{bits} planes of signs",
            BinaryCodeQuantization(bits),
            num_bits=lambda shape, axes, bits=bits: bits * (math.prod(shape) + 32),
            oracle=in_rows(binary_sums(bits, "refined")),
            variant=bits != 2,
        )
        for bits in (2, 3)
    ),
    CompressorCase(
        "2 planes of signs, greedy",
        BinaryCodeQuantization(2, fit="greedy"),
        num_bits=lambda shape, axes: 2 * (math.prod(shape) + 32),
        oracle=in_rows(binary_sums(2, "greedy")),
        idempotent=False,  # it shrinks
        steady=1.0,
        variant=True,
    ),
    CompressorCase(
        "2 planes of signs, alternating",
        BinaryCodeQuantization(2, fit="alternating", rounds=5),
        num_bits=lambda shape, axes: 2 * (math.prod(shape) + 32),
    ),
    CompressorCase(
        "ternary",
        TernaryQuantization(),
        num_bits=lambda shape, axes: 2 * math.prod(shape) + 32,
        oracle=in_rows(ternary),
    ),
    CompressorCase(
        "ternary per output",
        TernaryQuantization(axis="outputs"),
        num_bits=lambda shape, axes: 2 * math.prod(shape) + 32 * num_scales(shape, axes),
        oracle=in_rows(ternary, "outputs"),
        variant=True,
    ),
    CompressorCase(
        "16 clusters",
        WeightClustering(16, rounds=5),
        num_bits=lambda shape, axes: 4 * math.prod(shape) + 32 * 16,
    ),
    CompressorCase(
        "prune, then 2 planes of signs",
        Chain([MagnitudePruning(0.5), BinaryCodeQuantization(2)]),
        num_bits=lambda shape, axes: math.prod(shape) + 2 * kept(0.5, shape) + 2 * 32,
    ),
    CompressorCase(
        "prune, then 2 clusters",
        Chain([MagnitudePruning(0.5), WeightClustering(2, rounds=5)]),
        num_bits=lambda shape, axes: math.prod(shape) + kept(0.5, shape) + 2 * 32,
        variant=True,
    ),
    CompressorCase(
        "4 clusters of 8 bits",
        Chain([WeightClustering(4, rounds=5), UniformQuantization(8)]),
        num_bits=lambda shape, axes: 2 * math.prod(shape) + 8 * 4 + 32,
        variant=True,
    ),
    CompressorCase(
        "rank 1, then signs",
        Chain([LowRank(rank=1), BinaryCodeQuantization(1)]),
        num_bits=quantized_factor_bits(lambda found: 1, 1),
        variant=True,
    ),
)


# ---- regularizers -----------------------------------------------------------------------------


def with_weights(masks, weighted=True):
    return [(mask, math.sqrt(np.sum(mask)) if weighted else 1.0) for mask in masks]


def units(role, weighted=True, fraction=None):
    """All units, or the first fraction, in the order in which the kernel holds them."""

    def groups(w, axes):
        masks = unit_groups(w.shape, axes, role)
        if fraction is not None:
            masks = in_order(masks)[: max(1, round(fraction * len(masks)))]
        return with_weights(masks, weighted)

    return groups


def smallest_units(role, fraction):
    def groups(w, axes):
        masks = in_order(unit_groups(w.shape, axes, role))
        norms = [np.linalg.norm(w[mask].astype("float64")) for mask in masks]
        chosen = np.argsort(norms, kind="stable")[: max(1, round(fraction * len(masks)))]
        return with_weights([masks[index] for index in chosen])

    return groups


def submatrix(fraction, next_fraction):
    """Of the first inputs the entries that lead to the last outputs, counted as channels are."""

    def groups(w, axes):
        inputs, outputs = (unit_groups(w.shape, axes, role) for role in ("inputs", "outputs"))
        candidates = inputs[: max(1, round(fraction * len(inputs)))]
        going = outputs[: max(1, round(next_fraction * len(outputs)))] if next_fraction else []
        stays = ~np.any([np.zeros(w.shape, bool), *going], axis=0)
        return with_weights([mask & stays for mask in candidates if (mask & stays).any()])

    return groups


def single_entries(w, axes):
    masks = np.eye(w.size, dtype=bool).reshape(w.size, *w.shape)
    return [(mask, 1.0) for mask in masks]


def lasso(name, regularizer, groups, l1=0.0, **promises):
    """A row of a lasso of groups, with a lasso of their entries of strength `l1` before it."""

    def value(w, axes):
        found = groups(w, axes)
        entries = sum(np.sum(np.abs(w[mask])) for mask, _ in found)
        return 0.7 * sum(c * np.linalg.norm(w[mask]) for mask, c in found) + l1 * entries

    def oracle(w, axes, threshold):
        result = w.astype("float64")
        for mask, c in groups(w, axes):
            part = result[mask]
            part = np.sign(part) * np.maximum(np.abs(part) - threshold * l1 / 0.7, 0)
            norm = np.linalg.norm(part)
            result[mask] = part * (max(0.0, 1 - threshold * c / norm) if norm > 0 else 0.0)
        return result

    def gradient(w, axes):
        result = np.zeros(w.shape)
        for mask, c in groups(w, axes):
            result[mask] = 0.7 * c * w[mask] / np.linalg.norm(w[mask]) + l1 * np.sign(w[mask])
        return result

    if l1:
        promises["in_proportion"] = ("l1_strength",)
    return RegularizerCase(name, regularizer, value, oracle, gradient, groups, **promises)


def on_singular_values(split, of_values):
    """Replaces the singular values of every linear map by a function of them."""

    def result(w, axes, *threshold):
        out = w.astype("float64")
        for matrix, write in matrices(out, axes, split):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            write(left * of_values(values, *threshold) @ right)
        return out

    return result


def singular_values(name, regularizer, free=0, **promises):
    """A row of the sum of the singular values, but for the `free` largest."""
    split = regularizer.split

    def shrunk(values, threshold):
        return np.concatenate([values[:free], np.maximum(values[free:] - threshold, 0)])

    def value(w, axes):
        found = [matrix for matrix, _ in matrices(w.astype("float64"), axes, split)]
        return 0.7 * sum(np.sum(np.linalg.svd(m, compute_uv=False)[free:]) for m in found)

    return RegularizerCase(
        name,
        regularizer,
        value,
        oracle=on_singular_values(split, shrunk),
        gradient=on_singular_values(split, lambda s: 0.7 * (np.arange(len(s)) >= free)),
        exact=False,
        **promises,
    )


def both(name, regularizer, order, **promises):
    """A row of the sum of two others, the maps in that order."""
    first = singular_values("", NuclearNorm(0.7, split=regularizer.split))
    strength = regularizer.group_strength
    second = lasso("", None, units(regularizer.axis, regularizer.weighted))

    def oracle(w, axes, threshold):
        steps = {"singular_values": (first, threshold), "groups": (second, threshold * ratio)}
        for step in order:
            case, amount = steps[step]
            w = case.oracle(w, axes, amount)
        return w

    ratio = strength / 0.7
    return RegularizerCase(
        name,
        regularizer,
        value=lambda w, axes: first.value(w, axes) + ratio * second.value(w, axes),
        oracle=oracle,
        gradient=lambda w, axes: first.gradient(w, axes) + ratio * second.gradient(w, axes),
        in_proportion=("group_strength",),
        gap=0.015,
        exact=False,
        **promises,
    )


def tile_groups(size):
    return lambda w, axes: with_weights(tiles(w.shape, axes, size))


REGULARIZERS = (
    lasso("lasso", L1(0.7), single_entries),
    lasso("group lasso, inputs", GroupLasso(0.7), units("inputs")),
    lasso("group lasso, outputs", GroupLasso(0.7, axis="outputs"), units("outputs")),
    lasso(
        "group lasso, unweighted",
        GroupLasso(0.7, weighted=False),
        units("inputs", weighted=False),
        variant=True,
    ),
    lasso("group lasso, tiles", GroupLasso(0.7, block=(3, 4)), tile_groups((3, 4)), variant=True),
    lasso("sparse group lasso", SparseGroupLasso(0.7, 0.2), units("inputs"), l1=0.2),
    lasso(
        "sparse group lasso, tiles",
        SparseGroupLasso(0.7, 0.2, block=(3, 2)),
        tile_groups((3, 2)),
        l1=0.2,
        variant=True,
    ),
    lasso("partial group lasso", PartialGroupLasso(0.7), units("inputs", fraction=0.5)),
    lasso(
        "partial group lasso, outputs",
        PartialGroupLasso(0.7, fraction=0.3, axis="outputs"),
        units("outputs", fraction=0.3),
        variant=True,
    ),
    lasso(
        "partial group lasso, largest free",
        PartialGroupLasso(0.7, fraction=0.5, mode="largest"),
        smallest_units("inputs", 0.5),
        pair=GroupPruning(0.5),
        convex=False,
    ),
    lasso(
        "partial group lasso, largest outputs free",
        PartialGroupLasso(0.7, fraction=0.7, axis="outputs", mode="largest"),
        smallest_units("outputs", 0.7),
        pair=GroupPruning(0.7, axis="outputs"),
        convex=False,
        variant=True,
    ),
    lasso(
        "partial group lasso, block",
        PartialGroupLasso(0.7, fraction=0.75, mode="block", next_fraction=0.4),
        submatrix(0.75, 0.4),
        variant=True,
    ),
    lasso(
        "partial sparse group lasso, block",
        PartialGroupLasso(0.7, fraction=0.6, mode="block", next_fraction=0.0, l1_strength=0.3),
        submatrix(0.6, 0.0),
        l1=0.3,
        variant=True,
    ),
    lasso(
        "partial sparse group lasso",
        PartialGroupLasso(0.7, fraction=0.6, l1_strength=0.3),
        units("inputs", fraction=0.6),
        l1=0.3,
        variant=True,
    ),
    singular_values("nuclear norm", NuclearNorm(0.7)),
    singular_values("nuclear norm, spatial", NuclearNorm(0.7, split="spatial"), variant=True),
    singular_values(
        "truncated nuclear norm",
        TruncatedNuclearNorm(0.7, target_rank=1),
        free=1,
        pair=LowRank(rank=1),
        convex=False,
        in_loss=False,
    ),
    both(
        "nuclear norm, then group lasso",
        LowRankGroupSparsity(0.7, 0.2),
        ("singular_values", "groups"),
    ),
    both(
        "group lasso, then nuclear norm",
        LowRankGroupSparsity(0.7, 0.2, "spatial", "outputs", weighted=False, order="groups_first"),
        ("groups", "singular_values"),
        variant=True,
    ),
)
