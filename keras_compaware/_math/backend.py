"""The one place that touches the active backend: compiling, selection, float32 products."""

import contextlib
import functools

import keras


def compiled(function):
    """Returns the function compiled for the active backend, without gradients.

    TensorFlow: a graph function, never XLA (an XLA-compiled SVD is orders of magnitude slower).
    JAX: `jit`. PyTorch: eager under `no_grad`.
    """
    backend = keras.backend.backend()
    quick = function
    if backend == "tensorflow":
        quick = _graph_function(function)
    elif backend == "jax":
        import jax

        quick = jax.jit(function)
    elif backend == "torch":
        import torch

        quick = torch.no_grad()(function)

    @functools.wraps(function)
    def call(*args):
        with float32_products():
            return quick(*args)

    return call


def _graph_function(function):
    """A TensorFlow function that is traced once for each shape, whatever is passed in."""
    import tensorflow as tf

    traced = tf.function(function, autograph=False, jit_compile=False)
    concrete = {}

    def call(*args):
        args = keras.tree.map_structure(tf.convert_to_tensor, args)
        # Each shape on purpose: `tf.function` would warn of many tracings, and trace anew for
        # every variable.
        key = tuple((tuple(a.shape), a.dtype.name) for a in keras.tree.flatten(args))
        if key not in concrete:
            concrete[key] = traced.get_concrete_function(*args)
        return concrete[key](*args)

    return call


def kth_largest(x, k):
    """Returns the k-th largest of each row (stack, 1), for 0 < k <= number; None if not built in.

    PyTorch alone selects without sorting.
    """
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.kthvalue(x, x.shape[-1] - int(k) + 1, dim=-1, keepdim=True).values


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
