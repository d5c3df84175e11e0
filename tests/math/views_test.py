"""Magnitudes and what is rebuilt of them."""

import numpy as np
import pytest
from keras import ops

from keras_compaware._math import views
from keras_compaware.base import axes_by_rank


def arrays(view):
    magnitudes, rebuild = view
    return np.asarray(ops.convert_to_numpy(magnitudes)), lambda m: np.asarray(
        ops.convert_to_numpy(rebuild(ops.convert_to_tensor(np.asarray(m, "float32"))))
    )


@pytest.fixture
def w():
    return np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")


def test_entries(w):
    magnitudes, rebuild = arrays(views.entries(ops.convert_to_tensor(w)))
    np.testing.assert_array_equal(magnitudes, np.abs(w).reshape(1, 60))
    np.testing.assert_array_equal(rebuild(magnitudes), w)
    np.testing.assert_array_equal(rebuild(np.zeros((1, 60))), 0)
    np.testing.assert_array_equal(rebuild(2 * magnitudes), 2 * w)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2), ()])
def test_groups(w, axes):
    magnitudes, rebuild = arrays(views.groups(ops.convert_to_tensor(w), axes))
    reduced = tuple(axis for axis in range(3) if axis not in axes)
    norms = np.sqrt(np.sum(w.astype("float64") ** 2, axis=reduced))
    np.testing.assert_allclose(magnitudes, norms.reshape(1, -1), rtol=1e-6)
    np.testing.assert_array_equal(rebuild(magnitudes), w)
    np.testing.assert_allclose(rebuild(0.5 * magnitudes), 0.5 * w, rtol=1e-6)
    assert views.group_size(w.shape, axes) == 60 // magnitudes.size
    chosen = magnitudes.copy()
    chosen[0, 0] = 0
    assert np.sum(rebuild(chosen) == 0) == views.group_size(w.shape, axes)


def test_groups_of_zero_stay_zero():
    w = np.zeros((2, 3), "float32")
    w[0] = 1
    magnitudes, rebuild = arrays(views.groups(ops.convert_to_tensor(w), (0,)))
    np.testing.assert_array_equal(rebuild(magnitudes + 1)[1], 0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 1e37])
def test_norms_neither_overflow_nor_vanish(scale):
    w = (np.array([[3, 4, 0]]) * scale).astype("float32")
    norm = float(views.safe_norm(ops.convert_to_tensor(w), (1,))[0, 0])
    assert norm == pytest.approx(5 * scale, rel=1e-6 if scale > 1e-37 else 1e-5)


def test_singular_values(w):
    axes = axes_by_rank(3)
    magnitudes, rebuild = arrays(views.singular_values(ops.convert_to_tensor(w), axes))
    left, values, right = np.linalg.svd(w.reshape(12, 5), full_matrices=False)
    np.testing.assert_allclose(magnitudes, values[None], rtol=1e-5)
    np.testing.assert_allclose(rebuild(magnitudes), w, atol=1e-5)
    cut = np.where(np.arange(5) < 2, values, 0)
    expected = (left * cut @ right).reshape(w.shape)
    np.testing.assert_allclose(rebuild(cut[None]), expected, atol=1e-5)
