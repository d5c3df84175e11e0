"""Fashion-MNIST. Nuclear norm by its proximal map every 100 steps: singular values vanish, and the
rank with them.

  python -m apps.train --config=configs/fashion_mnist_nuclear_norm.py \\
      --workdir=runs/fashion_mnist_nuclear_norm --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.nuclear_norm = common.rule(
        where=None, action="Proximal", every=100, regularizer="NuclearNorm", strength=1.0
    )
    return config
