"""What is computed in another way, slowly, to compare with."""

import numpy as np


def variational_solution(matrix):
    """Returns `(rank, noise variance)` of empirical variational Bayes, by search on a fine grid.

    The free energy in the form of Nakajima et al. (2013): psi(x) = x - log x for every singular
    value, plus log(t + 1) + a log(t / a + 1) - t for those above the threshold.
    """
    length, width = sorted(matrix.shape)
    a = length / width
    values = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    candidates = np.linspace(0.5, 8.0, 200_001)[1:] * np.sqrt(a)
    zero = np.log(candidates + 1) + a * np.log(candidates / a + 1) - candidates
    u = candidates[np.argmin(np.abs(zero))]
    edge = (1 + u) * (1 + a / u)
    size = np.sum(values**2) / matrix.size
    variances = size * np.geomspace(1e-9, 2.0, 4_001)
    x = np.maximum(values**2 / (width * variances[:, None]), 1e-300)
    above = x > edge
    excess = np.where(above, x, edge) - (1 + a)
    t = 0.5 * (excess + np.sqrt(excess**2 - 4 * a))
    energy = x - np.log(x) + above * (np.log(t + 1) + a * np.log(t / a + 1) - t)
    best = np.argmin(energy.sum(axis=1))
    return int(above[best].sum()), variances[best]
