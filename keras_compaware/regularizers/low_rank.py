"""The nuclear norm, the convex stand-in for the rank, and its part beyond a rank."""

import dataclasses
import math

import keras
from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware._math.axes import matricise, matrix_shape
from keras_compaware._math.svd import polar_factor, svd
from keras_compaware.base import (
    ProximalRegularizer,
    as_kernel,
    check_choice,
    check_integer,
    check_number,
    register,
)

SPLITS = ("channel", "spatial")


class SpectralPenalty(ProximalRegularizer):
    """A penalty on the singular values of a kernel's matrices, with the field `split`."""

    needs_decomposition = True

    def rank(self, w, axes=None):
        return ops.max(_ranks(w, axes, self.split))

    def critical_thresholds(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        values, _ = views.singular_values(w, axes, self.split)
        values = ops.where(_resolved(values, w.shape), values, 0.0)
        free = ops.arange(values.shape[-1]) < self._num_free
        return ops.reshape(ops.where(free, math.inf, values), (-1,))

    def prune(self, w, stays, axes=None):
        w, axes, cast = as_kernel(w, axes)
        values, rebuild = views.singular_values(w, axes, self.split)
        return cast(rebuild(ops.where(ops.reshape(stays, values.shape), values, 0.0)))

    @property
    def _num_free(self):
        """How many of the largest singular values are not penalised."""
        return getattr(self, "target_rank", 0)


@register
@dataclasses.dataclass(frozen=True)
class NuclearNorm(SpectralPenalty):
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

    def __post_init__(self):
        check_number("NuclearNorm", "strength", self.strength, 0.0, math.inf)
        check_choice("NuclearNorm", "split", self.split, SPLITS)

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


@register
@dataclasses.dataclass(frozen=True)
class TruncatedNuclearNorm(SpectralPenalty):
    """Penalises the singular values of the kernel's matrix beyond the largest ones.

        R(W) = strength * sum_{j > target_rank} sigma_j(W)
        prox(W, t) = U diag(s) V^T
        s_j = sigma_j for j <= target_rank, else max(sigma_j - t * strength, 0)

    The truncated nuclear norm (Hu et al., 2013): zero exactly on the matrices of at most that rank,
    so that, other than the nuclear norm, it does not shrink the directions that stay. It is not
    convex. For large steps the proximal map, which is exact, becomes `LowRank(rank=target_rank)`.
    Where the kernel consists of several linear maps, each has `target_rank` free directions.

    It acts through `Proximal(...)` in the callback and is refused as `kernel_regularizer=`. The
    subgradient U_2 V_2^T needs the leading directions taken out of the polar factor, and these only
    a decomposition finds: an iteration by matrix products would be the slower the nearer the
    singular values on both sides of the cut are, which at the beginning of training they all are.
    Called with a tensor it decomposes, and gives the exact value and subgradient.

    Args:
        strength: Number of at least 0.
        target_rank: Integer of at least 1: number of singular values that are free.
        split: "channel" (default) or "spatial", as in `LowRank`.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.diag([3.0, 2.0, 1.0]).astype("float32")
    >>> round(float(TruncatedNuclearNorm(0.5, target_rank=1)(w)), 4)
    1.5
    >>> shrunk = TruncatedNuclearNorm(0.5, target_rank=1).prox(w, 2.0)
    >>> np.abs(keras.ops.convert_to_numpy(shrunk)).round(4)
    array([[3., 0., 0.],
           [0., 1., 0.],
           [0., 0., 0.]], dtype=float32)
    """

    strength: float
    target_rank: int
    split: str = "channel"

    def __post_init__(self):
        name = "TruncatedNuclearNorm"
        check_number(name, "strength", self.strength, 0.0, math.inf)
        check_integer(name, "target_rank", self.target_rank, 1)
        check_choice(name, "split", self.split, SPLITS)

    def __call__(self, w, axes=None):
        if isinstance(w, keras.Variable):
            raise ValueError(
                "TruncatedNuclearNorm needs a matrix decomposition, which must not run inside the "
                "compiled training step, so it cannot be a `kernel_regularizer=` or a Penalty. "
                f"Received: the variable '{w.path}'. Use the action Proximal({self}, every=N) in a "
                "recipe; to evaluate it by hand, pass a tensor: `regularizer(layer.kernel.value)`."
            )
        w, axes, _ = as_kernel(w, axes)
        matrix, _ = matricise(w, axes, self.split)
        left, values, right = svd(ops.stop_gradient(matrix))
        tail = ops.where(_resolved(values, w.shape), 1.0, 0.0)[:, None, self.target_rank :]
        left, right = left[:, :, self.target_rank :], right[:, self.target_rank :]
        factor = ops.stop_gradient(ops.matmul(left * tail, right))
        return ops.cast(self.strength, "float32") * ops.sum(factor * matrix)

    def prox(self, w, step_size, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        values, rebuild = views.singular_values(w, axes, self.split)
        strength = ops.cast(self.strength if budget is None else budget, "float32")
        threshold = ops.cast(step_size, "float32") * strength
        return cast(rebuild(shrinkage.soft(values, threshold, free=self._num_free)))

    def reason_to_skip(self, shape, axes):
        _, rows, columns = matrix_shape(shape, axes, self.split)
        if self.target_rank < min(rows, columns):
            return None
        return f"a {rows} x {columns} matrix has no singular values beyond {self.target_rank}"


def _ranks(w, axes, split):
    """The number of singular values above rounding of every linear map of the kernel."""
    w, axes, _ = as_kernel(w, axes)
    values, _ = views.singular_values(w, axes, split)
    return ops.sum(ops.cast(_resolved(values, w.shape), "int32"), axis=-1)


def _resolved(values, shape):
    """Which singular values stand out of the rounding of a decomposition in float32."""
    return values > max(shape) * 2.0**-23 * ops.max(values, axis=-1, keepdims=True)
