"""Fashion-MNIST. Nuclear norm and group lasso together by their proximal maps every 100 steps,
singular values first: the rank falls, and input pixels and neurons lose all their weights.

  python -m apps.train --config=configs/fashion_mnist_low_rank_group_sparsity.py \\
      --workdir=runs/fashion_mnist_low_rank_group_sparsity --data_dir=DIR

RESULT
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
