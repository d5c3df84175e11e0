"""What the batteries share: evaluation, comparison, gradients, on every backend."""

import contextlib
import functools

import keras
import numpy as np
from keras import ops

from keras_compaware._math.backend import compiled


def eagerly():
    """Evaluates operation by operation.

    JAX otherwise compiles every loop anew whenever it is called, which would be most of the time
    that these tests take. What is compiled on purpose must stay outside.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.disable_jit()
    return contextlib.nullcontext()


@functools.cache
def compiled_map(compressor, axes):
    """The map of a compressor, compiled; one function for all tests that use it."""
    return compiled(lambda w: compressor(w, axes=axes))


def array(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def norm(w):
    return np.linalg.norm(array(w).astype("float64"))


def value_and_gradient(function, w):
    """A scalar function's value and gradient at an array, by the backend's own differentiation."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        w = tf.constant(w)
        with tf.GradientTape() as tape:
            tape.watch(w)
            value = function(w)
        gradient = tape.gradient(value, w)
    elif backend == "jax":
        import jax

        value, gradient = jax.value_and_grad(function)(w)
    else:
        w = ops.convert_to_tensor(w.copy()).requires_grad_()
        value = function(w)
        value.backward()
        gradient = w.grad
        value = value.detach()
    return float(value), array(gradient)
