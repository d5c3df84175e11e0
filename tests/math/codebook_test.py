"""The least-squares fit of a uniform grid."""

import numpy as np
import pytest
from keras import ops

from keras_compaware._math.backend import compiled
from keras_compaware._math.codebook import fit_uniform, starting_scales

FITS = {levels: compiled(lambda rows, n=levels: fit_uniform(rows, n)) for levels in (1, 3, 7, 127)}


def fit(rows, levels):
    codes, scale = FITS[levels](ops.convert_to_tensor(np.asarray(rows, "float32")))
    return np.asarray(ops.convert_to_numpy(codes)), np.asarray(ops.convert_to_numpy(scale))


def best_ternary(row):
    """The optimum over all supports: the k largest magnitudes with their mean as the scale."""
    magnitudes = np.sort(np.abs(row))[::-1]
    k = np.arange(1, len(row) + 1)
    return np.sum(row**2) - np.max(np.cumsum(magnitudes) ** 2 / k)


def test_by_hand():
    codes, scale = fit([[-1.0, 0.1, 0.9, 1.1]], 1)
    np.testing.assert_array_equal(codes, [[-1, 0, 1, 1]])
    np.testing.assert_allclose(scale, [[1.0]], rtol=1e-6)  # (1 + .9 + 1.1) / 3


def test_rows_are_fitted_by_themselves():
    rows = np.random.default_rng(0).normal(size=(4, 100)) * [[1e-20], [1], [1e20], [0]]
    codes, scale = fit(rows, 3)
    for number in range(3):
        alone = fit(np.repeat(rows[number : number + 1], 4, axis=0), 3)
        np.testing.assert_array_equal(codes[number], alone[0][0])
        np.testing.assert_allclose(scale[number], alone[1][0], rtol=1e-6)
    np.testing.assert_array_equal(codes[3], 0)
    np.testing.assert_array_equal(scale[3], 1)
    assert scale.shape == (4, 1)
    assert np.all(scale > 0)


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform", "heavy"])
def test_ternary_fits_are_near_the_global_optimum(distribution):
    random = np.random.default_rng(0)
    rows = {
        "normal": random.normal(size=(5, 500)),
        "laplace": random.laplace(size=(5, 500)),
        "uniform": random.uniform(-1, 1, size=(5, 500)),
        "heavy": random.standard_t(3, size=(5, 500)),
    }[distribution]
    codes, scale = fit(rows, 1)
    for row, error in zip(rows, np.sum((rows - scale * codes) ** 2, axis=1), strict=True):
        best = best_ternary(row)
        assert best * (1 - 1e-5) <= error <= 1.03 * best


@pytest.mark.parametrize("levels", [3, 7, 127])
def test_the_fit_is_a_local_minimum(levels):
    """Neither another scale for these codes nor other codes for this scale are better."""
    rows = np.random.default_rng(1).normal(size=(1, 400))
    codes, scale = fit(rows, levels)
    assert np.abs(codes).max() <= levels
    nearest = np.clip(np.round(rows / scale), -levels, levels)
    assert np.mean(nearest != codes) < 0.01  # ties between float32 and float64
    best_scale = np.sum(rows * codes) / np.sum(codes**2)
    error = np.sum((rows - scale * codes) ** 2)
    assert error <= 1.01 * np.sum((rows - best_scale * codes) ** 2)


@pytest.mark.parametrize("levels", [1, 3, 7, 127])
def test_values_on_a_grid_are_found_exactly(levels):
    random = np.random.default_rng(2)
    codes = random.integers(-levels, levels + 1, size=(3, 200))
    codes[:, 0] = levels
    found, scale = fit(codes * 0.3, levels)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(scale, 0.3, rtol=1e-6)


def test_starting_scales():
    assert starting_scales(1)[0] == 1.0
    assert starting_scales(3)[:2] == [1 / 3, 1 / 2]
    for levels in (1, 3, 7, 31, 127, 32767):
        scales = starting_scales(levels)
        assert len(scales) <= 26
        assert scales[0] == 1 / levels
        assert all(scale > 0 for scale in scales)
