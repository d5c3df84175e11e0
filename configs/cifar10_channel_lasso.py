"""CIFAR-10, ResNet-20. Group lasso on all that belongs to a channel, by its proximal map at every
step; then channels removed as in cifar10_shrink.
"""

from configs import common


def get_config():
    config = common.cifar10("resnet_20")
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="GroupLasso", strength=2e-4
    )
    config.shrink.budget = {"macs": (0.5, 0.25)}
    config.shrink.epochs = 40
    return config
