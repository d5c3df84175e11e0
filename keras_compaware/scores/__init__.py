"""How much every channel matters, and which channels and which ranks to keep for a budget."""

from keras_compaware.scores.choose import choose_channels
from keras_compaware.scores.from_data import Activation, Taylor
from keras_compaware.scores.from_weights import L1, L2, BatchNormScale, GeometricMedian, Random
from keras_compaware.scores.ranks import choose_ranks, cost_of_ranks
from keras_compaware.scores.score import ChannelScore

__all__ = [
    "L1",
    "L2",
    "Activation",
    "BatchNormScale",
    "ChannelScore",
    "GeometricMedian",
    "Random",
    "Taylor",
    "choose_channels",
    "choose_ranks",
    "cost_of_ranks",
]
