"""Empirical variational Bayesian matrix factorisation (EVBMF): its rank, from singular values."""

import math

import numpy as np

_NOISE_FLOOR = float(np.finfo(np.float32).eps) ** 2  # of the variance of what is stored in float32
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_HALVINGS = 40  # of an interval, each by the golden section: to 4e-9 of it
_LARGEST_BLOCK = 1 << 21  # entries that are computed with at a time


def variational_ranks(values, rows, columns):
    """Returns `(ranks (stack,), noise variances (stack,))` of a stack of observed matrices.

    A matrix V (L x M with L <= M; a taller one is transposed) is taken to be B A^T plus Gaussian
    noise of unknown variance s per entry, with Gaussian priors on the columns of A and B whose
    variances are unknown as well. The global minimum of the variational free energy over all of
    these but s is known in closed form (Nakajima, Sugiyama, Babacan & Tomioka, 2013, "Global
    analytic solution of fully-observed variational Bayesian matrix factorization", JMLR 14): of
    the singular values g of V, those with

        x = g^2 / (M s) > (1 + u) (1 + a / u),   a = L / M,

    belong to the factors and the others to the noise, where u is the zero of

        log(1 + u) + a log(1 + u / a) - u.

    What is left is a function of s alone, here divided by M and without its constant:

        L log s + sum of x over the noise
                + sum of 1 + a + a / t + log(1 + t) + a log(1 + t / a) over the factors,

    with x = (1 + t)(1 + a / t). Its least value is searched between the bounds that the theory
    gives, by golden sections of every interval in which the same singular values stay above the
    threshold: where one crosses it, the function has a peak. Fewer than L M / (L + M) singular
    values can belong to the factors, so these are always smaller than the matrix. u is solved for;
    2.5129 sqrt(a), by which it is often replaced, is exact for a = 1 only.

    Noise below the rounding of float32 is not told apart from it. A matrix of zeros has rank 0 and
    no noise.

    Args:
        values: Array (stack, min(rows, columns)): singular values, not increasing.
        rows: Integer of at least 1.
        columns: Integer of at least 1.

    Example:
    >>> noise = np.random.default_rng(0).normal(size=(40, 60))
    >>> signal = 30.0 * np.outer(np.eye(40)[0], np.eye(60)[0])
    >>> values = np.linalg.svd(np.stack([noise, noise + signal]), compute_uv=False)
    >>> ranks, variances = variational_ranks(values, 40, 60)
    >>> ranks
    array([0, 1])
    >>> bool(np.all(np.abs(variances - 1.0) < 0.1))
    True
    """
    length, width = sorted((rows, columns))
    values = np.asarray(values, np.float64)[:, :length]
    largest = values.max(axis=1, initial=0.0)
    unit = np.where(largest > 0, largest, 1.0)
    energies = np.square(values / unit[:, None]) / width
    # One more would not be fewer than L M / (L + M).
    most = -(-length * width // (length + width)) - 1
    size = max(1, _LARGEST_BLOCK // max(1, most * (most + 1)))
    found = [
        _solve(energies[begin : begin + size], most, length / width)
        for begin in range(0, len(energies), size)
    ]
    ranks, variances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    filled = largest > 0
    return np.where(filled, ranks, 0), np.where(filled, variances * np.square(unit), 0.0)


def threshold(ratio):
    """Returns u for a = L / M in (0, 1], by bisection."""
    low, high = math.sqrt(ratio), 8.0 * math.sqrt(ratio)  # positive at `low`, negative at `high`
    for _ in range(60):
        middle = 0.5 * (low + high)
        if math.log1p(middle) + ratio * math.log1p(middle / ratio) > middle:
            low = middle
        else:
            high = middle
    return low


def _solve(energies, most, ratio):
    """Returns the ranks and noise variances for squared singular values over M."""
    u = threshold(ratio)
    edge = (1.0 + u) * (1.0 + ratio / u)
    mean = energies.mean(axis=1, keepdims=True)
    high = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    low = np.maximum(energies[:, most:].mean(axis=1), energies[:, most] / edge)[:, None]
    low = np.log(np.maximum(low, _NOISE_FLOOR * np.exp(high)))
    ends = np.log(np.maximum(energies[:, :most] / edge, np.finfo(np.float64).tiny))
    ends = np.concatenate([high, np.clip(ends, low, high), low], axis=1)  # not increasing

    def cost(logs):
        return _free_energy(energies, most, ratio, edge, logs)

    logs = _least_within(cost, ends[:, 1:], ends[:, :-1])
    best = np.argmin(cost(logs), axis=1, keepdims=True)
    variances = np.exp(np.take_along_axis(logs, best, axis=1))
    return np.sum(energies[:, :most] > edge * variances, axis=1), variances[:, 0]


def _free_energy(energies, most, ratio, edge, logs):
    """The function of s for logarithms of s (stack, number)."""
    variances = np.exp(logs)[:, :, None]
    x = energies[:, None, :most] / variances
    above = x > edge
    excess = np.where(above, x, edge) - (1.0 + ratio)
    t = 0.5 * (excess + np.sqrt(np.square(excess) - 4.0 * ratio))
    of_factor = 1.0 + ratio + ratio / t + np.log1p(t) + ratio * np.log1p(t / ratio)
    rest = energies[:, most:].sum(axis=1, keepdims=True) / variances[:, :, 0]
    total = energies.shape[1] * logs + rest
    return total + np.where(above, of_factor, x).sum(axis=2)


def _least_within(function, low, high):
    """Returns where a function of arrays is least within intervals, by golden sections."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_HALVINGS):
        down = at_left <= at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        kept = np.where(down, left, right)
        at_kept = np.where(down, at_left, at_right)
        new = np.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = function(new)
        left, right = np.where(down, new, kept), np.where(down, kept, new)
        at_left, at_right = np.where(down, at_new, at_kept), np.where(down, at_kept, at_new)
    return 0.5 * (low + high)
