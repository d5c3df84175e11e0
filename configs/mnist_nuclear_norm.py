"""MNIST. Nuclear norm by its proximal map every 100 steps: singular values vanish, and the rank
with them.

  python -m apps.train --config=configs/mnist_nuclear_norm.py \\
      --workdir=runs/mnist_nuclear_norm --data_dir=DIR

Run time: 23 s on 2 cores, besides 22 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 98.01 % (dense twin 98.20 %), 100,918 parameters
(266,610), LiteRT file 398 KB (1,045 KB), compressed by gzip 371 KB (965 KB), encoded weights 1,042
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.nuclear_norm = common.rule(
        where=None, action="Proximal", every=100, regularizer="NuclearNorm", strength=1.0
    )
    return config
