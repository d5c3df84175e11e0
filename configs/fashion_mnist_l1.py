"""Fashion-MNIST. L1 penalty by its proximal map at every step: entries become exactly zero.

  python -m apps.train --config=configs/fashion_mnist_l1.py \\
      --workdir=runs/fashion_mnist_l1 --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.l1 = common.rule(action="Proximal", regularizer="L1", strength=0.05)
    return config
