"""Applying maps to targets, compiled and checked; small targets in one call."""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_compaware._math.backend import calls_cost_time, compiled, sums_take_no_memory
from keras_compaware.base import Compressor, Perturbation, Target

_PART, _PARTS = 2**20, 16
_TOGETHER = 2**18  # entries


@dataclasses.dataclass(frozen=True)
class Change:
    """What a map has done to a target.

    Args:
        distortion: ||C(w) - w|| / ||w||, 0 for a kernel of zeros.
        sparsity: Fraction of entries that are zero afterwards.
    """

    distortion: float
    sparsity: float


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A map with what it is applied to, ready to be computed and written by `apply`.

    Args:
        target: The target.
        function: Returns `(new value, [distortion, sparsity], arrays of a code or ())`.
        arguments: Its arguments: tensors, in nested structures.
        code: A list that holds the layout of the code, once `function` was traced; or None.
        is_traced: Whether the function may be compiled.
    """

    target: Target
    function: Callable
    arguments: tuple
    code: list | None = None
    is_traced: bool = True


def constrained(target, constraint, budget=None, step=0):
    """Returns the `Rewrite` of a target by its constrained value.

    Args:
        target: The target.
        constraint: A compressor, perturbation, or Keras constraint.
        budget: In place of the constraint's own, from a ramp, or None.
        step: Optimizer step, to which the numbers of a random perturbation belong.
    """
    if isinstance(constraint, Perturbation) and constraint.is_random:
        key = zlib.crc32(f"{step} {target.name}".encode())

        def perturbed(w):
            return *_measured(w, constraint(w, axes=target.axes, budget=budget, key=key)), ()

        before = ops.stop_gradient(target.read())
        return Rewrite(target, perturbed, (before,), is_traced=False)
    function = _constrained(constraint, target.axes, budget is not None)
    arguments = (target.read(),) if budget is None else (target.read(), _scalar(budget))
    return Rewrite(target, function, arguments)


def encoded(target, compressor, previous=None):
    """Returns the `Rewrite` of a target by its decoded code.

    Args:
        target: The target.
        compressor: A compressor.
        previous: The code of an earlier call, from which an iterative fit starts, or None.
    """
    layout, cold, warm, _ = _encoding(compressor, target.axes, target.shape, target.dtype)
    if previous is None:
        return Rewrite(target, cold, (target.read(),), layout)
    return Rewrite(target, warm, (target.read(), previous.arrays()), layout)


def encoded_on(target, compressor, basis):
    """Returns the `Rewrite` of a target by its decoded code on a basis that was fitted before.

    Args:
        target: The target.
        compressor: A compressor.
        basis: What `compressor.basis` has returned.
    """
    layout, *_, on_basis = _encoding(compressor, target.axes, target.shape, target.dtype)
    return Rewrite(target, on_basis, (target.read(), basis), layout)


def shrunk(target, regularizer, step_size, budget=None):
    """Returns the `Rewrite` of a target by the regularizer's proximal map."""
    function = _proximal(regularizer, target.axes, budget is not None)
    arguments = (target.read(), _scalar(step_size))
    if budget is not None:
        arguments = (*arguments, _scalar(budget))
    return Rewrite(target, function, arguments)


def pruned(target, regularizer, stays):
    """Returns the `Rewrite` of a target that sets its groups to zero that do not stay."""
    function = _pruned(regularizer, target.axes)
    return Rewrite(target, function, (target.read(), ops.convert_to_tensor(stays)))


def apply(rewrites, step=0):
    """Computes rewrites of targets that share no weights, all in one call, and writes them.

    Args:
        rewrites: List of `Rewrite`; one that is not traced stands alone.
        step: Optimizer step, for messages.

    Returns:
        `[(Change, Code or None), ...]`.

    Raises:
        FloatingPointError: If a target holds NaN or infinity; nothing is written then.
    """
    functions = tuple(rewrite.function for rewrite in rewrites)
    together = _together(functions) if rewrites[0].is_traced else functools.partial(_all, functions)
    with finite([rewrite.target for rewrite in rewrites], step):
        values, measured, arrays = together(*(rewrite.arguments for rewrite in rewrites))
    measured = keras.ops.convert_to_numpy(measured)
    changes = [
        _change(rewrite.target, step, row) for rewrite, row in zip(rewrites, measured, strict=True)
    ]
    for rewrite, value in zip(rewrites, values, strict=True):
        rewrite.target.write(value)
    codes = [
        None if rewrite.code is None else rewrite.code[0].with_arrays(found)
        for rewrite, found in zip(rewrites, arrays, strict=True)
    ]
    return list(zip(changes, codes, strict=True))


@contextlib.contextmanager
def finite(targets, step=0):
    """An error in the block is that of NaN or infinity if a target holds one.

    Raises:
        FloatingPointError: If the block raises it, or raises and a target holds NaN or infinity.
    """
    try:
        yield
    except Exception as error:
        for target in targets:
            sparsity_of(target, step)
        if isinstance(error, FloatingPointError):
            names = ", ".join(f"'{target.name}'" for target in targets)
            raise FloatingPointError(f"{names}: {error}") from error
        raise


def costs_less_together(targets):
    """Whether one call for all these targets costs less than one for each, and little memory."""
    return calls_cost_time() and sum(target.num_parameters for target in targets) <= _TOGETHER


def sparsity_of(target, step=0):
    """Returns the fraction of a target's entries that are zero.

    Raises:
        FloatingPointError: If the target holds NaN or infinity.
    """
    w = ops.stop_gradient(target.read())
    _, measured = _measured(w, w)
    return _change(target, step, measured).sparsity


def num_dead_channels(target):
    """Returns how many channels of a target (channels, parameters) are zero, an integer."""
    return int(keras.ops.convert_to_numpy(_rows_of_zeros()(target.read())))


@functools.cache
def _rows_of_zeros():
    return compiled(lambda w: ops.sum(ops.cast(ops.all(ops.equal(w, 0), axis=1), "int32")))


def _all(functions, *arguments):
    results = [function(*given) for function, given in zip(functions, arguments, strict=True)]
    values, measured, arrays = zip(*results, strict=True)
    return values, ops.stack(measured), arrays


@functools.lru_cache(maxsize=256)
def _together(functions):
    return compiled(functools.partial(_all, functions))


def _change(target, step, measured):
    distortion, sparsity = map(float, measured)
    if not np.isfinite(distortion):
        raise FloatingPointError(
            f"The weights '{target.name}' hold NaN or infinity at optimizer step {step}, or are so "
            "large that what they are compressed to would, so they were not compressed and "
            "training is stopped. Lower the learning rate, clip gradients, or resume from the last "
            "checkpoint."
        )
    return Change(distortion, sparsity)


def _scalar(value):
    return ops.convert_to_tensor(np.float32(value))


@functools.lru_cache(maxsize=256)
def _constrained(constraint, axes, with_budget):
    if not isinstance(constraint, (Compressor, Perturbation)):
        return lambda w: (*_measured(w, constraint(w)), ())
    if with_budget:
        return lambda w, budget: (*_measured(w, constraint(w, axes=axes, budget=budget)), ())
    return lambda w: (*_measured(w, constraint(w, axes=axes)), ())


@functools.lru_cache(maxsize=256)
def _encoding(compressor, axes, shape, dtype):
    """A list for the layout of the code, and functions that encode.

    From nothing, from a previous code, and on a basis.
    """
    del shape, dtype  # the layout of a code depends on them
    layout = []

    def encoded(w, previous=None):
        return noted(w, compressor.encode(w, previous=previous, axes=axes))

    def noted(w, code):
        arrays = code.arrays()
        layout[:] = [code.with_arrays(keras.tree.map_structure(lambda _: None, arrays))]
        return *_measured(w, compressor.decode(code)), arrays

    def encoded_from(w, arrays):
        return encoded(w, layout[0].with_arrays(arrays))

    def encoded_on_basis(w, basis):
        return noted(w, compressor.encode_on(basis, w, axes))

    return layout, encoded, encoded_from, encoded_on_basis


@functools.lru_cache(maxsize=256)
def _proximal(regularizer, axes, with_budget):
    if with_budget:
        return lambda w, step, budget: (*_measured(w, regularizer.prox(w, step, axes, budget)), ())
    return lambda w, step: (*_measured(w, regularizer.prox(w, step, axes)), ())


@functools.lru_cache(maxsize=256)
def _pruned(regularizer, axes):
    return lambda w, stays: (*_measured(w, regularizer.prune(w, stays, axes)), ())


def _measured(before, after):
    """Returns `(after, [distortion, sparsity])`: NaN if `before` holds one or infinity."""
    parts = list(zip(_parts(before), _parts(after), strict=True))
    size = functools.reduce(ops.maximum, (ops.max(ops.abs(old)) for old, _ in parts))
    unit = ops.where(size > 0, size, 1.0)
    moved = ops.sqrt(sum(ops.sum(ops.square((new - old) / unit)) for old, new in parts))
    # By its negative, since what two sums share would be written down, as large as the target.
    norm = ops.sqrt(sum(ops.sum(ops.square(old / -unit)) for old, _ in parts))
    distortion = moved / ops.where(norm > 0, norm, 1.0) + 0.0 * size
    # The sign of the magnitude, as JAX sums a comparison only by way of a temporary.
    filled = sum(ops.sum(ops.sign(ops.abs(new))) for _, new in parts)
    number = math.prod(after.shape)
    return after, ops.stack([distortion, (number - filled) / number])


def _parts(w):
    """The entries in slices, so that what is computed of them is small beside a large kernel."""
    number = math.prod(w.shape)
    if number <= _PART or sums_take_no_memory():
        return [ops.cast(w, "float32")]
    size = max(_PART, -(-number // _PARTS))
    flat = ops.reshape(w, (number,))
    slices = (flat[begin : begin + size] for begin in range(0, number, size))
    return [ops.cast(part, "float32") for part in slices]
