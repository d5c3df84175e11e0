"""The one place that touches the active backend: compiling, selection, float32 products."""

import contextlib
import contextvars
import functools

import keras

_IN_GRAPH_FUNCTION = contextvars.ContextVar("in_graph_function", default=False)


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


def compiled_outside_graphs(function):
    """Returns a function that is quick outside of a graph as well, and differentiable.

    JAX compiles a loop or a branch anew each time that it is called by itself; under `jit` once.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def _graph_function(function):
    """A TensorFlow function that is traced once for each shape, whatever is passed in."""
    import tensorflow as tf

    def traceable(*args):
        token = _IN_GRAPH_FUNCTION.set(True)
        try:
            return function(*args)
        finally:
            _IN_GRAPH_FUNCTION.reset(token)

    traced = tf.function(traceable, autograph=False, jit_compile=False)
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


def calls_cost_time():
    """Whether calling a compiled function takes long beside the work on a small tensor.

    TensorFlow: some tenths of a millisecond each. JAX calls much faster; PyTorch compiles nothing.
    """
    return keras.backend.backend() == "tensorflow"


def sums_take_no_memory():
    """Whether a sum over what is computed of a large tensor needs no temporary of its size.

    JAX: the compiler puts both into one loop.
    """
    return keras.backend.backend() == "jax"


def shapes_may_vary():
    """Whether what is computed here may have shapes that depend on values.

    PyTorch: always. TensorFlow: in `compiled` functions; XLA may compile a training step. JAX: no.
    """
    return keras.backend.backend() == "torch" or _IN_GRAPH_FUNCTION.get()


def selects():
    """Whether the k-th largest is found without sorting."""
    return keras.backend.backend() == "torch"


def picked(x, mask):
    """Returns the entries where the mask is true, if `shapes_may_vary()`."""
    if keras.backend.backend() == "torch":
        return x[mask]
    import tensorflow as tf

    return tf.boolean_mask(x, mask)


def kth_largest(x, k):
    """Returns the k-th largest of each row (stack, 1), 0 < k <= number, if `shapes_may_vary()`."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.kthvalue(x, x.shape[-1] - int(k) + 1, dim=-1, keepdim=True).values
    import tensorflow as tf

    return tf.math.top_k(x, k).values[..., -1:]


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
