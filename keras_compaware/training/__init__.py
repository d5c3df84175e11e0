"""What acts while `fit` runs."""

from keras_compaware.training.callback import Assignment, CompressionCallback, Firing
from keras_compaware.training.optimizer import CompressionOptimizer

__all__ = ["Assignment", "CompressionCallback", "CompressionOptimizer", "Firing"]
