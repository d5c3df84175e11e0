"""The table: a new compressor or regularizer is tested by one row.

A row states what the method promises; the batteries of this folder try it on every kernel of
`kernels_under_test` and on plain arrays, on whatever backend Keras runs.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from keras_compaware import (
    Chain,
    GroupLasso,
    LowRank,
    MagnitudePruning,
    NuclearNorm,
    PartialGroupLasso,
    UniformQuantization,
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

    @property
    def id(self):
        return self.name

    def fits(self, shape, axes):
        """Whether the compressor has a meaning on kernels of this shape."""
        split = getattr(self.compressor, "split", "channel")
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
    masks.sort(key=lambda mask: int(np.flatnonzero(mask)[0]))
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
