"""Fashion-MNIST. Pruning with a held mask: the sparsity ramps up to 90% every 100 steps of the
first half, zeros stay zero in between, and the second half heals.

  python -m apps.train --config=configs/fashion_mnist_held_pruning.py \\
      --workdir=runs/fashion_mnist_held_pruning --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=100,
        compressor="MagnitudePruning",
        sparsity=0.9,
        end="50%",
        ramp={"initial": 0.0},
        hold=True,
    )
    return config
