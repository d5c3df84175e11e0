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
    BinaryCodeQuantization,
    Chain,
    GroupLasso,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    NMPruning,
    NuclearNorm,
    PartialGroupLasso,
    TernaryQuantization,
    Tucker2,
    UniformQuantization,
    WeightClustering,
)
from keras_compaware.base import Compressor, ProximalRegularizer
from tests.laws.kernels_under_test import matrices, unit_groups


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
        free: Function `(shape, axes) -> mask` of the weights that are not penalised.
        exact: Whether a step of size zero leaves every bit alone.
    """

    name: str
    regularizer: ProximalRegularizer
    value: Callable
    oracle: Callable
    gradient: Callable
    free: Callable = lambda shape, axes: np.zeros(shape, bool)
    exact: bool = True

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


def rank_for_energy(energy):
    """The smallest rank that keeps that fraction of the squared entries of all linear maps."""

    def rank_of(found):
        total = sum(np.sum(matrix**2) for matrix in found)
        for rank in range(1, min(found[0].shape) + 1):
            kept = sum(
                np.sum(np.linalg.svd(matrix, compute_uv=False)[:rank] ** 2) for matrix in found
            )
            if kept >= energy * total:
                break
        return rank

    return rank_of


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


def tucker_by_alternation(ranks_of, sweeps=2):
    """Leading singular vectors of the unfoldings, then of the kernel seen through the others."""

    def leading(tensor, axis, rank):
        unfolding = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        return np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]

    def oracle(w, axes):
        result = w.astype("float64")
        window, inputs, outputs = tensor_sizes(w.shape, axes)
        first, second = ranks_of(window, inputs, outputs)
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


def group_value(role, weighted=True, penalised=None):
    def value(w, axes):
        total = 0.0
        for mask in penalised_groups(w.shape, axes, role, penalised):
            size = np.sum(mask)
            total += (math.sqrt(size) if weighted else 1.0) * np.linalg.norm(w[mask])
        return 0.7 * total

    return value


def group_prox(role, weighted=True, penalised=None):
    def prox(w, axes, threshold):
        result = w.astype("float64")
        for mask in penalised_groups(w.shape, axes, role, penalised):
            norm = np.linalg.norm(w[mask].astype("float64"))
            c = math.sqrt(np.sum(mask)) if weighted else 1.0
            result[mask] *= max(0.0, 1 - threshold * c / norm) if norm > 0 else 0.0
        return result

    return prox


def group_gradient(role, weighted=True, penalised=None):
    def gradient(w, axes):
        result = np.zeros(w.shape)
        for mask in penalised_groups(w.shape, axes, role, penalised):
            c = math.sqrt(np.sum(mask)) if weighted else 1.0
            result[mask] = 0.7 * c * w[mask] / np.linalg.norm(w[mask])
        return result

    return gradient


def penalised_groups(shape, axes, role, fraction):
    """The first fraction of the units, in the order in which the kernel holds them."""
    masks = unit_groups(shape, axes, role)
    if fraction is None:
        return masks
    masks = in_order(masks)
    return masks[: max(1, round(fraction * len(masks)))]


def free_part(role, fraction):
    def free(shape, axes):
        return ~np.any(penalised_groups(shape, axes, role, fraction), axis=0)

    return free


def on_singular_values(split, of_value=None, of_matrix=None):
    def result(w, axes, threshold=None):
        out = w.astype("float64")
        total = 0.0
        for matrix, write in matrices(out, axes, split):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            total += 0.7 * np.sum(values)
            if of_matrix:
                write(left * of_matrix(values, threshold) @ right)
        return out if of_matrix else total

    return result


def group_case(name, cls, role, weighted=True, fraction=None):
    extra = {} if fraction is None else {"fraction": fraction}
    return RegularizerCase(
        name,
        cls(0.7, axis=role, weighted=weighted, **extra),
        value=group_value(role, weighted, fraction),
        oracle=group_prox(role, weighted, fraction),
        gradient=group_gradient(role, weighted, fraction),
        free=free_part(role, fraction) if fraction else RegularizerCase.free,
    )


def nuclear_case(name, split):
    return RegularizerCase(
        name,
        NuclearNorm(0.7, split=split),
        value=on_singular_values(split),
        oracle=on_singular_values(split, of_matrix=lambda s, t: np.maximum(s - t, 0)),
        gradient=on_singular_values(split, of_matrix=lambda s, t: 0.7 * np.ones_like(s)),
        exact=False,
    )


REGULARIZERS = (
    group_case("group lasso, inputs", GroupLasso, "inputs"),
    group_case("group lasso, outputs", GroupLasso, "outputs"),
    group_case("group lasso, unweighted", GroupLasso, "inputs", weighted=False),
    group_case("partial group lasso", PartialGroupLasso, "inputs", fraction=0.5),
    group_case("partial group lasso, outputs", PartialGroupLasso, "outputs", fraction=0.3),
    nuclear_case("nuclear norm", "channel"),
    nuclear_case("nuclear norm, spatial", "spatial"),
)
