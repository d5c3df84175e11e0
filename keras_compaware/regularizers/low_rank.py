"""The nuclear norm: the convex stand-in for the rank."""

import dataclasses

from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware._math.axes import matricise
from keras_compaware._math.svd import polar_factor
from keras_compaware.base import (
    ProximalRegularizer,
    as_kernel,
    check_choice,
    check_number,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class NuclearNorm(ProximalRegularizer):
    """Penalises the sum of the singular values of the kernel's matrix.

        R(W) = strength * sum_j sigma_j(W)
        prox(W, t) = U diag(max(sigma - t * strength, 0)) V^T       (W = U diag(sigma) V^T)

    As in Alvarez & Salzmann (2017); how they reshape a convolution kernel could not be recovered,
    so `split` offers the two matrices of `LowRank`. As `kernel_regularizer=` no gradient passes
    through a decomposition: the subgradient is the polar factor U V^T, found by matrix products
    only, and R(W) = <W, U V^T>. The proximal map decomposes and belongs into the callback.

    Args:
        strength: Number of at least 0: tau.
        split: "channel" (default) or "spatial".

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.diag([3.0, 1.0]).astype("float32")
    >>> round(float(NuclearNorm(1.0)(w)), 4)
    4.0
    >>> np.abs(keras.ops.convert_to_numpy(NuclearNorm(1.0).prox(w, 1.0))).round(4)
    array([[2., 0.],
           [0., 0.]], dtype=float32)
    """

    strength: float
    split: str = "channel"

    needs_decomposition = True

    def __post_init__(self):
        check_number("NuclearNorm", "strength", self.strength, 0.0, float("inf"))
        check_choice("NuclearNorm", "split", self.split, ("channel", "spatial"))

    def __call__(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        factor = ops.stop_gradient(polar_factor(ops.stop_gradient(matrix)))
        return ops.cast(self.strength, "float32") * ops.sum(factor * matrix)

    def prox(self, w, step_size, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        values, rebuild = views.singular_values(w, axes, self.split)
        strength = ops.cast(self.strength if budget is None else budget, "float32")
        return cast(rebuild(shrinkage.soft(values, ops.cast(step_size, "float32") * strength)))

    def rank(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        values, _ = views.singular_values(w, axes, self.split)
        smallest = max(w.shape) * 2.0**-23 * ops.max(values, axis=-1, keepdims=True)
        return ops.max(ops.sum(ops.cast(values > smallest, "int32"), axis=-1))
