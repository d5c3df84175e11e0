"""Compressors: lossy codecs for one kernel, usable as Keras constraints."""

from keras_compaware.base import Chain
from keras_compaware.compressors.codebook import UniformQuantization
from keras_compaware.compressors.low_rank import LowRank
from keras_compaware.compressors.pruning import MagnitudePruning

__all__ = ["Chain", "LowRank", "MagnitudePruning", "UniformQuantization"]
