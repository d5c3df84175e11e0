"""CIFAR-10, ResNet-32. Tucker-2: the 3x3 convolutions of the blocks in 49% of their parameters
every 200 steps.

  python -m apps.train --config=configs/cifar10_tucker.py \\
      --workdir=runs/cifar10_tucker --data_dir=DIR

Run time: not run in full. Run to the end, on the TensorFlow backend, in 16 steps on 1,000
images of 8x8 pixels, which says nothing about accuracy, by adding

      --config.epochs=2 --config.data.validation=0.98 --config.data.image_size="(8,8)" \\
      --config.rules.tucker.every=4 --config.recalibrate_steps=2
"""

from configs import common


def get_config():
    config = common.cifar10("resnet_32")
    config.rules.tucker = common.rule(
        where=r"block\d+_conv\d", every=200, compressor="Tucker2", ratio=0.49
    )
    return config
