"""Small reference networks, and `build`, which also takes a file or a function of your own."""

from keras_compaware.models.building import build, names
from keras_compaware.models.cnn import small_cnn
from keras_compaware.models.lenet import lenet_5, lenet_300_100

__all__ = ["build", "lenet_5", "lenet_300_100", "names", "small_cnn"]
