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


def matrix_shape(shape, axes, split="channel"):
    """Returns `(stack, rows, columns)` of the kernel as a stack of matrices."""
    shape, *roles = split_roles(shape, axes, split)
    return tuple(math.prod(shape[axis] for axis in role) for role in roles)


def matricise(w, axes, split="channel"):
    """Returns `(stack of matrices (stack, rows, columns), function that folds one back)`.

    "channel": rows run over the window and the inputs, columns over the outputs.
    "spatial": rows over the first window axis and the inputs, columns over the other window axes
    and the outputs, as in the separable filters of Jaderberg et al. (2014).
    """
    original = tuple(w.shape)
    shape, batch, rows, columns = split_roles(original, axes, split)
    order = (*batch, *rows, *columns)
    sizes = tuple(shape[axis] for axis in order)
    stacked = matrix_shape(original, axes, split)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    matrix = ops.reshape(ops.transpose(ops.reshape(w, shape), order), stacked)

    def fold(matrix):
        return ops.reshape(ops.transpose(ops.reshape(matrix, sizes), inverse), original)

    return matrix, fold
