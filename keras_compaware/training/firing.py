"""Applying one map to one target, compiled and checked."""

import functools

import keras
import numpy as np
from keras import ops

from keras_compaware._math.backend import compiled, float32_products
from keras_compaware.base import Compressor


def overwrite(target, constraint, budget=None):
    """Overwrites a target by its constrained value; returns the relative distortion, a float.

    The distortion is ||C(w) - w|| / ||w|| (0 for a kernel of zeros).

    Raises:
        FloatingPointError: If the target holds NaN or infinity; nothing is written then.
    """
    function = _constrained(constraint, target.axes, budget is not None)
    arguments = (target.read(),) if budget is None else (target.read(), _scalar(budget))
    return _write(target, *function(*arguments))


def overwrite_by_code(target, compressor):
    """Overwrites a target by its decoded code; returns `(relative distortion, code)`."""
    before = ops.stop_gradient(target.read())
    with float32_products():
        code = compressor.encode(before, axes=target.axes)
        after, distortion = _measured(before, compressor.decode(code))
    return _write(target, after, distortion), code


def shrink_towards(target, regularizer, step_size, budget=None):
    """Overwrites a target by the regularizer's proximal map; returns the relative distortion."""
    function = _proximal(regularizer, target.axes, budget is not None)
    arguments = (target.read(), _scalar(step_size))
    if budget is not None:
        arguments = (*arguments, _scalar(budget))
    return _write(target, *function(*arguments))


def _write(target, value, distortion):
    distortion = float(keras.ops.convert_to_numpy(distortion))
    if not np.isfinite(distortion):
        raise FloatingPointError(
            f"The weights '{target.name}' hold NaN or infinity, so they were not compressed and "
            "training is stopped. Lower the learning rate, clip gradients, or resume from the last "
            "checkpoint."
        )
    target.write(value)
    return distortion


def _scalar(value):
    return ops.convert_to_tensor(np.float32(value))


@functools.lru_cache(maxsize=256)
def _constrained(constraint, axes, with_budget):
    if not isinstance(constraint, Compressor):
        return compiled(lambda w: _measured(w, constraint(w)))
    if with_budget:
        return compiled(lambda w, budget: _measured(w, constraint(w, axes=axes, budget=budget)))
    return compiled(lambda w: _measured(w, constraint(w, axes=axes)))


@functools.lru_cache(maxsize=256)
def _proximal(regularizer, axes, with_budget):
    if with_budget:
        return compiled(
            lambda w, step, budget: _measured(w, regularizer.prox(w, step, axes, budget))
        )
    return compiled(lambda w, step: _measured(w, regularizer.prox(w, step, axes)))


def _measured(before, after):
    old, new = ops.cast(before, "float32"), ops.cast(after, "float32")
    size = ops.max(ops.abs(old))
    unit = ops.where(size > 0, size, 1.0)
    moved = ops.sqrt(ops.sum(ops.square((new - old) / unit)))
    norm = ops.sqrt(ops.sum(ops.square(old / unit)))
    return after, moved / ops.where(norm > 0, norm, 1.0) + 0.0 * size
