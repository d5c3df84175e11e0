"""Fashion-MNIST. Weight decay, rare and strong: every kernel is multiplied by 0.95 every 200
steps. It regularizes and compresses nothing.

  python -m apps.train --config=configs/fashion_mnist_weight_decay.py \\
      --workdir=runs/fashion_mnist_weight_decay --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.decay = common.rule(where=".*", every=200, compressor="WeightDecay", rate=0.05)
    return config
