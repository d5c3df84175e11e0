"""Regularizers with proximal maps, usable as `kernel_regularizer=`."""

from keras_compaware.regularizers.group import GroupLasso, PartialGroupLasso
from keras_compaware.regularizers.low_rank import NuclearNorm

__all__ = ["GroupLasso", "NuclearNorm", "PartialGroupLasso"]
