"""Fashion-MNIST. Nuclear norm by its proximal map every 100 steps, of the strength that leaves a
quarter of the parameters after 60% of the training.

  python -m apps.train --config=configs/fashion_mnist_steered_nuclear_norm.py \\
      --workdir=runs/fashion_mnist_steered_nuclear_norm --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.steered = common.rule(
        action="Proximal",
        every=100,
        regularizer="NuclearNorm",
        strength=1.0,
        controller={"parameters": 0.25, "end": "60%"},
    )
    return config
