"""CIFAR-10, ResNet-20. Channels removed after training: half, then a quarter of the MACs is left,
each followed by further training.

  python -m apps.train --config=configs/cifar10_shrink.py \\
      --workdir=runs/cifar10_shrink --data_dir=DIR

Not run in full: 64,064 steps, and 40 epochs after each cut. With --config.epochs=20
--config.shrink.epochs=5, an hour on 2 busy cores, seed 0, TensorFlow backend, test accuracy by
Keras: trained 87.02 %; cut to half of the MACs 61.17 %, trained further 84.85 %; cut to a quarter
24.61 %, trained further 78.88 %.
"""

from configs import common


def get_config():
    config = common.cifar10("resnet_20")
    config.shrink.budget = {"macs": (0.5, 0.25)}
    config.shrink.epochs = 40
    return config
