"""Regularizers with proximal maps, usable as `kernel_regularizer=`."""

from keras_compaware.regularizers.combined import LowRankGroupSparsity
from keras_compaware.regularizers.entries import L1
from keras_compaware.regularizers.group import GroupLasso, SparseGroupLasso
from keras_compaware.regularizers.low_rank import NuclearNorm, TruncatedNuclearNorm
from keras_compaware.regularizers.partial import PartialGroupLasso

__all__ = [
    "L1",
    "GroupLasso",
    "LowRankGroupSparsity",
    "NuclearNorm",
    "PartialGroupLasso",
    "SparseGroupLasso",
    "TruncatedNuclearNorm",
]
