"""What acts while `fit` runs."""

from keras_compaware.training.callback import Assignment, CompressionCallback, Firing

__all__ = ["Assignment", "CompressionCallback", "Firing"]
