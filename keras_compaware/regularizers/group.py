"""Group lasso and sparse group lasso."""

import dataclasses

from keras_compaware.base import register
from keras_compaware.regularizers._groups import GroupPenalty


@register
@dataclasses.dataclass(frozen=True)
class GroupLasso(GroupPenalty):
    """Penalises the Euclidean norm of groups of weights, so that whole groups become zero.

        R(w) = strength * sum_g c_g ||w_g||_2,     c_g = sqrt(size of g) or 1
        prox(w, t)_g = max(0, 1 - t * strength * c_g / ||w_g||_2) * w_g

    Groups are the outgoing weights of an input unit ("inputs", as in Scardapane et al., 2017: when
    such a row is zero, the unit before can be removed exactly) or the incoming weights of an
    output unit ("outputs": neurons, filters), along batch axes and in every block of a grouped
    convolution each by itself; or, with `block`, the tiles of the channel matrix (window x inputs,
    outputs). Tiles at its edge are smaller and count by their own size. Heads of attention as
    groups, with all weights of a head together, are what rules for `channels` of a `Recipe` offer.

    Args:
        strength: Number of at least 0: lambda.
        axis: "inputs" (default) or "outputs". Without meaning for tiles, where only the default
            is taken.
        weighted: Whether a group counts by the square root of its size (default) or simply.
        block: Pair of integers of at least 1: rows and columns of a tile; larger ones are cut down
            to the matrix. Default None: groups are units.

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
    block: tuple | None = None

    def __post_init__(self):
        self._check()


@register
@dataclasses.dataclass(frozen=True)
class SparseGroupLasso(GroupPenalty):
    """Group lasso and lasso: groups become zero, and single weights in the groups that stay.

        R(w) = strength * sum_g c_g ||w_g||_2 + l1_strength * sum_i |w_i|
        u = sign(w) * max(|w| - t * l1_strength, 0)
        prox(w, t)_g = max(0, 1 - t * strength * c_g / ||u_g||_2) * u_g

    This is the exact proximal map (Simon et al., 2013): entries first, groups of what is left
    second. The other order is not one. As in Scardapane et al. (2017) for the weights of networks.

    A ramp drives `strength`, and `l1_strength` in proportion, so that the whole penalty grows.

    Args:
        strength: Number of at least 0: lambda of the groups; above 0 if `l1_strength` is.
        l1_strength: Number of at least 0: lambda of the entries.
        axis: "inputs" (default) or "outputs", as in `GroupLasso`.
        weighted: Whether a group counts by the square root of its size (default) or simply.
        block: Pair of integers of at least 1: rows and columns of a tile, as in `GroupLasso`.
            Default None: groups are units.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[4.0, 5.0], [0.5, 2.0]], "float32")
    >>> regularizer = SparseGroupLasso(2.5, l1_strength=1.0, weighted=False)
    >>> np.asarray(keras.ops.convert_to_numpy(regularizer.prox(w, 1.0)))  # of [[3, 4], [0, 1]]
    array([[1.5, 2. ],
           [0. , 0. ]], dtype=float32)
    """

    strength: float
    l1_strength: float
    axis: str = "inputs"
    weighted: bool = True
    block: tuple | None = None

    def __post_init__(self):
        self._check()
