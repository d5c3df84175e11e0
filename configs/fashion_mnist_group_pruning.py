"""Fashion-MNIST. Group pruning: up to 50% of the neurons lose all their incoming weights every 200
steps.

  python -m apps.train --config=configs/fashion_mnist_group_pruning.py \\
      --workdir=runs/fashion_mnist_group_pruning --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=200,
        compressor="GroupPruning",
        axis="outputs",
        sparsity=0.5,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
