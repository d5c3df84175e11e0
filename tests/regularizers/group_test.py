"""Groups that are tiles, and groups with a lasso of their entries."""

import itertools

import numpy as np
import pytest

from keras_compaware import L1, GroupLasso, SparseGroupLasso
from keras_compaware.base import KernelAxes
from tests.laws.helpers import array, eagerly


@pytest.fixture(autouse=True)
def _eagerly():
    with eagerly():
        yield


# ---- tiles ------------------------------------------------------------------------------------


def test_tiles_by_hand():
    w = np.array([[3, 0, 5], [4, 0, 12], [1, 1, 2]], "float32")
    regularizer = GroupLasso(0.5, block=(2, 2))  # norms 5, 13, sqrt(2), 2; sizes 4, 2, 2, 1
    assert regularizer.num_groups((3, 3), KernelAxes((0,), (1,))) == 4
    value = 0.5 * (2 * 5 + np.sqrt(2) * 13 + np.sqrt(2) * np.sqrt(2) + 2)
    assert float(regularizer(w)) == pytest.approx(value, rel=1e-6)
    result = array(regularizer.prox(w, 4.0))  # thresholds 4, 2 sqrt(2), 2 sqrt(2), 2
    expected = w * np.array([[0.2, 0.2, 1 - np.sqrt(8) / 13]] * 2 + [[0, 0, 0]])
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_array_equal(result[2], 0)


def test_tiles_that_are_not_weighted_count_the_same():
    w = np.array([[3, 0, 5], [4, 0, 12], [1, 1, 2]], "float32")
    regularizer = GroupLasso(0.5, weighted=False, block=(2, 2))
    assert float(regularizer(w)) == pytest.approx(0.5 * (5 + 13 + np.sqrt(2) + 2), rel=1e-6)


def test_a_tile_of_the_whole_matrix_is_one_group():
    w = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    assert float(GroupLasso(1.0, block=(9, 9))(w)) == pytest.approx(
        np.sqrt(15) * np.linalg.norm(w), rel=1e-6
    )


def test_a_tile_is_cut_from_the_channel_matrix():
    """Rows run over the window and, faster, over the inputs."""
    w = np.zeros((2, 1, 3, 4), "float32")
    w[0, 0, 2] = w[1, 0, 0] = 1.0  # rows 2 and 3 of 6
    one_tile = GroupLasso(1.0, weighted=False, block=(2, 4))
    assert float(one_tile(w)) == pytest.approx(np.sqrt(8))
    two_tiles = GroupLasso(1.0, weighted=False, block=(3, 4))
    assert float(two_tiles(w)) == pytest.approx(2 + 2)


# ---- sparse group lasso -----------------------------------------------------------------------


def test_entries_come_before_groups():
    """The other order, groups before entries, gives another result, which is not the optimum."""
    w = np.array([[4.0, 5.0]], "float32")
    regularizer = SparseGroupLasso(2.5, l1_strength=1.0, weighted=False)
    result = array(regularizer.prox(w, 1.0))  # [3, 4], then 5 -> 2.5
    np.testing.assert_allclose(result, [[1.5, 2.0]], atol=1e-6)
    other = array(L1(1.0).prox(GroupLasso(2.5, weighted=False).prox(w, 1.0), 1.0))

    def objective(z):
        return 0.5 * np.sum((z - w) ** 2) + 2.5 * np.linalg.norm(z) + np.sum(np.abs(z))

    assert objective(result) < objective(other) - 1e-3


@pytest.mark.parametrize("axis", ["inputs", "outputs"])
def test_the_map_is_the_numerical_minimum(axis):
    """Projected onto signs and halved step by step, a search finds nothing better anywhere."""
    random = np.random.default_rng(0)
    w = random.normal(size=(2, 2)).astype("float32")
    regularizer = SparseGroupLasso(0.3, l1_strength=0.2, axis=axis)
    reduced = 1 if axis == "inputs" else 0

    def objective(z):
        """Of candidates (number, 2, 2)."""
        groups = np.sqrt(2) * np.sqrt(np.sum(z**2, axis=1 + reduced)).sum(axis=1)
        distance = 0.5 * np.sum((z - w) ** 2, axis=(1, 2))
        return distance + 0.3 * groups + 0.2 * np.abs(z).sum(axis=(1, 2))

    best, width = np.zeros((2, 2)), 2.0
    steps = np.array(list(itertools.product((-1, -0.5, 0, 0.5, 1), repeat=4))).reshape(-1, 2, 2)
    for _ in range(200):
        candidates = best + width * steps
        winner = candidates[np.argmin(objective(candidates))]
        width = width if np.any(winner != best) else width / 2
        best = winner
    np.testing.assert_allclose(array(regularizer.prox(w, 1.0)), best, atol=1e-4)


def test_a_budget_keeps_the_proportion():
    w = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
    half = array(SparseGroupLasso(0.8, l1_strength=0.4).prox(w, 0.5, budget=0.4))
    expected = array(SparseGroupLasso(0.4, l1_strength=0.2).prox(w, 0.5))
    np.testing.assert_allclose(half, expected, atol=1e-6)
    nothing = array(SparseGroupLasso(0.8, l1_strength=0.4).prox(w, 0.5, budget=0.0))
    np.testing.assert_array_equal(nothing, w)


def test_without_a_lasso_of_entries_it_is_the_group_lasso():
    w = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
    sparse, plain = SparseGroupLasso(0.3, l1_strength=0.0), GroupLasso(0.3)
    np.testing.assert_array_equal(array(sparse.prox(w, 1.0)), array(plain.prox(w, 1.0)))
    assert float(sparse(w)) == float(plain(w))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupLasso(1.0, block=4), TypeError, "`block` must be a pair of integers, rows"),
        (lambda: GroupLasso(1.0, block=(0, 4)), ValueError, "`block` must be at least 1"),
        (
            lambda: GroupLasso(1.0, axis="outputs", block=(4, 4)),
            ValueError,
            r"give `axis` \(groups are units\) or `block`",
        ),
        (lambda: SparseGroupLasso(1.0, -1.0), ValueError, "SparseGroupLasso: `l1_strength` must"),
        (lambda: SparseGroupLasso(1.0, None), TypeError, "`l1_strength` must be a number"),
        (lambda: SparseGroupLasso(-1.0, 1.0), ValueError, "SparseGroupLasso: `strength` must"),
        (lambda: SparseGroupLasso(0.0, 1.0), ValueError, "for the entries alone use L1"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
