"""Layers: the straight-through wrapper."""

from keras_compaware.layers.compressed import Compressed

__all__ = ["Compressed"]
