"""Fashion-MNIST. Group lasso on all neurons, with all that belongs to them, by its proximal map at
every step, of the strength that leaves half of the neurons after 60% of the training.

  python -m apps.train --config=configs/fashion_mnist_steered_group_lasso.py \\
      --workdir=runs/fashion_mnist_steered_group_lasso --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.steered = common.rule(
        action="Proximal",
        regularizer="GroupLasso",
        strength=1.0,
        controller={"dead_groups": 0.5, "end": "60%"},
    )
    return config
