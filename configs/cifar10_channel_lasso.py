"""CIFAR-10, ResNet-20. Group lasso on all that belongs to a channel, by its proximal map at every
step; then channels are removed as in cifar10_shrink.

  python -m apps.train --config=configs/cifar10_channel_lasso.py \\
      --workdir=runs/cifar10_channel_lasso --data_dir=DIR

Not run in full: 64,064 steps, and 40 epochs after each cut. With --config.epochs=20
--config.shrink.epochs=5, an hour on 2 busy cores, seed 0, TensorFlow backend, test accuracy by
Keras: trained 87.62 %; cut to half of the MACs 69.67 %, trained further 86.39 %; cut to a quarter
39.14 %, trained further 83.54 %.
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
