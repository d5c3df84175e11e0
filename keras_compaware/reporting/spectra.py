"""Singular values of kernels, and a callback that shows them in TensorBoard while a model trains.

TensorFlow and TensorBoard (the extra `tensorboard`) are imported when training begins; the backend
of Keras may be any.
"""

import importlib.util
import os
from typing import Any

import keras
import numpy as np

from keras_compaware._math.axes import matricise
from keras_compaware.base import Target
from keras_compaware.kernels import find_targets

_LARGEST = 4_000_000_000  # operations of a decomposition, above which a kernel has no spectrum


class SpectrumHistograms(keras.callbacks.Callback):
    """Writes histograms of the singular values of every kernel for TensorBoard.

    Their tags are `singular_values/KERNEL`, their steps the epochs. A kernel is seen as a matrix
    whose columns run over its output units (several, for some kinds of layers: then the values of
    all). Vectors, kernels that are not finite and those whose decomposition takes long are left
    out.

    Place it after the callback of a recipe to see kernels as they are at the end of an epoch, after
    a firing if one was due. The scalars of a recipe (sparsity, rank, distortion) come to
    TensorBoard by `keras.callbacks.TensorBoard`, which goes after that callback as well.

    Args:
        log_dir: the folder, that of `keras.callbacks.TensorBoard` for instance.
        every: epochs from one set of histograms to the next, >= 1.

    Raises:
        ImportError: TensorFlow or TensorBoard is not installed.
        ValueError: `every` is not a positive integer.

    Example:
    >>> callback = SpectrumHistograms("runs/logs", every=5)  # goes into model.fit(callbacks=...)
    >>> callback.log_dir, callback.every
    ('runs/logs', 5)
    """

    def __init__(self, log_dir: str | os.PathLike, *, every: int = 1) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"SpectrumHistograms: `every` must be an integer >= 1. Received: {every!r}."
            )
        missing = [n for n in ("tensorflow", "tensorboard") if importlib.util.find_spec(n) is None]
        if missing:
            raise ImportError(
                f"SpectrumHistograms writes with {' and '.join(missing)}, not installed here. "
                "Install what it needs with `pip install 'keras-compaware[tensorboard]'`."
            )
        self.log_dir = os.fspath(log_dir)
        self.every = every
        self._writer: Any = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch % self.every:
            return
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.log_dir)
        with tf.device("/cpu:0"), self._writer.as_default():
            for target in find_targets(self.model)[0]:
                found = singular_values(target)
                if found is not None:
                    name = f"singular_values/{target.name}"
                    tf.summary.histogram(name, found[0].reshape(-1), step=epoch)
        self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def singular_values(target: Target) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Returns the singular values of a kernel, the largest first, and its matrices' sizes.

    Args:
        target: The kernel.

    Returns:
        `(values (s, min(m, n)), (m, n))` of a stack of s matrices; None for vectors, for kernels
        that are not finite and for those that would take long.

    Example:
    >>> layer = keras.layers.Dense(3, kernel_initializer="identity", name="layer")
    >>> model = keras.Sequential([keras.Input((3,)), layer])
    >>> singular_values(find_targets(model)[0][0])
    (array([[1., 1., 1.]], dtype=float32), (3, 3))
    """
    matrix, _ = matricise(keras.ops.cast(target.read(), "float32"), target.axes)
    matrix = keras.ops.convert_to_numpy(matrix)
    stack, *sizes = matrix.shape
    if min(sizes) < 2 or stack * max(sizes) * min(sizes) ** 2 > _LARGEST:
        return None
    if not np.isfinite(matrix).all():
        return None
    return np.linalg.svd(matrix, compute_uv=False), tuple(sizes)
