"""Compressors: lossy codecs for one kernel, usable as Keras constraints."""

from keras_compaware.base import Chain
from keras_compaware.compressors.codebook import (
    BinaryCodeQuantization,
    TernaryQuantization,
    UniformQuantization,
    WeightClustering,
)
from keras_compaware.compressors.low_rank import LowRank
from keras_compaware.compressors.perturbation import WeightDecay, WeightNoise
from keras_compaware.compressors.pruning import GroupPruning, MagnitudePruning, NMPruning
from keras_compaware.compressors.tucker import Tucker2

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
