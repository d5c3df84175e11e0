"""CIFAR-10, ResNet-20. Channels removed after training: half, then a quarter of the MACs, each
followed by further training.
"""

from configs import common


def get_config():
    config = common.cifar10("resnet_20")
    config.shrink.budget = {"macs": (0.5, 0.25)}
    config.shrink.epochs = 40
    return config
