"""Fashion-MNIST. Low rank: every kernel but the classifier's truncated to 24% of its parameters
every 1,500 steps.

  python -m apps.train --config=configs/fashion_mnist_low_rank.py \\
      --workdir=runs/fashion_mnist_low_rank --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.low_rank = common.rule(where=None, every=1500, compressor="LowRank", ratio=0.24)
    return config
