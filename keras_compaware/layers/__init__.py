"""Layers: the straight-through wrapper, and recurrent cells of low rank."""

from keras_compaware.layers.compressed import Compressed
from keras_compaware.layers.low_rank_cells import (
    LowRankGRUCell,
    LowRankLSTMCell,
    LowRankSimpleRNNCell,
)

__all__ = ["Compressed", "LowRankGRUCell", "LowRankLSTMCell", "LowRankSimpleRNNCell"]
