"""Kernels as stacks of matrices."""

import math

from keras import ops


def split_roles(shape, axes, split):
    """Returns `(shape with groups split off, batch, rows, columns)` as axes of that shape."""
    ndim = len(shape)
    batch, inputs, spatial, outputs = axes.batch(ndim), axes.inputs, axes.spatial, axes.outputs
    if axes.groups > 1:
        out = outputs[0]
        shape = (*shape[:out], axes.groups, shape[out] // axes.groups, *shape[out + 1 :])
        moved = [axis + (axis >= out) for axis in range(ndim)]
        moved[out] = out + 1
        batch = (*(moved[axis] for axis in batch), out)
        inputs, spatial, outputs = (
            tuple(moved[axis] for axis in roles) for roles in (inputs, spatial, outputs)
        )
    if split == "spatial":
        return shape, batch, (*spatial[:1], *inputs), (*spatial[1:], *outputs)
    return shape, batch, (*spatial, *inputs), outputs


def unit_layout(shape, axes, role):
    """Returns `(shape with the blocks of a grouped kernel apart, axes that run over units)`.

    Args:
        shape: Shape of the kernel.
        axes: Its `KernelAxes`.
        role: "inputs" or "outputs". Along batch axes and in every block there are units of its own.
    """
    shape, batch, rows, columns = split_roles(tuple(shape), axes, "channel")
    of_role = rows[len(axes.spatial) :] if role == "inputs" else columns
    return shape, tuple(sorted((*batch, *of_role)))


def matrix_shape(shape, axes, split="channel"):
    """Returns `(stack, rows, columns)` of the kernel as a stack of matrices."""
    shape, *roles = split_roles(shape, axes, split)
    return tuple(math.prod(shape[axis] for axis in role) for role in roles)


def tensor_shape(shape, axes):
    """Returns `(stack, window, inputs, outputs)`: the channel matrices with the window apart."""
    stack, rows, outputs = matrix_shape(shape, axes)
    window = math.prod(shape[axis] for axis in axes.spatial)
    return stack, window, rows // window, outputs


def matricise(w, axes, split="channel"):
    """Returns `(stack of matrices (stack, rows, columns), function that folds one back)`.

    "channel": rows run over the window and the inputs, columns over the outputs.
    "spatial": rows over the first window axis and the inputs, columns over the other window axes
    and the outputs, as in the separable filters of Jaderberg et al. (2014).
    """
    original = tuple(w.shape)
    shape, batch, rows, columns = split_roles(original, axes, split)
    order = (*batch, *rows, *columns)
    stacked = matrix_shape(original, axes, split)
    matrix = ops.reshape(ops.transpose(ops.reshape(w, shape), order), stacked)
    return matrix, folding(original, axes, split)


def folding(original, axes, split="channel"):
    """Returns the function that folds matrices back into a kernel of that shape."""
    shape, batch, rows, columns = split_roles(original, axes, split)
    order = (*batch, *rows, *columns)
    sizes = tuple(shape[axis] for axis in order)
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def fold(matrix):
        return ops.reshape(ops.transpose(ops.reshape(matrix, sizes), inverse), original)

    return fold


def tile_shape(stacked, size):
    """Returns `(number of tiles, rows, columns)` for a stack of matrices of that shape.

    Args:
        stacked: `(stack, rows, columns)`.
        size: `(rows, columns)` of a tile; larger ones are cut down to the matrix.
    """
    stack, *whole = stacked
    rows, columns = map(min, size, whole)
    return stack * -(-whole[0] // rows) * -(-whole[1] // columns), rows, columns


def tile(matrix, size):
    """Cuts a stack of matrices into tiles, those at the edge padded with zeros.

    Returns:
        `(tiles (number, rows, columns), function that joins them again)`, with the tiles of a
        matrix in the order of its rows.
    """
    stack, *whole = matrix.shape
    _, rows, columns = tile_shape(matrix.shape, size)
    down, across = -(-whole[0] // rows), -(-whole[1] // columns)
    missing = (down * rows - whole[0], across * columns - whole[1])
    if any(missing):
        matrix = ops.pad(matrix, ((0, 0), (0, missing[0]), (0, missing[1])))
    parts = ops.reshape(matrix, (stack, down, rows, across, columns))
    tiles = ops.reshape(ops.transpose(parts, (0, 1, 3, 2, 4)), (-1, rows, columns))

    def join(tiles):
        parts = ops.reshape(tiles, (stack, down, across, rows, columns))
        padded = (stack, down * rows, across * columns)
        joined = ops.reshape(ops.transpose(parts, (0, 1, 3, 2, 4)), padded)
        return joined[:, : whole[0], : whole[1]]

    return tiles, join
