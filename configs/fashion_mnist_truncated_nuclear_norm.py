"""Fashion-MNIST. Truncated nuclear norm by its proximal map every 100 steps: the singular values
beyond the 24 largest vanish, the others are free.

  python -m apps.train --config=configs/fashion_mnist_truncated_nuclear_norm.py \\
      --workdir=runs/fashion_mnist_truncated_nuclear_norm --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.truncated = common.rule(
        action="Proximal",
        every=100,
        regularizer="TruncatedNuclearNorm",
        strength=1.0,
        target_rank=24,
    )
    return config
