"""Fashion-MNIST. Nuclear norm by its proximal map every 100 steps: singular values vanish, and the
rank with them.

  python -m apps.train --config=configs/fashion_mnist_nuclear_norm.py \\
      --workdir=runs/fashion_mnist_nuclear_norm --data_dir=DIR

Run time: 34 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 88.44 % (dense twin 89.43 %), 89,794 parameters
(266,610), LiteRT file 355 KB (1,045 KB), compressed by gzip 330 KB (966 KB), encoded weights 1,042
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.nuclear_norm = common.rule(
        where=None, action="Proximal", every=100, regularizer="NuclearNorm", strength=1.0
    )
    return config
