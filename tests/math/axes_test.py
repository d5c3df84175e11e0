"""Kernels as stacks of matrices, entry by entry."""

import numpy as np
import pytest
from keras import ops

from keras_compaware._math.axes import (
    matricise,
    matrix_shape,
    split_roles,
    tile,
    tile_shape,
    unit_layout,
)
from keras_compaware.base import KernelAxes

CONV = KernelAxes((2,), (3,), (0, 1))
NUMBERS = np.arange(2 * 3 * 4 * 6, dtype="float32").reshape(2, 3, 4, 6)


def matrix_of(w, axes, split="channel"):
    matrix, fold = matricise(ops.convert_to_tensor(w), axes, split)
    found = np.asarray(ops.convert_to_numpy(matrix))
    assert found.shape == matrix_shape(w.shape, axes, split)
    np.testing.assert_array_equal(ops.convert_to_numpy(fold(matrix)), w)
    return found


def test_the_channel_matrix_is_a_reshape_of_a_keras_kernel():
    np.testing.assert_array_equal(matrix_of(NUMBERS, CONV)[0], NUMBERS.reshape(24, 6))


def test_the_spatial_matrix_pairs_rows_with_inputs():
    matrix = matrix_of(NUMBERS, CONV, "spatial")
    assert matrix.shape == (1, 8, 18)
    for y, x, i, o in np.ndindex(2, 3, 4, 6):
        assert matrix[0, y * 4 + i, x * 6 + o] == NUMBERS[y, x, i, o]


def test_a_grouped_convolution_is_one_matrix_for_each_block():
    grouped = KernelAxes((2,), (3,), (0, 1), groups=3)
    matrix = matrix_of(NUMBERS, grouped)
    assert matrix.shape == (3, 24, 2)
    for block in range(3):
        part = NUMBERS[..., 2 * block : 2 * block + 2].reshape(24, 2)
        np.testing.assert_array_equal(matrix[block], part)
    assert matrix_shape(NUMBERS.shape, grouped, "spatial") == (3, 8, 6)
    shape, batch, rows, columns = split_roles(NUMBERS.shape, grouped, "channel")
    assert (shape, batch, rows, columns) == ((2, 3, 4, 3, 2), (3,), (0, 1, 2), (4,))


def test_a_grouped_kernel_whose_outputs_come_first():
    w = np.arange(6 * 5, dtype="float32").reshape(6, 5)
    matrix = matrix_of(w, KernelAxes((1,), (0,), groups=2))
    np.testing.assert_array_equal(matrix, [w[:3].T, w[3:].T])


def test_a_transposed_convolution_has_its_inputs_last():
    axes = KernelAxes((3,), (2,), (0, 1))
    matrix = matrix_of(NUMBERS, axes)
    assert matrix.shape == (1, 36, 4)
    for y, x, o, i in np.ndindex(2, 3, 4, 6):
        assert matrix[0, (y * 3 + x) * 6 + i, o] == NUMBERS[y, x, o, i]


def test_a_depthwise_kernel_is_one_matrix_for_each_channel():
    matrix = matrix_of(NUMBERS, KernelAxes((), (3,), (0, 1)))
    assert matrix.shape == (4, 6, 6)
    np.testing.assert_array_equal(matrix[2], NUMBERS[:, :, 2].reshape(6, 6))


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((5,), KernelAxes((0,)), (1, 5, 1)),
        ((5,), KernelAxes((), (0,)), (1, 1, 5)),
        ((5,), KernelAxes(), (5, 1, 1)),
        ((8, 4, 6), KernelAxes((0,), (1, 2)), (1, 8, 24)),
        ((4, 2, 6), KernelAxes((0, 1), (2,)), (1, 8, 6)),
        ((3, 8, 2), KernelAxes((1,), (2,)), (3, 8, 2)),
        ((1, 1, 7, 1), CONV, (1, 7, 1)),
    ],
)
def test_stack_rows_and_columns(shape, axes, expected):
    assert matrix_shape(shape, axes) == expected
    matrix_of(np.arange(np.prod(shape), dtype="float32").reshape(shape), axes)


def test_units_of_blocks_and_of_batch_axes():
    grouped = KernelAxes((2,), (3,), (0, 1), groups=3)
    assert unit_layout(NUMBERS.shape, grouped, "inputs") == ((2, 3, 4, 3, 2), (2, 3))
    assert unit_layout(NUMBERS.shape, grouped, "outputs") == ((2, 3, 4, 3, 2), (3, 4))
    depthwise = KernelAxes((), (3,), (0, 1))
    assert unit_layout(NUMBERS.shape, depthwise, "inputs") == (NUMBERS.shape, (2,))
    assert unit_layout(NUMBERS.shape, depthwise, "outputs") == (NUMBERS.shape, (2, 3))


@pytest.mark.parametrize("size", [(2, 3), (5, 7), (9, 2), (1, 1)])
def test_tiles_row_by_row_padded_at_the_edge(size):
    stack = np.arange(1, 71, dtype="float32").reshape(2, 5, 7)
    tiles, join = tile(ops.convert_to_tensor(stack), size)
    found = np.asarray(ops.convert_to_numpy(tiles))
    assert found.shape == tile_shape(stack.shape, size)
    np.testing.assert_array_equal(ops.convert_to_numpy(join(tiles)), stack)
    rows, columns = found.shape[1:]
    expected = [
        matrix[row : row + rows, column : column + columns]
        for matrix in stack
        for row in range(0, 5, rows)
        for column in range(0, 7, columns)
    ]
    for ours, part in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours[: part.shape[0], : part.shape[1]], part)
        assert ours.sum() == part.sum()
