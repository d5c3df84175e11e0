"""The rank by variational Bayes: planted ranks, noise, and the free energy from its definition."""

import numpy as np
import pytest

from keras_compaware._math import vbmf
from keras_compaware._math.vbmf import threshold, variational_ranks
from tests.math.references import variational_solution


def planted(rows, columns, rank, noise, seed=0):
    random = np.random.default_rng(seed)
    signal = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    return signal + noise * random.normal(size=(rows, columns))


def solve(*matrices):
    values = np.linalg.svd(np.stack(matrices), compute_uv=False)
    return variational_ranks(values, *matrices[0].shape)


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40), (20, 400)])
@pytest.mark.parametrize(("rank", "noise"), [(1, 0.5), (5, 1.0), (8, 0.01)])
def test_a_planted_rank_and_its_noise_are_found(shape, rank, noise):
    ranks, variances = solve(*(planted(*shape, rank, noise, seed) for seed in range(3)))
    assert ranks.tolist() == [rank] * 3
    np.testing.assert_allclose(variances, noise**2, rtol=0.1)


@pytest.mark.parametrize("shape", [(60, 60), (30, 200), (200, 30)])
def test_noise_has_no_rank(shape):
    random = np.random.default_rng(0)
    ranks, variances = solve(*(3.0 * random.normal(size=shape) for _ in range(20)))
    assert not ranks.any()
    np.testing.assert_allclose(variances, 9.0, rtol=0.1)


def test_a_signal_below_the_noise_is_not_found():
    """At the threshold x = (1 + u)(1 + a / u); below it a component drowns."""
    random = np.random.default_rng(1)
    left, right = (np.linalg.qr(random.normal(size=(100, 1)))[0] for _ in range(2))
    noise = random.normal(size=(100, 100))
    for size, rank in ((15.0, 0), (30.0, 1)):  # noise alone reaches 20
        assert solve(noise + size * left @ right.T)[0].tolist() == [rank]


@pytest.mark.parametrize("shape", [(6, 6), (12, 7), (3, 40), (30, 30)])
def test_it_is_the_least_free_energy_of_a_fine_grid(shape):
    for seed in range(3):
        matrix = planted(*shape, 2, 0.5, seed)
        (rank,), (variance,) = solve(matrix)
        expected_rank, expected = variational_solution(matrix)
        assert rank == expected_rank
        assert variance == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("shape", [(20, 20), (10, 40), (3, 50)])
def test_the_free_energy_is_that_of_the_best_posterior(shape):
    """Minimised over means and variances of the posterior and the priors' variances."""
    optimize = pytest.importorskip("scipy.optimize")
    length, width = shape
    a = length / width

    def gain(x):
        """What a component lowers the free energy by, at noise of variance 1, over the width."""
        value = np.sqrt(x * width)

        def energy(arguments):
            mean_a, mean_b, log_a, log_b = arguments
            var_a, var_b = np.exp(log_a), np.exp(log_b)
            prior_a, prior_b = mean_a**2 / width + var_a, mean_b**2 / length + var_b  # the best
            terms = width * np.log(prior_a / var_a) + length * np.log(prior_b / var_b)
            products = (mean_a**2 + width * var_a) * (mean_b**2 + length * var_b)
            return terms - 2 * value * mean_a * mean_b + products

        found = [0.0]  # without the component
        for scale in (0.3, 1.0, 3.0):
            start = scale * np.sqrt(value), np.sqrt(value) / scale, -2.0, -2.0
            limits = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-9, "fatol": 1e-11}
            result = optimize.minimize(energy, start, method="Nelder-Mead", options=limits)
            found.append(result.fun)
        return min(found) / width

    edge = (1 + threshold(a)) * (1 + a / threshold(a))
    for x in edge * np.array([0.9, 0.99, 1.01, 1.5, 5.0]):
        # A matrix with this one singular value, the others zero, in units of its noise.
        energies = np.array([[x, *np.zeros(length - 1)]])
        most = -(-length * width // (length + width)) - 1
        found = vbmf._free_energy(energies, most, a, edge, np.zeros((1, 1)))
        assert found[0, 0] - x == pytest.approx(gain(x), abs=1e-9), x
        assert (gain(x) < -1e-9) == (x > edge)


def test_the_threshold():
    assert threshold(1.0) == pytest.approx(2.5129, abs=1e-4)
    for a in (1.0, 0.5, 0.1, 1e-3, 1e-6):
        u = threshold(a)
        assert np.log1p(u) + a * np.log1p(u / a) == pytest.approx(u, rel=1e-12)


def test_transposed_scaled_or_in_a_stack_it_is_the_same():
    matrices = [planted(30, 50, rank, 0.3, rank) for rank in (1, 2, 5, 9)]
    ranks, variances = solve(*matrices)
    assert ranks.tolist() == [1, 2, 5, 9]
    for matrix, rank, variance in zip(matrices, ranks, variances, strict=True):
        for other, unit in ((matrix, 1.0), (matrix.T, 1.0), (1e30 * matrix, 1e30)):
            (one,), (of_one,) = solve(other)
            assert one == rank
            assert of_one / unit**2 == pytest.approx(variance, rel=1e-6)


def test_large_stacks_are_taken_in_blocks(monkeypatch):
    matrices = [planted(8, 9, 1, 0.1, seed) for seed in range(7)]
    expected = solve(*matrices)
    monkeypatch.setattr(vbmf, "_LARGEST_BLOCK", 40)
    for found, before in zip(solve(*matrices), expected, strict=True):
        np.testing.assert_array_equal(found, before)


def test_matrices_without_noise_or_without_anything():
    exact = planted(40, 30, 4, 0.0).astype("float32")
    ranks, variances = solve(exact, np.zeros_like(exact))
    assert ranks.tolist() == [4, 0]
    assert variances[0] < 1e-10 * np.mean(exact**2)
    assert variances[1] == 0
    for shape in ((1, 7), (7, 1), (1, 1)):  # one singular value cannot stand out
        assert solve(np.ones(shape))[0].tolist() == [0]


def test_fewer_components_than_would_save_nothing():
    """The rank is below L M / (L + M), where two factors are as large as the matrix."""
    random = np.random.default_rng(0)
    for shape in ((10, 10), (6, 18), (25, 9)):
        values = np.sort(random.uniform(0, 1, size=(50, min(shape))) ** 6, axis=1)[:, ::-1]
        ranks, _ = variational_ranks(values, *shape)
        assert ranks.max() * sum(shape) < shape[0] * shape[1]
        assert ranks.max() > 1
