"""Compression-aware training for Keras 3: models learn to be small while they train."""

from keras_compaware import compressors, export, layers, measure, regularizers, scores
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
from keras_compaware.compaction import (
    CompactResult,
    RecoverResult,
    compact,
    fold_batch_norm,
    recalibrate_batch_norm,
    recover,
    shrink,
)
from keras_compaware.compressors import (
    BinaryCodeQuantization,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    NMPruning,
    TernaryQuantization,
    Tucker2,
    UniformQuantization,
    WeightClustering,
    WeightDecay,
    WeightNoise,
)
from keras_compaware.coupling import ChannelSpace, channel_spaces, register_channel_rule
from keras_compaware.kernels import find_targets, register_kernels
from keras_compaware.layers import Compressed
from keras_compaware.recipe import OccasionalCompression, Recipe, compress
from keras_compaware.regularizers import (
    L1,
    GroupLasso,
    LowRankGroupSparsity,
    NuclearNorm,
    PartialGroupLasso,
    SparseGroupLasso,
    TruncatedNuclearNorm,
)
from keras_compaware.rules import Plan, Rule
from keras_compaware.schedules import Ramp, StrengthController
from keras_compaware.scores import choose_channels, choose_ranks
from keras_compaware.search import Allocation, Sensitivity, fit_budget, sensitivity
from keras_compaware.training import CompressionCallback, CompressionOptimizer, Firing

__version__ = "0.1.0"

__all__ = [
    "L1",
    "Allocation",
    "AtEnd",
    "BinaryCodeQuantization",
    "Chain",
    "ChannelSpace",
    "Code",
    "CompactResult",
    "Compressed",
    "CompressionCallback",
    "CompressionOptimizer",
    "Compressor",
    "Every",
    "Firing",
    "GroupLasso",
    "GroupPruning",
    "KernelAxes",
    "LowRank",
    "LowRankGroupSparsity",
    "MagnitudePruning",
    "NMPruning",
    "NuclearNorm",
    "OccasionalCompression",
    "PartialGroupLasso",
    "Penalty",
    "Plan",
    "Proximal",
    "ProximalRegularizer",
    "Ramp",
    "Recipe",
    "RecoverResult",
    "Rule",
    "Sensitivity",
    "Skip",
    "SparseGroupLasso",
    "StraightThrough",
    "StrengthController",
    "Target",
    "TernaryQuantization",
    "TruncatedNuclearNorm",
    "Tucker2",
    "UniformQuantization",
    "WeightClustering",
    "WeightDecay",
    "WeightNoise",
    "channel_spaces",
    "choose_channels",
    "choose_ranks",
    "compact",
    "compress",
    "compressors",
    "export",
    "find_targets",
    "fit_budget",
    "fold_batch_norm",
    "layers",
    "measure",
    "recalibrate_batch_norm",
    "recover",
    "register_channel_rule",
    "register_kernels",
    "regularizers",
    "scores",
    "sensitivity",
    "shrink",
]
