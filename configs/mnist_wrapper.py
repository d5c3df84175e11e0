"""MNIST. Straight-through: layers run with kernels of low rank, 24% of their parameters, on a
basis refreshed every 100 steps.

  python -m apps.train --config=configs/mnist_wrapper.py \\
      --workdir=runs/mnist_wrapper --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.mnist("lenet_5")
    config.rules.wrapper = common.rule(
        where="conv2|dense1", action="StraightThrough", every=100, compressor="LowRank", ratio=0.24
    )
    return config
