"""Group lasso and its partial form."""

import dataclasses
import math

from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware._math.axes import unit_layout
from keras_compaware.base import (
    ProximalRegularizer,
    as_kernel,
    check_choice,
    check_number,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class GroupLasso(ProximalRegularizer):
    """Penalises the Euclidean norm of groups of weights, so that whole groups become zero.

        R(w) = strength * sum_g c_g ||w_g||_2,     c_g = sqrt(size of g) or 1
        prox(w, t)_g = max(0, 1 - t * strength * c_g / ||w_g||_2) * w_g

    Groups are the outgoing weights of an input unit ("inputs", as in Scardapane et al., 2017: when
    such a row is zero, the unit before can be removed exactly) or the incoming weights of an
    output unit ("outputs": neurons, filters).

    Args:
        strength: Number of at least 0: lambda.
        axis: "inputs" (default) or "outputs".
        weighted: Whether a group counts by the square root of its size (default) or simply.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[3.0, 4.0], [0.3, 0.4]], "float32")
    >>> regularizer = GroupLasso(1.0, weighted=False)
    >>> float(regularizer(w))
    5.5
    >>> np.asarray(keras.ops.convert_to_numpy(regularizer.prox(w, 1.0)))
    array([[2.4, 3.2],
           [0. , 0. ]], dtype=float32)
    """

    strength: float
    axis: str = "inputs"
    weighted: bool = True

    def __post_init__(self):
        name = type(self).__name__
        check_number(name, "strength", self.strength, 0.0, float("inf"))
        check_choice(name, "axis", self.axis, ("inputs", "outputs"))

    def __call__(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        norms, _ = self._groups(w, axes)
        return ops.cast(self.strength, "float32") * ops.sum(norms * self._weights(w.shape, axes))

    def prox(self, w, step_size, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        norms, rebuild = self._groups(w, axes)
        strength = ops.cast(self.strength if budget is None else budget, "float32")
        threshold = ops.cast(step_size, "float32") * strength * self._weights(w.shape, axes)
        return cast(rebuild(shrinkage.soft(norms, threshold)))

    def num_groups(self, shape, axes):
        """Returns the number of groups of a kernel of this shape."""
        shape, index_axes = self._layout(shape, axes)
        return math.prod(shape[axis] for axis in index_axes)

    def _layout(self, shape, axes):
        """Shape with the blocks of a grouped kernel apart, and the axes that run over units."""
        return unit_layout(shape, axes, self.axis)

    def _groups(self, w, axes):
        shape, index_axes = self._layout(w.shape, axes)
        norms, rebuild = views.groups(ops.reshape(w, shape), index_axes)
        return norms, lambda magnitudes: ops.reshape(rebuild(magnitudes), w.shape)

    def _weights(self, shape, axes):
        """Weight c_g of each group, a float or a tensor (1, number of groups)."""
        if not self.weighted:
            return 1.0
        return math.sqrt(views.group_size(*self._layout(shape, axes)))


@register
@dataclasses.dataclass(frozen=True)
class PartialGroupLasso(GroupLasso):
    """Group lasso on only some of the units: the others are free.

        R(w) = strength * sum over penalised g of c_g ||w_g||_2

    Since a network computes the same function when the units of a hidden layer are permuted, which
    units vanish does not matter, only how many; so the penalised ones can be fixed beforehand (E &
    Gao, 2019). That idea and its purpose are confirmed by the paper's abstract; the index set is
    not: `mode="subset"`, the first fraction of the units, is our reading.

    Args:
        strength: Number of at least 0: lambda.
        axis: "inputs" (default) or "outputs", as in `GroupLasso`.
        weighted: Whether a group counts by the square root of its size (default) or simply.
        fraction: Number in (0, 1]: fraction of the units that is penalised (rounded, at least
            one unit); it bounds how many can vanish. Default 0.5.
        mode: "subset".

    Example:
    >>> import numpy as np
    >>> w = np.array([[3.0, 4.0], [0.3, 0.4]], "float32")
    >>> float(PartialGroupLasso(1.0, fraction=0.5, weighted=False)(w))
    5.0
    """

    fraction: float = 0.5
    mode: str = "subset"

    def __post_init__(self):
        super().__post_init__()
        check_number("PartialGroupLasso", "fraction", self.fraction, 0.0, 1.0, low_open=True)
        check_choice("PartialGroupLasso", "mode", self.mode, ("subset",))

    def num_penalised(self, shape, axes):
        """Returns how many groups are penalised."""
        return max(1, round(self.fraction * self.num_groups(shape, axes)))

    def _weights(self, shape, axes):
        penalised = ops.arange(self.num_groups(shape, axes)) < self.num_penalised(shape, axes)
        return super()._weights(shape, axes) * ops.cast(penalised, "float32")[None, :]
