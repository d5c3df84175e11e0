"""Fashion-MNIST. Pruning: up to 90% of every kernel but the classifier's set to zero every 200
steps; no mask persists.

  python -m apps.train --config=configs/fashion_mnist_pruning.py \\
      --workdir=runs/fashion_mnist_pruning --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=200,
        compressor="MagnitudePruning",
        sparsity=0.9,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
