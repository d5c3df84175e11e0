"""Compressors: lossy codecs for one kernel, usable as Keras constraints."""

from keras_compaware.base import Chain
from keras_compaware.compressors.codebook import (
    BinaryCodeQuantization,
    TernaryQuantization,
    UniformQuantization,
    WeightClustering,
)
from keras_compaware.compressors.low_rank import LowRank, Tucker2
from keras_compaware.compressors.perturbation import WeightDecay, WeightNoise
from keras_compaware.compressors.pruning import GroupPruning, MagnitudePruning, NMPruning

__all__ = [
    "BinaryCodeQuantization",
    "Chain",
    "GroupPruning",
    "LowRank",
    "MagnitudePruning",
    "NMPruning",
    "TernaryQuantization",
    "Tucker2",
    "UniformQuantization",
    "WeightClustering",
    "WeightDecay",
    "WeightNoise",
]
