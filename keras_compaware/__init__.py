"""Compression-aware training for Keras 3: models learn to be small while they train."""

from keras_compaware import compressors, export, layers, measure, regularizers
from keras_compaware.base import (
    AtEnd,
    Chain,
    Code,
    Compressor,
    Every,
    KernelAxes,
    Penalty,
    Proximal,
    ProximalRegularizer,
    Skip,
    StraightThrough,
    Target,
)
from keras_compaware.compaction import CompactResult, compact, recalibrate_batch_norm
from keras_compaware.compressors import LowRank, MagnitudePruning, UniformQuantization
from keras_compaware.kernels import find_targets, register_kernels
from keras_compaware.layers import Compressed
from keras_compaware.recipe import OccasionalCompression, Plan, Recipe, Rule, compress
from keras_compaware.regularizers import GroupLasso, NuclearNorm, PartialGroupLasso
from keras_compaware.schedules import Ramp
from keras_compaware.training import CompressionCallback, Firing

__version__ = "0.1.0"

__all__ = [
    "AtEnd",
    "Chain",
    "Code",
    "CompactResult",
    "Compressed",
    "CompressionCallback",
    "Compressor",
    "Every",
    "Firing",
    "GroupLasso",
    "KernelAxes",
    "LowRank",
    "MagnitudePruning",
    "NuclearNorm",
    "OccasionalCompression",
    "PartialGroupLasso",
    "Penalty",
    "Plan",
    "Proximal",
    "ProximalRegularizer",
    "Ramp",
    "Recipe",
    "Rule",
    "Skip",
    "StraightThrough",
    "Target",
    "UniformQuantization",
    "compact",
    "compress",
    "compressors",
    "export",
    "find_targets",
    "layers",
    "measure",
    "recalibrate_batch_norm",
    "register_kernels",
    "regularizers",
]
