"""Least-squares fits of sums of scaled signs, w ~ sum_i alpha_i * b_i with b_i in {-1, +1}.

The signs of one entry are the bits of an integer, its code: bit i is set where b_i = +1. As in
`codebook`, the fits act on (rows, number) tensors, each row by itself, and `mask` tells which
entries are stored.
"""

import numpy as np
from keras import ops

from keras_compaware._math.codebook import gathered, mean, nearest, normalised

# A plane of signs is left out if its share that is no sum of earlier planes is below this.
INDEPENDENT = 1e-6
# Numbers that differ by less than this share of the largest magnitude are one and the same.
SAME = 1e-5


def fit_binary(values, bits, fit, rounds=0, mask=None, start=None):
    """Fits the scales and the signs.

    Args:
        values: Float32 tensor (rows, number).
        bits: Number of planes of signs.
        fit: "greedy", "refined" or "alternating".
        rounds: Number of rounds of the alternating fit.
        mask: Which entries are stored, or None.
        start: For the alternating fit: scales (rows, bits) to start from, or None.

    Returns:
        `(codes, alphas)`: int32 tensor (rows, number), and scales (rows, bits) of at least 0.
    """
    scaled, unit = normalised(values, mask)
    if bits == 1:  # the sign and the mean magnitude are the optimum
        fit, start = "greedy", None
    if start is not None:
        state = _nearest_sums(scaled, start / unit, mask)
    else:
        state = _plane_by_plane(scaled, bits, mask, refit=fit != "greedy")
        if bits > 2 and fit != "greedy":  # of up to two bits, these signs are the right ones
            state = _better(state, _recovered(scaled, bits, mask))
    if fit == "alternating":
        state = _alternated(scaled, state, rounds, mask)
    codes, alphas, _ = state
    # A plane with a negative scale is its opposite with a positive one.
    flips = ops.sum(ops.cast(alphas < 0, "int32") * _powers(bits), axis=-1, keepdims=True)
    return ops.bitwise_xor(codes, flips), ops.abs(alphas) * unit


def plane(codes, number):
    """Returns which signs of one plane are +1, boolean."""
    return ops.bitwise_and(ops.right_shift(codes, number), 1) > 0


def _powers(bits):
    return ops.convert_to_tensor(2 ** np.arange(bits)[None, :], "int32")


def _signs(codes, bits):
    """Returns the signs (rows, bits, number) of codes (rows, number)."""
    is_set = ops.bitwise_and(codes[:, None, :], _powers(bits)[:, :, None]) > 0
    return 2.0 * ops.cast(is_set, "float32") - 1.0


def _combined(signs, alphas):
    return ops.sum(alphas[:, :, None] * signs, axis=1)


def _plane_by_plane(values, bits, mask, refit):
    """Signs of what the earlier planes leave, with their mean magnitude as the scale.

    With `refit`, all scales by least squares after every new plane.
    """
    zeros = ops.zeros_like(values)

    def add(number, state):
        signs, alphas, rest = state
        new = ops.reshape(ops.arange(bits) == number, (1, bits))
        sign = ops.where(rest >= 0, 1.0, -1.0)
        signs = ops.where(new[:, :, None], sign[:, None, :], signs)
        if refit:
            alphas = alphas + _step(signs, rest, mask)
        else:
            alphas = ops.where(new, mean(ops.abs(rest), mask), alphas)
        return signs, alphas, values - _combined(signs, alphas)

    signs = ops.stack([zeros] * bits, axis=1)
    signs, alphas, rest = ops.fori_loop(0, bits, add, (signs, signs[:, :, 0], values))
    codes = ops.sum(ops.cast(signs > 0, "int32") * _powers(bits)[:, :, None], axis=1)
    return codes, alphas, mean(ops.square(rest), mask)


def _recovered(values, bits, mask):
    """The fit of values that are such sums already; of others, with an infinite error.

    If all scales are positive, their sum is the largest magnitude, and turning the signs of some
    lowers it by twice their sum. So the smallest lowering that is not a sum of scales found
    before is the next scale.
    """
    magnitudes = ops.abs(values)
    if mask is not None:
        magnitudes = ops.where(mask, magnitudes, 0.0)
    largest = ops.max(magnitudes, axis=-1, keepdims=True)
    lowered = (largest - magnitudes) / 2
    if mask is not None:
        lowered = ops.where(mask, lowered, 0.0)
    subsets = (_signs(_every_code(bits - 1), bits - 1) + 1.0) / 2

    def find(number, alphas):
        sums = ops.sort(_combined(subsets, alphas), axis=-1)
        _, distance = nearest(sums, lowered)
        unknown = ops.where(ops.abs(distance) > SAME * largest, lowered, largest)
        smallest = ops.min(unknown, axis=-1, keepdims=True)
        found = ops.where(smallest < largest, smallest, 0.0)
        return ops.where(ops.arange(bits - 1)[None, :] == number, found, alphas)

    smaller = ops.concatenate([ops.zeros_like(largest)] * (bits - 1), axis=-1)
    smaller = ops.fori_loop(0, bits - 1, find, smaller)
    last = largest - ops.sum(smaller, axis=-1, keepdims=True)
    alphas = ops.concatenate([smaller, last], axis=-1)
    codes, alphas, error = _refitted(values, *_nearest_sums(values, alphas, mask)[:2], mask)
    exact = error <= ops.square(SAME * largest)
    return codes, alphas, ops.where(exact, error, float("inf"))


def _alternated(values, state, rounds, mask):
    """Scales by least squares and nearest codes in turn, while that lowers the error."""

    def refit(_, state):
        codes, alphas, _ = state
        return _better(state, _refitted(values, codes, alphas, mask))

    return ops.fori_loop(0, rounds, refit, state)


def _refitted(values, codes, alphas, mask):
    signs = _signs(codes, alphas.shape[-1])
    rest = values - _combined(signs, alphas)
    return _nearest_sums(values, alphas + _step(signs, rest, mask), mask)


def _nearest_sums(values, alphas, mask):
    """Returns `(codes, alphas, error)` with the code of the nearest of the 2^bits sums."""
    bits = alphas.shape[-1]
    sums = _combined(_signs(_every_code(bits), bits), alphas)
    order = ops.cast(ops.argsort(sums, axis=-1), "int32")
    places, rest = nearest(gathered(sums, order), values)
    return gathered(order, places), alphas, mean(ops.square(rest), mask)


def _every_code(bits):
    return ops.convert_to_tensor(np.arange(2**bits)[None, :], "int32")


def _better(state, tried):
    better = tried[-1] < state[-1]
    return tuple(ops.where(better, new, old) for new, old in zip(tried, state, strict=True))


def _step(signs, rest, mask):
    """Returns the change of the scales (rows, bits) that explains most of the rest.

    Solves (B^T B) x = B^T rest by elimination, without a library's decomposition, so that it
    runs in every compiled training step. A plane of zeros or one that is a sum of earlier ones
    gets nothing: a singular B^T B does no harm.

    Args:
        signs: Planes (rows, bits, number) of -1 and +1; or 0 for planes that are not there yet.
        rest: Values minus what the present scales make of the planes, (rows, number).
        mask: Which entries are stored, or None.
    """
    bits = signs.shape[1]
    stored = signs if mask is None else signs * ops.cast(mask, "float32")[:, None, :]
    number = ops.max(ops.sum(ops.abs(stored), axis=-1, keepdims=True), axis=1, keepdims=True)
    number = ops.maximum(number, 1.0)
    gram = ops.matmul(stored, ops.swapaxes(signs, 1, 2)) / number
    side = ops.sum(stored * rest[:, None, :], axis=-1, keepdims=True) / number

    def eliminate(place, system):
        here = ops.arange(bits) == place
        row = ops.sum(ops.where(here[None, :, None], system, 0.0), axis=1, keepdims=True)
        column = ops.sum(ops.where(here[None, None, :], system[:, :, :bits], 0.0), -1, True)
        pivot = ops.sum(ops.where(here[None, None, :], row[:, :, :bits], 0.0), -1, True)
        independent = pivot > INDEPENDENT
        row = ops.where(independent, row / ops.where(independent, pivot, 1.0), 0.0)
        return ops.where(here[None, :, None], row, system - column * row)

    system = ops.concatenate([gram, side], axis=-1)
    return ops.fori_loop(0, bits, eliminate, system)[:, :, bits]
