"""The lasso of entries."""

import dataclasses
import math

import keras
from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware.base import PACKAGE, ProximalRegularizer, as_kernel, check_number
from keras_compaware.regularizers._groups import magnitude


@keras.saving.register_keras_serializable(package=f"{PACKAGE}.regularizers")  # a score is an L1 too
@dataclasses.dataclass(frozen=True)
class L1(ProximalRegularizer):
    """Penalises the magnitudes of the weights, so that single weights become zero (the lasso).

        R(w) = strength * sum_i |w_i|
        prox(w, t)_i = sign(w_i) * max(|w_i| - t * strength, 0)

    `keras.regularizers.L1` has the same penalty; its gradient makes weights small, but only the
    proximal map makes them exactly zero.

    Args:
        strength: Number of at least 0: lambda.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[3.0, -1.0], [0.5, -2.0]], "float32")
    >>> float(L1(2.0)(w))
    13.0
    >>> np.asarray(keras.ops.convert_to_numpy(L1(2.0).prox(w, 0.5))) + 0.0
    array([[ 2.,  0.],
           [ 0., -1.]], dtype=float32)
    """

    strength: float

    def __post_init__(self):
        check_number("L1", "strength", self.strength, 0.0, math.inf)

    def __call__(self, w, axes=None):
        w, _, _ = as_kernel(w, axes)
        return ops.cast(self.strength, "float32") * ops.sum(magnitude(w))

    def prox(self, w, step_size, axes=None, budget=None):
        w, _, cast = as_kernel(w, axes)
        strength = ops.cast(self.strength if budget is None else budget, "float32")
        magnitudes, rebuild = views.entries(w)
        return cast(rebuild(shrinkage.soft(magnitudes, ops.cast(step_size, "float32") * strength)))

    def critical_thresholds(self, w, axes=None):
        w, _, _ = as_kernel(w, axes)
        return ops.reshape(ops.abs(w), (-1,))

    def prune(self, w, stays, axes=None):
        w, _, cast = as_kernel(w, axes)
        return cast(ops.where(ops.reshape(stays, w.shape), w, 0.0))
