"""MNIST. Group lasso by its proximal map every 20 steps: output units whose incoming weights
vanish.

  python -m apps.train --config=configs/mnist_group_lasso.py \\
      --workdir=runs/mnist_group_lasso --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.group_lasso = common.rule(
        where=None,
        action="Proximal",
        every=20,
        regularizer="GroupLasso",
        axis="outputs",
        strength=0.04,
    )
    return config
