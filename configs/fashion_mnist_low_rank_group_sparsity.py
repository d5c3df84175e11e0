"""Fashion-MNIST. Nuclear norm and group lasso together by their proximal maps every 100 steps,
singular values first: the rank falls, and input pixels and neurons lose all their weights.

  python -m apps.train --config=configs/fashion_mnist_low_rank_group_sparsity.py \\
      --workdir=runs/fashion_mnist_low_rank_group_sparsity --data_dir=DIR

Run time: 85 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result with
seed 0 on the TensorFlow backend: test accuracy 87.37 % (dense twin 89.43 %), 73,892 parameters
(266,610), LiteRT file 293 KB (1,045 KB), compressed by gzip 272 KB (966 KB), encoded weights 966 KB
(1,042 KB). Channels: dense1 300 -> 278. Layers: dense1 rank 64 of 278; dense2 rank 12 of 100.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.both = common.rule(
        action="Proximal",
        every=100,
        regularizer="LowRankGroupSparsity",
        strength=1.0,
        group_strength=0.02,
    )
    return config
