"""Selections and shrinkages against sorting."""

import numpy as np
import pytest
from keras import ops

from keras_compaware._math import shrinkage
from keras_compaware._math.backend import compiled


def by_sorting(magnitudes, keep):
    mask = np.zeros(magnitudes.shape, bool)
    for row, values in zip(mask, magnitudes, strict=True):
        row[np.argsort(-values, kind="stable")[: max(0, keep)]] = True
    return mask


def largest(magnitudes, keep):
    mask = shrinkage.largest(ops.convert_to_tensor(magnitudes), keep)
    return np.asarray(ops.convert_to_numpy(mask))


TRICKY = {
    "ties": np.array([[1, 3, 3, 2, 3, 0, 0]], "float32"),
    "zeros": np.zeros((2, 7), "float32"),
    "negative zeros": np.array([[-0.0, 0.0, -0.0, 1.0, 0.0, 0.0, 0.0]], "float32"),
    "neighbours": np.array(
        [[1, np.nextafter(np.float32(1), np.float32(2)), 1, 0.5] + [1] * 3], "float32"
    ),
    "extremes": np.array([[3e38, 1.2e-38, 0, 1e30, 1e-30, 3.4e38, 1]], "float32"),
    "rows": np.array([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]], "float32"),
}


@pytest.mark.parametrize("copies", [1, 3], ids=["few", "many"])
@pytest.mark.parametrize("label", TRICKY)
def test_exactly_k_are_selected_and_ties_go_to_the_lower_index(label, copies):
    magnitudes = np.tile(TRICKY[label], (1, copies))
    select = compiled(lambda k: shrinkage.largest(ops.convert_to_tensor(magnitudes), k))
    for keep in range(7 * copies + 1):
        mask = np.asarray(ops.convert_to_numpy(select(ops.convert_to_tensor(keep))))
        np.testing.assert_array_equal(mask, by_sorting(magnitudes, keep), err_msg=str(keep))
        assert np.all(mask.sum(axis=-1) == keep)


def test_the_number_kept_is_clipped():
    magnitudes = TRICKY["rows"]
    assert not largest(magnitudes, -3).any()
    assert largest(magnitudes, 9).all()


def test_many_entries():
    magnitudes = np.abs(np.random.default_rng(0).standard_t(2, size=(3, 50_000))).astype("float32")
    magnitudes = np.round(magnitudes, 2)  # plenty of ties
    for keep in (1, 12_345, 49_999):
        np.testing.assert_array_equal(largest(magnitudes, keep), by_sorting(magnitudes, keep))


def rows_of_one():
    random = np.random.default_rng(0)
    values = np.abs(random.normal(size=(1, 60_000))).astype("float32")
    missed = values.copy()
    missed[:, ::57] = 9.0  # where a sample of 1024 looks
    return {
        "continuous": values,
        "a gap": values * (values > 1),
        "ties": np.round(values, 1),
        "equal": np.ones_like(values),
        "ascending": np.sort(values, axis=-1),
        "missed by the sample": missed,
    }


@pytest.mark.parametrize("label", rows_of_one())
def test_one_long_row(label):
    row = rows_of_one()[label]
    select = compiled(shrinkage.largest)
    for keep in (0, 1, 3_000, 30_000, 59_999, 60_000):
        mask = select(ops.convert_to_tensor(row), ops.convert_to_tensor(keep))
        np.testing.assert_array_equal(ops.convert_to_numpy(mask), by_sorting(row, keep))


def test_soft_shrinkage():
    magnitudes = np.array([[3, 1, 0.5, 2]], "float32")

    def soft(threshold, free=0):
        return ops.convert_to_numpy(
            shrinkage.soft(ops.convert_to_tensor(magnitudes), threshold, free)
        )

    np.testing.assert_array_equal(soft(1.0), [[2, 0, 0, 1]])
    np.testing.assert_array_equal(soft(0.0), magnitudes)
    np.testing.assert_array_equal(soft(1.0, free=1), [[3, 0, 0, 1]])
    np.testing.assert_array_equal(soft(1.0, free=2), [[3, 0, 0, 2]])
    each = ops.convert_to_tensor(np.array([[1, 0, 1, 5]], "float32"))
    np.testing.assert_array_equal(soft(each), [[2, 1, 0, 0]])


def test_soft_with_the_largest_spared_becomes_hard():
    magnitudes = np.abs(np.random.default_rng(0).normal(size=(2, 20))).astype("float32")
    tensor = ops.convert_to_tensor(magnitudes)
    for keep in (1, 5, 19):
        spared = ops.convert_to_numpy(shrinkage.soft(tensor, 1e6, free=keep))
        cut = ops.convert_to_numpy(shrinkage.hard(tensor, keep))
        np.testing.assert_array_equal(spared, cut)
        np.testing.assert_array_equal(cut != 0, by_sorting(magnitudes, keep))
