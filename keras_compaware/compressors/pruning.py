"""Pruning: some entries are kept as they are, the others become zero."""

import dataclasses
import math

from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware.base import Code, Compressor, as_kernel, check_number, register


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
        check_number("MagnitudePruning", "sparsity", self.sparsity, 0.0, 1.0)
        if self.sparsity == 1.0:
            raise ValueError(
                "MagnitudePruning: `sparsity` must be below 1 (1 would set every weight to zero). "
                "Received: 1.0. For a layer that should vanish, remove it from the model."
            )

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
            size = math.prod(w.shape)
            zeros = ops.round(ops.cast(budget, "float32") * size)
            keep = size - ops.cast(zeros, "int32")
        magnitudes, _ = views.entries(w)
        return ops.reshape(shrinkage.largest(magnitudes, keep), w.shape)
