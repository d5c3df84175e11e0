"""Applying one map to one target, compiled and checked."""

import dataclasses
import functools
import math
import zlib

import keras
import numpy as np
from keras import ops

from keras_compaware._math.backend import compiled
from keras_compaware.base import Compressor, Perturbation

_PART, _PARTS = 2**20, 16


@dataclasses.dataclass(frozen=True)
class Change:
    """What a map has done to a target.

    Args:
        distortion: ||C(w) - w|| / ||w||, 0 for a kernel of zeros.
        sparsity: Fraction of entries that are zero afterwards.
    """

    distortion: float
    sparsity: float


def overwrite(target, constraint, budget=None, step=0):
    """Overwrites a target by its constrained value; returns the `Change`.

    Raises:
        FloatingPointError: If the target holds NaN or infinity; nothing is written then.
    """
    if isinstance(constraint, Perturbation) and constraint.is_random:
        key = zlib.crc32(f"{step} {target.name}".encode())
        before = ops.stop_gradient(target.read())
        after = constraint(before, axes=target.axes, budget=budget, key=key)
        return _write(target, step, *_measured(before, after))
    function = _constrained(constraint, target.axes, budget is not None)
    arguments = (target.read(),) if budget is None else (target.read(), _scalar(budget))
    return _write(target, step, *function(*arguments))


def overwrite_by_code(target, compressor, previous=None, step=0):
    """Overwrites a target by its decoded code; returns `(change, code)`.

    Args:
        target: The target.
        compressor: A compressor.
        previous: The code of an earlier call, from which an iterative fit starts, or None.
        step: Optimizer step, for messages.
    """
    layout, cold, warm = _encoding(compressor, target.axes, target.shape, target.dtype)
    w = target.read()
    after, measured, arrays = cold(w) if previous is None else warm(w, previous.arrays())
    return _write(target, step, after, measured), layout[0].with_arrays(arrays)


def shrink_towards(target, regularizer, step_size, budget=None, step=0):
    """Overwrites a target by the regularizer's proximal map; returns the `Change`."""
    function = _proximal(regularizer, target.axes, budget is not None)
    arguments = (target.read(), _scalar(step_size))
    if budget is not None:
        arguments = (*arguments, _scalar(budget))
    return _write(target, step, *function(*arguments))


def prune(target, regularizer, stays, step=0):
    """Sets the groups of a target to zero that do not stay; returns the `Change`."""
    function = _pruned(regularizer, target.axes)
    return _write(target, step, *function(target.read(), ops.convert_to_tensor(stays)))


def sparsity_of(target, step=0):
    """Returns the fraction of a target's entries that are zero.

    Raises:
        FloatingPointError: If the target holds NaN or infinity.
    """
    w = target.read()
    _, measured = _measured(w, w)
    return _change(target, step, measured).sparsity


def num_dead_channels(target):
    """Returns how many channels of a target (channels, parameters) are zero, an integer."""
    return int(keras.ops.convert_to_numpy(_rows_of_zeros()(target.read())))


@functools.cache
def _rows_of_zeros():
    return compiled(lambda w: ops.sum(ops.cast(ops.all(ops.equal(w, 0), axis=1), "int32")))


def _write(target, step, value, measured):
    change = _change(target, step, measured)
    target.write(value)
    return change


def _change(target, step, measured):
    distortion, sparsity = (float(x) for x in keras.ops.convert_to_numpy(measured))
    if not np.isfinite(distortion):
        raise FloatingPointError(
            f"The weights '{target.name}' hold NaN or infinity at optimizer step {step}, so they "
            "were not compressed and training is stopped. Lower the learning rate, clip "
            "gradients, or resume from the last checkpoint."
        )
    return Change(distortion, sparsity)


def _scalar(value):
    return ops.convert_to_tensor(np.float32(value))


@functools.lru_cache(maxsize=256)
def _constrained(constraint, axes, with_budget):
    if not isinstance(constraint, (Compressor, Perturbation)):
        return compiled(lambda w: _measured(w, constraint(w)))
    if with_budget:
        return compiled(lambda w, budget: _measured(w, constraint(w, axes=axes, budget=budget)))
    return compiled(lambda w: _measured(w, constraint(w, axes=axes)))


@functools.lru_cache(maxsize=256)
def _encoding(compressor, axes, shape, dtype):
    """A list for the layout of the code, and functions without and with a previous one."""
    del shape, dtype  # the layout of a code depends on them
    layout = []

    def encoded(w, previous=None):
        code = compressor.encode(w, previous=previous, axes=axes)
        arrays = code.arrays()
        layout[:] = [code.with_arrays(keras.tree.map_structure(lambda _: None, arrays))]
        return *_measured(w, compressor.decode(code)), arrays

    def encoded_from(w, arrays):
        return encoded(w, layout[0].with_arrays(arrays))

    return layout, compiled(encoded), compiled(encoded_from)


@functools.lru_cache(maxsize=256)
def _proximal(regularizer, axes, with_budget):
    if with_budget:
        return compiled(
            lambda w, step, budget: _measured(w, regularizer.prox(w, step, axes, budget))
        )
    return compiled(lambda w, step: _measured(w, regularizer.prox(w, step, axes)))


@functools.lru_cache(maxsize=256)
def _pruned(regularizer, axes):
    return compiled(lambda w, stays: _measured(w, regularizer.prune(w, stays, axes)))


def _measured(before, after):
    """Returns `(after, [distortion, sparsity])`: NaN if `before` holds one or infinity."""
    parts = list(zip(_parts(before), _parts(after), strict=True))
    size = ops.max(ops.stack([ops.max(ops.abs(old)) for old, _ in parts]))
    unit = ops.where(size > 0, size, 1.0)
    moved = ops.sqrt(sum(ops.sum(ops.square((new - old) / unit)) for old, new in parts))
    norm = ops.sqrt(sum(ops.sum(ops.square(old / unit)) for old, _ in parts))
    distortion = moved / ops.where(norm > 0, norm, 1.0) + 0.0 * size
    zeros = sum(ops.sum(ops.cast(ops.equal(new, 0), "float32")) for _, new in parts)
    return after, ops.stack([distortion, zeros / math.prod(after.shape)])


def _parts(w):
    """The entries in slices, so that what is computed of them is small beside a large kernel."""
    number = math.prod(w.shape)
    size = max(_PART, -(-number // _PARTS))
    flat = ops.reshape(w, (number,))
    slices = (flat[begin : begin + size] for begin in range(0, number, size))
    return [ops.cast(part, "float32") for part in slices]
