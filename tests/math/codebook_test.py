"""Least-squares fits of grids and codebooks."""

import itertools

import numpy as np
import pytest
from keras import ops

from keras_compaware._math import codebook
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


# ---- clusters ---------------------------------------------------------------------------------


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def tensor(values):
    return ops.convert_to_tensor(np.asarray(values, "float32"))


def clusters(rows, number, rounds=20):
    found = compiled(lambda rows: codebook.fit_clusters(rows, number, rounds))(tensor(rows))
    return tuple(map(array, found))


def best_clusters(row, number):
    """The optimum: clusters are runs of the sorted values."""
    row = np.sort(row)
    errors = []
    for cuts in itertools.combinations(range(1, len(row)), number - 1):
        errors.append(sum(np.var(part) * len(part) for part in np.split(row, cuts)))
    return min(errors)


def test_clusters_are_near_the_global_optimum():
    rows = np.random.default_rng(0).normal(size=(20, 14))
    for number in (2, 3, 4):
        codes, levels = clusters(rows, number)
        errors = np.sum((rows - np.take_along_axis(levels, codes, 1)) ** 2, axis=1)
        best = np.array([best_clusters(row, number) for row in rows])
        assert np.all(errors >= best * (1 - 1e-5))
        assert np.mean(errors / best) < 1.15
        assert np.mean(errors < best * (1 + 1e-5)) >= 0.4


def test_clusters_are_a_local_minimum():
    rows = np.random.default_rng(1).standard_t(3, size=(3, 500)) * [[1e-20], [1], [1e20]]
    codes, levels = clusters(rows, 6, rounds=200)
    for row, code, level in zip(rows, codes, levels, strict=True):
        size = np.abs(row).max()
        assert np.all(np.diff(level) > 0)
        for number in range(6):
            mean = np.mean(row[code == number])
            np.testing.assert_allclose(level[number] / size, mean / size, atol=1e-6)
        nearest = np.min(np.abs(row[:, None] - level), axis=1)
        np.testing.assert_allclose(np.abs(row - level[code]) / size, nearest / size, atol=1e-6)


def test_an_empty_cluster_stays():
    rows = tensor([[0.0, 1.0, 4.0, 5.0]])
    start = tensor([[0.0, 2.5, 2.6, 5.0]])
    codes, levels = codebook.fit_clusters(rows, 4, 3, start=start)
    np.testing.assert_array_equal(array(codes), [[0, 0, 3, 3]])
    np.testing.assert_allclose(array(levels), [[0.5, 2.5, 2.6, 4.5]], rtol=1e-6)


def test_starting_levels_by_hand():
    # gaps 1, 0, 8: sums of gap^(2/3) are 0, 1, 1, 5, of which three levels take 5/6, 5/2, 25/6
    expected = [
        [[1.5, 4.5, 7.5]],  # thirds of [0, 9]
        [[0, 1, 9]],  # places .67, 2, 3.33 of 0, 1, 1, 9
        [[1, 9, 9]],  # the values at which these sums are reached
        [[0, 1, 9]],
    ]
    found = codebook.starting_levels(*codebook.in_order(tensor([[9.0, 1.0, 0.0, 1.0]])), 3)
    np.testing.assert_allclose(array(found), expected, atol=1e-6)
    mask = ops.convert_to_tensor(np.array([[True, True, False, True, True, False]]))
    values = tensor([[9.0, 1.0, 77.0, 0.0, 1.0, -5.0]])
    masked = codebook.starting_levels(*codebook.in_order(values, mask), 3)
    np.testing.assert_allclose(array(masked), expected, atol=1e-6)


@pytest.mark.parametrize("size", [5, 1000, 200_000])
def test_quick_rounds_find_what_rounds_at_every_value_find(size):
    random = np.random.default_rng(4)
    rows = np.stack([random.standard_t(3, size=size), random.normal(3.0, 1e-3, size=size)])
    rows = rows.astype("float32")
    mask = random.uniform(size=rows.shape) < 0.7
    levels = np.sort(random.choice(rows[0], (2, 4)), axis=1).astype("float32")
    scaled, unit = codebook.normalised(tensor(rows), ops.convert_to_tensor(mask))
    levels = levels / array(unit)
    step = codebook.range_means(*codebook.in_order(scaled, ops.convert_to_tensor(mask)))
    found = array(step(0, tensor(levels)))
    values = array(scaled).astype("float64")
    for row in range(2):
        stored = values[row][mask[row]]
        codes = np.searchsorted((levels[row, 1:] + levels[row, :-1]) / 2, stored)
        for number in range(4):
            mine = stored[codes == number]
            expected = mine.mean() if len(mine) else levels[row, number]
            np.testing.assert_allclose(found[row, number], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 100])
def test_number_below_is_a_search_in_every_row(number):
    random = np.random.default_rng(3)
    ordered = np.sort(random.integers(0, 50, size=(3, number)).astype("float32"), axis=1)
    queries = random.integers(-5, 60, size=(3, 200)).astype("float32")
    found = array(codebook.number_below(tensor(ordered), tensor(queries)))
    for row in range(3):
        np.testing.assert_array_equal(found[row], np.searchsorted(ordered[row], queries[row]))


def test_means_of_clusters_in_parts(monkeypatch):
    random = np.random.default_rng(4)
    values, codes = random.normal(size=(2, 100)), random.integers(0, 4, size=(2, 100))
    mask = random.random((2, 100)) < 0.5
    expected = np.zeros((2, 5))  # nothing has code 4
    for row, number in np.ndindex(2, 4):
        expected[row, number] = values[row, mask[row] & (codes[row] == number)].mean()
    for part in (2**20, 30):
        monkeypatch.setattr(codebook, "PART", part)
        found = codebook.cluster_means(
            tensor(values), ops.convert_to_tensor(codes.astype("int32")), 5, mask
        )
        np.testing.assert_allclose(array(found), expected, atol=1e-6)


def test_normalised_by_a_power_of_two():
    rows = np.array([[0.75, -6.5], [1e-30, 2e-30], [0.0, 0.0], [1.0, -3e38]], "float32")
    scaled, unit = map(array, codebook.normalised(tensor(rows)))
    np.testing.assert_array_equal(unit[:, 0], [4.0, 2.0**-99, 1.0, 2.0**126])
    np.testing.assert_array_equal(scaled * unit, rows)
    assert np.all(np.abs(scaled) < 4)


# ---- ternary ----------------------------------------------------------------------------------


def test_ternary_by_hand():
    rows = tensor([[1.0, -0.2, 0.4, -0.8], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    codes, scale = map(array, codebook.fit_ternary(rows))  # thresholds .42, 0, 2.1
    np.testing.assert_array_equal(codes, [[1, 0, 0, -1], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(scale, [[0.9], [1.0], [3.0]], rtol=1e-6)
