"""How ranks are chosen from singular values, and what limits them."""

import math

import numpy as np
from keras import ops

from keras_compaware._math.svd import NOT_FINITE
from keras_compaware._math.vbmf import variational_ranks
from keras_compaware.base import check_integer, check_number

VBMF = "vbmf"


def check_limits(owner, by_hand, argument, min_rank, max_ratio, round_to):
    """Raises unless the limits of chosen ranks are in range and have something to act on.

    Args:
        owner: Name of the compressor.
        by_hand: Whether the rank is given; else it is chosen.
        argument: How the rank is given or chosen, as it stands in messages: "ratio".
        min_rank: Least rank.
        max_ratio: Largest share of the parameters, or None.
        round_to: What ranks are multiples of.
    """
    check_integer(owner, "min_rank", min_rank, 1)
    check_integer(owner, "round_to", round_to, 1)
    check_number(owner, "max_ratio", max_ratio, 0.0, 1.0, low_open=True, optional=True)
    if by_hand and (min_rank > 1 or max_ratio is not None):
        raise ValueError(
            f"{owner}: `min_rank` and `max_ratio` limit a rank that is chosen, and `{argument}` is "
            f"given. Leave them out. Received: min_rank={min_rank}, max_ratio={max_ratio}."
        )
    if argument == "ratio" and max_ratio is not None:
        raise ValueError(
            f"{owner}: `ratio` is itself the largest share of the parameters; leave out "
            f"`max_ratio`. Received: max_ratio={max_ratio}."
        )


def rounded_down(rank, multiple):
    """Returns the largest multiple that is not above a rank; one that is smaller stays.

    Takes integers, arrays and integer tensors.
    """
    if isinstance(rank, int):
        return rank - rank % multiple if rank >= multiple else rank
    where = np.where if isinstance(rank, (np.generic, np.ndarray)) else ops.where
    return where(rank >= multiple, rank // multiple * multiple, rank)


def rounded_up(rank, multiple):
    """Returns the least multiple that is not below a rank."""
    return -(-rank // multiple) * multiple


def rank_by_energy(values, energy, of="squares"):
    """Returns the smallest rank that keeps a fraction of the energy, an integer tensor.

    Args:
        values: Singular values (stack, number) of all matrices, whose energies are added up.
        energy: The fraction, in (0, 1].
        of: "squares" or "sums" of singular values.
    """
    largest = ops.max(values)
    values = values / ops.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    parts = ops.square(values) if of == "squares" else values
    energies = ops.cumsum(ops.sum(parts, axis=0))
    # Rank r is needed while the first r - 1 singular values do not suffice.
    before = ops.concatenate([ops.zeros_like(energies[:1]), energies[:-1]], axis=0)
    missing = before < (energy - 1e-7) * energies[-1]
    return ops.maximum(ops.sum(ops.cast(missing, "int32")), 1)


def known(owner, tensor):
    """Returns a tensor as an array.

    Raises:
        ValueError: If its values are not known, since a function is being compiled.
    """
    try:
        return ops.convert_to_numpy(tensor)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{owner} takes the rank from the values of the kernel, which are not known while a "
            "function is being compiled. Settle it before: `compressor.settle(kernel, axes)`."
        ) from error


def rank_by_vbmf(owner, matrix, values):
    """Returns the largest of the ranks that EVBMF finds in a stack of matrices, at least 1.

    Rows and columns of zeros, such as removed channels, are no part of what is observed.

    Args:
        owner: Name of the compressor.
        matrix: Tensor (stack, rows, columns).
        values: Its singular values.

    Raises:
        ValueError: If the values are not known, since a function is being compiled.
        FloatingPointError: If they are not finite.
    """
    filled = ops.not_equal(matrix, 0)
    sizes = [ops.sum(ops.cast(ops.any(filled, axis=a), "int32"), axis=-1) for a in (2, 1)]
    sizes, values = known(owner, ops.stack(sizes, axis=1)), known(owner, values)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"{owner}: {NOT_FINITE}")
    found = 1
    for rows, columns in np.unique(sizes[sizes.min(axis=1) > 0], axis=0).tolist():
        own = values[np.all(sizes == (rows, columns), axis=1), : min(rows, columns)]
        found = max(found, int(variational_ranks(own, rows, columns)[0].max()))
    return found


def limited(rank, full, cap, min_rank, round_to):
    """Returns a rank rounded up to a multiple, within its limits; an integer or a tensor.

    A rank for which the full one is needed is not rounded, nor a limit below one multiple.

    Args:
        rank: Integer or integer tensor.
        full: Integer: the largest rank.
        cap: Integer: the largest that may be chosen.
        min_rank: Integer: the least; where it is above `cap`, it counts.
        round_to: Integer.
    """
    least, most = min(min_rank, full), rounded_down(cap, round_to) if cap < full else full
    rank = rounded_up(rank, round_to)
    if isinstance(rank, int):
        return max(min(rank, most), least)
    return ops.maximum(ops.minimum(rank, most), least)


def largest_rank(ratio, rows, columns):
    """Returns the largest rank whose two factors have at most that share of the parameters."""
    return math.floor(ratio * rows * columns / (rows + columns) + 1e-9)
