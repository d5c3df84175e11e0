"""Three views of a kernel: each gives `(magnitudes (stack, number), rebuild)`.

`rebuild(m)` returns the kernel whose magnitudes are `m` and whose directions are the old ones;
entries, groups or singular directions of magnitude zero stay zero.
"""

import math

from keras import ops

from keras_compaware._math.axes import matricise
from keras_compaware._math.svd import svd


def entries(w):
    """The absolute values of all entries, (1, number)."""
    shape = tuple(w.shape)

    def rebuild(magnitudes):
        return ops.sign(w) * ops.reshape(magnitudes, shape)

    return ops.reshape(ops.abs(w), (1, -1)), rebuild


def groups(w, index_axes):
    """The Euclidean norms of the slices `w[index]` for all indices along some axes, (1, number)."""
    shape = tuple(w.shape)
    index_axes = tuple(index_axes)
    reduced = tuple(axis for axis in range(len(shape)) if axis not in index_axes)
    norms = safe_norm(w, reduced)

    def rebuild(magnitudes):
        return w * ops.divide_no_nan(ops.reshape(magnitudes, norms.shape), norms)

    return ops.reshape(norms, (1, -1)), rebuild


def group_size(shape, index_axes):
    """Number of entries of one group."""
    return math.prod(size for axis, size in enumerate(shape) if axis not in index_axes)


def safe_norm(w, reduced):
    """Euclidean norm over axes (kept with size 1): no overflow, gradient 0 at 0."""
    if not reduced:
        return ops.abs(w)
    scale = ops.stop_gradient(ops.max(ops.abs(w), axis=reduced, keepdims=True))
    w = w / ops.where(scale > 0, scale, 1.0)
    squares = ops.sum(w * w, axis=reduced, keepdims=True)
    return scale * ops.sqrt(ops.maximum(squares, 0.5))  # at least 1, or 0 where the scale is 0


def singular_values(w, axes, split="channel"):
    """The singular values of the kernel's matrices, (stack, number), largest first."""
    matrix, fold = matricise(w, axes, split)
    left, values, right = svd(matrix)

    def rebuild(magnitudes):
        return fold(ops.matmul(left * magnitudes[:, None, :], right))

    return values, rebuild
