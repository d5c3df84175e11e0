"""Fashion-MNIST. Group lasso on the 60% of the neurons that are smallest at the time, by its
proximal map at every step: those disappear, the largest ones are free.

  python -m apps.train --config=configs/fashion_mnist_partial_largest.py \\
      --workdir=runs/fashion_mnist_partial_largest --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.lasso = common.rule(
        action="Proximal",
        regularizer="PartialGroupLasso",
        strength=0.1,
        fraction=0.6,
        mode="largest",
    )
    return config
