"""Scales and signs by least squares."""

import numpy as np
import pytest
from keras import ops

from keras_compaware._math import binary_codes
from keras_compaware._math.backend import compiled
from keras_compaware._math.binary_codes import fit_binary, plane
from tests.marks import slow_on_jax


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def fit(rows, bits, kind="refined", rounds=15, mask=None):
    rows = ops.convert_to_tensor(np.asarray(rows, "float32"))
    codes, alphas = compiled(lambda rows: fit_binary(rows, bits, kind, rounds, mask))(rows)
    return array(codes), array(alphas)


def signs_of(codes, bits):
    return np.stack([2.0 * (codes >> i & 1) - 1 for i in range(bits)], axis=1)


def test_by_hand():
    codes, alphas = fit([[0.9, -0.4, 0.6, -1.1]], 2)
    np.testing.assert_allclose(alphas, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[3, 2, 1, 0]])  # the bits of planes 1 and 0
    np.testing.assert_array_equal(array(plane(codes, 1)), [[True, True, False, False]])


@slow_on_jax
@pytest.mark.parametrize("kind", ["greedy", "refined", "alternating"])
def test_rows_are_fitted_by_themselves(kind):
    rows = np.random.default_rng(0).normal(size=(4, 100)) * [[1e-20], [1], [1e20], [0]]
    codes, alphas = fit(rows, 3, kind)
    for number in range(3):
        alone = fit(np.repeat(rows[number : number + 1], 4, axis=0), 3, kind)
        np.testing.assert_array_equal(codes[number], alone[0][0])
        np.testing.assert_allclose(alphas[number], alone[1][0], rtol=1e-6)
    np.testing.assert_array_equal(alphas[3], 0)
    assert np.all(alphas >= 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_alternating_fit_is_a_local_minimum(bits):
    """Neither other scales for these signs nor other signs for these scales are better."""
    rows = np.random.default_rng(1).normal(size=(1, 400))
    codes, alphas = fit(rows, bits, "alternating", rounds=100)
    signs = signs_of(codes, bits)[0]
    best = np.linalg.lstsq(signs.T, rows[0], rcond=None)[0]
    np.testing.assert_allclose(alphas[0], best, atol=1e-5)
    sums = alphas[0] @ signs_of(np.arange(2**bits)[None], bits)[0]
    distance = np.abs(rows[0] - alphas[0] @ signs)
    np.testing.assert_allclose(distance, np.min(np.abs(rows.T - sums), axis=1), atol=1e-5)


@pytest.mark.parametrize("kind", ["refined", "alternating"])
@pytest.mark.parametrize(
    "alphas", [(0.3, 1.2), (1.0, 0.6, 0.5), (0.7, 0.7, 0.7), (2.0, 0.9, 0.41, 0.13)], ids=str
)
def test_sums_of_signs_are_found_exactly(alphas, kind):
    bits = len(alphas)
    codes = np.random.default_rng(2).integers(0, 2**bits, size=(1, 200))
    rows = np.array(alphas) @ signs_of(codes, bits)[0]
    found, scales = fit(rows[None], bits, kind, rounds=1)
    np.testing.assert_allclose(scales[0] @ signs_of(found, bits)[0], rows, atol=2e-6)


def step(signs, rest, mask=None):
    signs, rest = (ops.convert_to_tensor(np.asarray(x, "float32")) for x in (signs, rest))
    mask = None if mask is None else ops.convert_to_tensor(mask)
    return array(compiled(lambda s, r: binary_codes._step(s, r, mask))(signs, rest))


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_the_step_solves_the_normal_equations(bits):
    random = np.random.default_rng(3)
    signs = random.choice([-1.0, 1.0], size=(3, bits, 60))
    rest = random.normal(size=(3, 60))
    mask = random.random((3, 60)) < 0.7
    whole, stored = step(signs, rest), step(signs, rest, mask)
    for row in range(3):
        best = np.linalg.lstsq(signs[row].T, rest[row], rcond=None)[0]
        np.testing.assert_allclose(whole[row], best, atol=1e-5)
        kept = mask[row]
        best = np.linalg.lstsq(signs[row][:, kept].T, rest[row, kept], rcond=None)[0]
        np.testing.assert_allclose(stored[row], best, atol=1e-5)


def test_dependent_planes_get_nothing():
    random = np.random.default_rng(4)
    a, b = random.choice([-1.0, 1.0], size=(2, 50))
    rest = random.normal(size=50)
    best = np.linalg.lstsq(np.stack([a, b], axis=1), rest, rcond=None)[0]
    found = step(np.stack([a, a, b, -a, 0 * a, b])[None], rest[None])
    np.testing.assert_allclose(found, [[best[0], 0, best[1], 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(step(np.ones((1, 3, 5)), np.zeros((1, 5))), 0)
    nothing = step(np.ones((1, 3, 5)), np.ones((1, 5)), np.zeros((1, 5), bool))
    np.testing.assert_array_equal(nothing, 0)
