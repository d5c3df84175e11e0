"""Group lasso on some of the groups only."""

import dataclasses
import math

import numpy as np

from keras_compaware._math.axes import split_roles
from keras_compaware.base import check_choice, check_integer, check_number, register
from keras_compaware.regularizers._groups import GroupPenalty

_MODES = ("subset", "largest", "block")


@register
@dataclasses.dataclass(frozen=True)
class PartialGroupLasso(GroupPenalty):
    """Group lasso on only some of the groups: the others are free.

        R(w) = sum over penalised g of  strength * c_g ||w_g||_2 + l1_strength * ||w_g||_1

    and the proximal map of `SparseGroupLasso` (of `GroupLasso`, without `l1_strength`) on these.

    Since a network computes the same function when the units of a hidden layer are permuted, which
    units vanish does not matter, only how many; so the penalised ones can be fixed beforehand (E &
    Gao, 2019). That idea and its purpose, better accuracy than with everything penalised, are
    confirmed by the paper's abstract; the index set is not. These are our readings:

    - "subset": the groups of the first `fraction` of the units, or those in `indices`.
    - "block": of the rows of these candidates only the entries that lead to units which are no
      candidates of the next kernel themselves. The others need no penalty: they disappear with the
      unit that they lead to. So one kernel's candidates are its first `fraction` of the inputs,
      and of the outputs the first `next_fraction`; neighbouring kernels agree if the outputs of one
      are the inputs of the next, in their order (no Flatten with a window in between), and
      `next_fraction` is the next one's `fraction`: 0 for the kernel of the model's output, and
      before anything else whose rows are not penalised. `compact` removes a candidate when its
      penalised entries are zero and all candidates that it still leads to are removed.

    "largest" is not theirs but the bridge to pruning: the largest groups are free, at every step
    anew, and the `fraction` of smallest ones is penalised,

        R(w) = minimum over all choices of the penalised groups,

    whose proximal map spares the groups that would cost most, which are the largest if all have the
    same size. For large steps it becomes `GroupPruning(fraction)`. The penalty is not convex.

    A ramp drives `strength`, and `l1_strength` in proportion. On the channels of several weights
    (rules for `channels` of a `Recipe`) "block" has no meaning, since their columns are no
    units.

    Args:
        strength: Number of at least 0: lambda; above 0 if `l1_strength` is.
        fraction: Number in (0, 1]: fraction of the groups that is penalised (rounded, at least
            one group); it bounds how many can vanish. Default 0.5.
        axis: "inputs" (default) or "outputs", as in `GroupLasso`; "block" takes the first only.
        weighted: Whether a group counts by the square root of its size (default) or simply; of
            "block", by its penalised entries.
        mode: "subset" (default), "largest" or "block".
        l1_strength: Number of at least 0: lambda of the entries. Default 0.
        next_fraction: Of "block": number in [0, 1), the fraction of the outputs that are
            candidates themselves. Default None: the same as `fraction`.
        indices: Of "subset": tuple of different integers, the numbers of the penalised groups, in
            place of `fraction`. Default None.
        block: Pair of integers of at least 1: rows and columns of a tile, as in `GroupLasso`, for
            all modes but "block", which is about units. Default None: groups are units.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[3.0, 4.0], [0.3, 0.4]], "float32")
    >>> float(PartialGroupLasso(1.0, fraction=0.5, weighted=False)(w))
    5.0
    >>> pruning = PartialGroupLasso(1.0, fraction=0.5, mode="largest")
    >>> np.asarray(keras.ops.convert_to_numpy(pruning.prox(w, 100.0)))
    array([[3., 4.],
           [0., 0.]], dtype=float32)
    """

    strength: float
    fraction: float = 0.5
    axis: str = "inputs"
    weighted: bool = True
    mode: str = "subset"
    l1_strength: float = 0.0
    next_fraction: float | None = None
    indices: tuple | None = None
    block: tuple | None = None

    def __post_init__(self):
        name = type(self).__name__
        self._check()
        check_number(name, "fraction", self.fraction, 0.0, 1.0, low_open=True)
        check_choice(name, "mode", self.mode, _MODES)
        if self.indices is not None:
            self._check_indices(name)
        if self.mode == "block":
            self._check_submatrix(name)
        elif self.next_fraction is not None:
            raise ValueError(
                f"{name}: `next_fraction` belongs to mode='block'. "
                f"Received: mode={self.mode!r}, next_fraction={self.next_fraction!r}."
            )

    def num_penalised(self, shape, axes):
        """Returns how many groups are penalised."""
        if self.indices is not None:
            return len(self.indices)
        return _part(self.fraction, self.num_groups(shape, axes))

    def reason_to_skip(self, shape, axes):
        penalised = self._penalised(shape, axes)
        if penalised is None or penalised.any():
            return None
        return "no candidate for removal leads to a unit that is none"

    def _check_indices(self, name):
        if not isinstance(self.indices, (list, tuple)) or not self.indices:
            raise TypeError(
                f"{name}: `indices` must be a tuple of at least one integer. "
                f"Received: {self.indices!r}."
            )
        for index in self.indices:
            check_integer(name, "indices", index, 0)
        object.__setattr__(self, "indices", tuple(map(int, self.indices)))
        if len(set(self.indices)) < len(self.indices):
            raise ValueError(
                f"{name}: the `indices` must be different. Received: {self.indices!r}."
            )
        if self.mode != "subset" or self.fraction != 0.5:
            raise ValueError(
                f"{name}: `indices` say which groups are penalised, so leave `fraction` and `mode` "
                f"at their defaults. Received: fraction={self.fraction!r}, mode={self.mode!r}."
            )

    def _check_submatrix(self, name):
        if self.axis != "inputs" or self.block is not None:
            raise ValueError(
                f"{name}: mode='block' is about the outgoing weights of units: leave out `axis`"
                f" and `block`. Received: axis={self.axis!r}, block={self.block!r}."
            )
        check_number(name, "next_fraction", self.next_fraction, 0.0, 1.0, optional=True)
        if self._next_fraction == 1:
            raise ValueError(
                f"{name}: with mode='block' some outputs must be no candidates, or nothing is "
                "penalised: give a `next_fraction` below 1 (0 for the last kernel). Received: "
                f"fraction={self.fraction!r}, next_fraction={self.next_fraction!r}."
            )

    @property
    def _next_fraction(self):
        return self.fraction if self.next_fraction is None else self.next_fraction

    def _num_spared(self, shape, axes):
        if self.mode != "largest":
            return 0
        return self.num_groups(shape, axes) - self.num_penalised(shape, axes)

    def _penalised(self, shape, axes):
        if self.mode == "largest":
            return None
        if self.mode == "block":
            return self._submatrix(shape, axes)
        number = self.num_groups(shape, axes)
        chosen = np.zeros(number, bool)
        if self.indices is None:
            chosen[: self.num_penalised(shape, axes)] = True
        elif max(self.indices) < number:
            chosen[list(self.indices)] = True
        else:
            raise ValueError(
                f"PartialGroupLasso: the `indices` must be below the number of groups, which is "
                f"{number} for a kernel of shape {tuple(shape)}. Received: {self.indices!r}."
            )
        shape, units = self._layout(shape, axes)
        return chosen.reshape([s if axis in units else 1 for axis, s in enumerate(shape)])

    def _submatrix(self, shape, axes):
        """Candidates among the inputs x outputs that are none, both numbered as channels are."""
        shape, batch, rows, columns = split_roles(tuple(shape), axes, "channel")
        inputs = _numbers(shape, (*batch, *rows[len(axes.spatial) :]))
        outputs = _numbers(shape, (*batch, *columns))
        candidates = _part(self.fraction, inputs.size)
        going = _part(self._next_fraction, outputs.size) if self._next_fraction else 0
        return (inputs < candidates) & (outputs >= going)


def _part(fraction, number):
    return max(1, round(fraction * number))


def _numbers(shape, axes):
    """Numbers the places along some axes, the last one fastest; the other axes have size 1."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    sizes = [shape[axis] for axis in axes]
    places = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
    return places.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])
