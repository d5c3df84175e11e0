"""CIFAR-10, ResNet-20. Low rank: the 3x3 convolutions of the blocks truncated to 50% of their
parameters every 200 steps.

  python -m apps.train --config=configs/cifar10_low_rank.py \\
      --workdir=runs/cifar10_low_rank --data_dir=DIR

Run time: not run in full: 64,064 steps. The first 80 took about 0.5 s each on 2 busy cores and had
a training accuracy of 31 % on average (TensorFlow backend). Run to the end, on TensorFlow and JAX,
in 16 steps on 1,000 images of 8x8 pixels, which says nothing about accuracy, by adding

      --config.epochs=2 --config.data.validation=0.98 --config.data.image_size="(8,8)" \\
      --config.rules.low_rank.every=4 --config.recalibrate_steps=2
"""

from configs import common


def get_config():
    config = common.cifar10("resnet_20")
    config.rules.low_rank = common.rule(
        where=r"block\d+_conv\d", every=200, compressor="LowRank", ratio=0.5
    )
    return config
