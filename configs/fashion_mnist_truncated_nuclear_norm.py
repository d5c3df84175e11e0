"""Fashion-MNIST. Truncated nuclear norm by its proximal map every 100 steps: the singular values
beyond the 24 largest vanish, the others are free.

  python -m apps.train --config=configs/fashion_mnist_truncated_nuclear_norm.py \\
      --workdir=runs/fashion_mnist_truncated_nuclear_norm --data_dir=DIR

Run time: 255 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result
with seed 0 on the TensorFlow backend: test accuracy 88.36 % (dense twin 89.43 %), 38,110 parameters
(266,610), LiteRT file 153 KB (1,045 KB), compressed by gzip 140 KB (966 KB), encoded weights 1,042
KB (1,042 KB). Layers: dense1 rank 25 of 300; dense2 rank 24 of 100.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.truncated = common.rule(
        action="Proximal",
        every=100,
        regularizer="TruncatedNuclearNorm",
        strength=4.0,
        target_rank=24,
    )
    return config
