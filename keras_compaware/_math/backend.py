"""The one place that touches the active backend: compiling a function, float32 products."""

import contextlib
import functools

import keras


def compiled(function):
    """Returns the function compiled for the active backend, without gradients.

    TensorFlow: a graph function, never XLA (an XLA-compiled SVD is orders of magnitude slower).
    JAX: `jit`. PyTorch: eager under `no_grad`.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        function = tf.function(function, autograph=False, jit_compile=False)
    elif backend == "jax":
        import jax

        function = jax.jit(function)
    elif backend == "torch":
        import torch

        function = torch.no_grad()(function)

    @functools.wraps(function)
    def call(*args):
        with float32_products():
            return function(*args)

    return call


@contextlib.contextmanager
def float32_products():
    """Matrix products inside use full float32 instead of TF32 or bfloat16 passes."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("float32"):
            yield
    elif backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
    elif backend == "torch":
        import torch

        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    else:
        yield
