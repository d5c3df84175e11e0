"""Singular value decomposition of stacks of matrices, and what stands in for it in a step."""

import math

import numpy as np
from keras import ops

NOT_FINITE = (
    "expected a kernel of finite numbers, received one with NaN or infinity, or so large that its "
    "singular values are infinite."
)


def svd(matrix, number=None):
    """Returns `(left (s, m, k), values (s, k), right (s, k, n))` with k = min(m, n).

    Where rows or columns of the matrix are zero, those of the singular vectors are exactly zero as
    well.

    Args:
        matrix: Tensor (s, m, n).
        number: How many of the largest singular values and their vectors are returned.

    Raises:
        FloatingPointError: If PyTorch refuses a matrix with NaN or infinity, or so large that its
            norm is infinite. The other backends return NaN or infinity.
    """
    try:
        left, values, right = ops.svd(matrix, full_matrices=False)
    except RuntimeError as error:
        norm = np.linalg.norm(ops.convert_to_numpy(matrix).astype("float64"))
        if norm < np.finfo(np.float32).max:
            raise
        raise FloatingPointError(NOT_FINITE) from error
    if number is not None:
        left, values, right = left[:, :, :number], values[:, :number], right[:, :number]
    filled = ops.not_equal(matrix, 0)
    rows, columns = ops.any(filled, axis=-1, keepdims=True), ops.any(filled, axis=-2, keepdims=True)
    return left * ops.cast(rows, left.dtype), values, right * ops.cast(columns, right.dtype)


def above_rounding(values, matrix_sizes):
    """Says which singular values are more than what rounding in float32 leaves of zeros.

    Those are larger than max(m, n) * eps times the largest one of their matrix; their number is its
    numerical rank.

    Args:
        values: NumPy array (s, k), the largest first.
        matrix_sizes: (m, n), the sizes of every matrix.

    Returns:
        Boolean array (s, k).

    Example:
    >>> above_rounding(np.array([[2.0, 1e-4, 1e-7], [0.0, 0.0, 0.0]]), (3, 5))
    array([[ True,  True, False],
           [False, False, False]])
    """
    return values > max(matrix_sizes) * np.finfo(np.float32).eps * values[:, :1]


def polar_factor(matrix, smallest=1e-4):
    """Returns the orthogonal polar factor U V^T of a stack of matrices by matrix products only.

    Scaled Newton-Schulz iterations x <- 1.5 a x - 0.5 (a x)^3 on the singular values, where the
    scaling a maps the interval [l, 1] that is known to hold them as evenly around 1 as possible
    (Chen & Chow, 2014), but not so large that it would push the largest ones down to where they
    drown in rounding. Singular values of at least `smallest` times the Frobenius norm end within
    1e-6 of one; smaller ones in between 0 and 1, an all-zero matrix stays zero.
    """
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        return ops.swapaxes(polar_factor(ops.swapaxes(matrix, -1, -2), smallest), -1, -2)
    size = ops.max(ops.abs(matrix), axis=(-2, -1), keepdims=True)
    x = matrix / ops.where(size > 0, size, 1.0)
    norm = ops.sqrt(ops.sum(ops.square(x), axis=(-2, -1), keepdims=True))
    x = x / ops.where(norm > 0, norm, 1.0)
    low = smallest
    while low < 1.0 - 1e-7:
        scale = min(1.7, math.sqrt(3.0 / (1.0 + low + low * low)))
        gram = ops.matmul(x, ops.swapaxes(x, -1, -2))
        x = 1.5 * scale * x - 0.5 * scale**3 * ops.matmul(gram, x)
        low = min(0.5 * scale * end * (3.0 - (scale * end) ** 2) for end in (low, 1.0))
    return x
