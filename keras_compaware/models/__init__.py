"""Small reference networks, and `build`, which also takes a file or a function of your own."""

from keras_compaware.models.building import build, names
from keras_compaware.models.cnn import small_cnn
from keras_compaware.models.lenet import lenet_5, lenet_300_100
from keras_compaware.models.mobilenet import mobilenet_v2_small
from keras_compaware.models.resnet import resnet_20, resnet_32, resnet_56, resnet_cifar
from keras_compaware.models.unet import unet

__all__ = [
    "build",
    "lenet_5",
    "lenet_300_100",
    "mobilenet_v2_small",
    "names",
    "resnet_20",
    "resnet_32",
    "resnet_56",
    "resnet_cifar",
    "small_cnn",
    "unet",
]
