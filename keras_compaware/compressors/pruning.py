"""Pruning: some entries are kept as they are, the others become zero."""

import dataclasses
import math

from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware._math.axes import (
    matricise,
    matrix_shape,
    split_roles,
    tile,
    tile_shape,
    unit_layout,
)
from keras_compaware.base import (
    Code,
    Compressor,
    KernelAxes,
    as_kernel,
    check_choice,
    check_integer,
    check_number,
    check_pair,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class MagnitudePruning(Compressor):
    """Keeps the entries of largest magnitude and sets the others to zero.

    The map is the projection

        argmin_z ||z - w||^2   subject to   number of nonzeros of z <= k,

    with k = n - round(sparsity * n) of the n entries; ties go to the lower index, so that exactly
    k entries are kept (fewer are nonzero only if `w` has fewer nonzeros). It is idempotent.

    In the frequency paper (Lee et al., 2021) no mask persists: between two applications pruned
    weights move and may come back.

    Args:
        sparsity: Number in [0, 1): fraction of entries set to zero.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[3.0, -1.0], [0.5, -2.0]], "float32")
    >>> np.asarray(keras.ops.convert_to_numpy(MagnitudePruning(0.5)(w)))
    array([[ 3.,  0.],
           [ 0., -2.]], dtype=float32)
    """

    sparsity: float

    selects = True

    def __post_init__(self):
        _check_sparsity("MagnitudePruning", self.sparsity)

    @property
    def budget(self):
        return "sparsity"

    def __call__(self, w, axes=None, budget=None):
        w, _, cast = as_kernel(w, axes)
        return cast(ops.where(self._kept(w, budget), w, ops.zeros_like(w)))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        kept = self._kept(w, None)
        return Code(
            parts={"mask": kept, "values": ops.where(kept, w, ops.zeros_like(w))},
            bits={"mask": 1, "values": 32},
            payload={"values": axes},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
            counts={"values": self.num_kept(w.shape)},
            mask="mask",
            entrywise=("mask", "values"),
        )

    def decode(self, code):
        values = code.parts["values"]
        kept = ops.where(code.parts["mask"], values, ops.zeros_like(values))
        return ops.cast(kept, code.dtype)

    def num_kept(self, shape):
        """Returns the number of entries that are kept of a kernel of this shape."""
        size = math.prod(shape)
        return size - round(self.sparsity * size)

    def _kept(self, w, budget):
        if budget is None:
            keep = self.num_kept(w.shape)
        else:
            keep = _ramped_number(budget, math.prod(w.shape))
        magnitudes, _ = views.entries(w)
        return ops.reshape(shrinkage.largest(magnitudes, keep), w.shape)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NMPruning(Compressor):
    """Keeps N of every M consecutive weights, those of largest magnitude (N:M sparsity).

    The map is the projection

        argmin_z ||z - w||^2   subject to   at most `keep` nonzeros in every block of z.

    Blocks run down the rows of the kernel's channel matrix (window x inputs, inputs fastest), for
    each output by itself, as sparse matrix units read them: `keep=2, block=4` is the 2:4 pattern of
    Mishra et al. (2021, arXiv 2104.08378). Where `block` does not divide the number of rows, the
    last block is shorter and keeps as many as it has, up to `keep`. Ties go to the lower index; the
    map is idempotent.

    The code holds `keep` values and their positions for every block. A last block that has fewer
    is filled up with zeros, which are stored as well.

    Args:
        keep: Integer in [1, block): weights of a block that stay.
        block: Integer of at least 2: weights of a block.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[4.0, -3.0, 2.0, 1.0, 0.5, 0.6]], "float32").T
    >>> pruned = NMPruning(keep=2, block=4)(w)
    >>> np.asarray(keras.ops.convert_to_numpy(pruned)).T
    array([[ 4. , -3. ,  0. ,  0. ,  0.5,  0.6]], dtype=float32)
    """

    keep: int
    block: int

    selects = True

    def __post_init__(self):
        check_integer("NMPruning", "block", self.block, 2)
        check_integer("NMPruning", "keep", self.keep, 1)
        if self.keep >= self.block:
            raise ValueError(
                "NMPruning: `keep` must be below `block` (it is the number of weights that stay, "
                f"not of those that become zero). Received: keep={self.keep}, block={self.block}."
            )

    def __call__(self, w, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        blocks, join, _ = self._blocks(w, axes)
        return cast(join(ops.where(self._kept(blocks), blocks, ops.zeros_like(blocks))))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        blocks, _, (stack, number, columns) = self._blocks(w, axes)
        places = ops.expand_dims(ops.arange(self.block, dtype="int32"), -1)
        places = ops.where(self._kept(blocks), places, self.block)
        places = ops.sort(places, axis=1)[:, : self.keep]
        values = ops.take_along_axis(blocks, places, axis=1)
        places = ops.cast(places, "uint8" if self.block <= 256 else "int32")
        shape = (stack, number, self.keep, columns)
        return Code(
            parts={"values": ops.reshape(values, shape), "positions": ops.reshape(places, shape)},
            bits={"values": 32, "positions": math.ceil(math.log2(self.block))},
            payload={"values": KernelAxes(inputs=(1, 2), outputs=(3,))},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
        )

    def decode(self, code):
        _, join, (_, _, columns) = self._blocks(ops.zeros(code.shape, "float32"), code.axes)
        values, positions = (
            ops.reshape(code.parts[name], (-1, self.keep, columns))
            for name in ("values", "positions")
        )
        positions = ops.cast(positions, "int32")
        places = ops.expand_dims(ops.arange(self.block, dtype="int32"), -1)
        blocks = 0.0
        for slot in range(self.keep):
            here = places == positions[:, slot : slot + 1]
            blocks = blocks + ops.where(here, values[:, slot : slot + 1], 0.0)
        return ops.cast(join(blocks), code.dtype)

    def reason_to_skip(self, shape, axes):
        _, rows, _ = matrix_shape(shape, axes)
        if rows <= self.keep:
            return f"of blocks of {self.keep} weights all are kept (its matrix has {rows} rows)"
        return None

    def _blocks(self, w, axes):
        """Returns `(blocks (number, block, columns), join, (stack, blocks of one, columns))`."""
        matrix, fold = matricise(w, axes)
        stack, rows, columns = matrix.shape
        number = -(-rows // self.block)
        padded = ops.pad(matrix, ((0, 0), (0, number * self.block - rows), (0, 0)))

        def join(blocks):
            joined = ops.reshape(blocks, (stack, number * self.block, columns))
            return fold(joined[:, :rows])

        blocks = ops.reshape(padded, (stack * number, self.block, columns))
        return blocks, join, (stack, number, columns)

    def _kept(self, blocks):
        # A block's padding comes last, so that ties with a weight of zero go to the weight.
        magnitudes = ops.abs(ops.swapaxes(blocks, 1, 2))
        return ops.swapaxes(shrinkage.largest(magnitudes, self.keep), 1, 2)


@register
@dataclasses.dataclass(frozen=True)
class GroupPruning(Compressor):
    """Keeps the groups of weights of largest Euclidean norm and sets the others to zero.

    The map is the projection

        argmin_z ||z - w||^2   subject to   number of groups of z that are not zero <= k,

    with k = G - round(sparsity * G) of the G groups, at least one; ties go to the lower index. It
    is idempotent. Groups are those of `GroupLasso`: the outgoing weights of an input unit
    ("inputs") or the incoming weights of an output unit ("outputs": neurons, filters), along batch
    axes and in every block of a grouped convolution each by itself; or, with `block`, the tiles of
    the channel matrix (window x inputs, outputs), those at the edge padded with zeros, which are
    stored as well.

    The code holds the groups that are kept one below the other. Where the kernel consists of
    several linear maps, groups of different maps share the other axes of that array.

    Args:
        sparsity: Number in [0, 1): fraction of groups set to zero.
        axis: "inputs" (default) or "outputs"; None with `block`.
        block: Pair of integers of at least 1: rows and columns of a tile; larger ones are cut down
            to the matrix. Default None.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[3.0, -1.0], [0.5, -2.0]], "float32")
    >>> np.asarray(keras.ops.convert_to_numpy(GroupPruning(0.5)(w)))
    array([[ 3., -1.],
           [ 0.,  0.]], dtype=float32)
    """

    sparsity: float
    axis: str | None = None
    block: tuple | None = None

    selects = True

    def __post_init__(self):
        _check_sparsity("GroupPruning", self.sparsity)
        check_choice("GroupPruning", "axis", self.axis, (None, "inputs", "outputs"))
        if self.block is None:
            return
        if self.axis is not None:
            raise ValueError(
                "GroupPruning: give `axis` (groups are units) or `block` (groups are tiles), not "
                f"both. Received: axis={self.axis!r}, block={self.block!r}."
            )
        meaning = "rows and columns of a tile"
        block = check_pair("GroupPruning", "block", self.block, 1, meaning)
        object.__setattr__(self, "block", block)

    @property
    def budget(self):
        return "sparsity"

    def __call__(self, w, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        groups, join, _ = self._groups(w, axes)
        kept = _along_first(self._kept(groups, budget), groups)
        return cast(join(ops.where(kept, groups, ops.zeros_like(groups))))

    def encode(self, w, previous=None, axes=None, mask=None):
        dtype = w.dtype
        w, axes, _ = as_kernel(w, axes)
        groups, _, payload_axes = self._groups(w, axes)
        kept = self._kept(groups, None)
        number = groups.shape[0]
        places = ops.sort(ops.where(kept, ops.arange(number, dtype="int32"), number))
        places = ops.minimum(places[: self._num_kept(number)], number - 1)  # NaN is never kept
        values = ops.take(groups, places, axis=0)
        return Code(
            parts={"kept": kept, "values": values},
            bits={"kept": 1, "values": 32},
            payload={"values": payload_axes},
            shape=tuple(w.shape),
            dtype=dtype,
            axes=axes,
        )

    def decode(self, code):
        _, join, _ = self._groups(ops.zeros(code.shape, "float32"), code.axes)
        kept, values = code.parts["kept"], code.parts["values"]
        places = ops.cumsum(ops.cast(kept, "int32")) - 1
        groups = ops.take(values, ops.maximum(places, 0), axis=0)
        kept = _along_first(kept, groups)
        return ops.cast(join(ops.where(kept, groups, ops.zeros_like(groups))), code.dtype)

    def reason_to_skip(self, shape, axes):
        number = self.num_groups(shape, axes)
        if self._num_kept(number) == number:
            return f"a sparsity of {self.sparsity:g} removes none of its groups ({number})"
        return None

    def num_groups(self, shape, axes):
        """Returns the number of groups of a kernel of this shape."""
        if self.block is not None:
            return tile_shape(matrix_shape(shape, axes), self.block)[0]
        shape, units = unit_layout(shape, axes, self._role)
        return math.prod(shape[axis] for axis in units)

    def num_kept(self, shape, axes):
        """Returns the number of groups that are kept of a kernel of this shape."""
        return self._num_kept(self.num_groups(shape, axes))

    @property
    def _role(self):
        return self.axis or "inputs"

    def _num_kept(self, number):
        return max(1, number - round(self.sparsity * number))

    def _groups(self, w, axes):
        """Returns `(groups (number, ...), function that joins them again, axes of the groups)`."""
        if self.block is not None:
            matrix, fold = matricise(w, axes)
            tiles, join = tile(matrix, self.block)
            return tiles, lambda tiles: fold(join(tiles)), KernelAxes((1,), (2,))
        shape, units = unit_layout(w.shape, axes, self._role)
        rest = tuple(axis for axis in range(len(shape)) if axis not in units)
        order = (*units, *rest)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        moved = ops.transpose(ops.reshape(w, shape), order)
        groups = ops.reshape(moved, (-1, *(shape[axis] for axis in rest)))

        def join(groups):
            restored = ops.transpose(ops.reshape(groups, moved.shape), inverse)
            return ops.reshape(restored, w.shape)

        return groups, join, self._group_axes(w.shape, axes, rest)

    def _group_axes(self, shape, axes, rest):
        """The first axis of the stored groups runs over units, the others keep their roles."""
        _, _, rows, columns = split_roles(tuple(shape), axes, "channel")
        roles = {
            "inputs": rows[len(axes.spatial) :],
            "outputs": columns,
            "spatial": rows[: len(axes.spatial)],
        }
        places = {
            role: tuple(1 + rest.index(axis) for axis in found if axis in rest)
            for role, found in roles.items()
        }
        return KernelAxes(**{**places, self._role: (0,)})

    def _kept(self, groups, budget):
        number = groups.shape[0]
        if budget is None:
            keep = self._num_kept(number)
        else:
            keep = ops.maximum(_ramped_number(budget, number), 1)
        norms = views.safe_norm(groups, tuple(range(1, len(groups.shape))))
        return shrinkage.largest(ops.reshape(norms, (1, number)), keep)[0]


def _check_sparsity(owner, sparsity):
    check_number(owner, "sparsity", sparsity, 0.0, 1.0)
    if sparsity == 1.0:
        raise ValueError(
            f"{owner}: `sparsity` must be below 1 (1 would set every weight to zero). "
            "Received: 1.0. For a layer that should vanish, remove it from the model."
        )


def _ramped_number(sparsity, number):
    """How many of a number are kept at a sparsity that may be traced."""
    return number - ops.cast(ops.round(ops.cast(sparsity, "float32") * number), "int32")


def _along_first(mask, tensor):
    return ops.reshape(mask, (-1, *[1] * (len(tensor.shape) - 1)))
