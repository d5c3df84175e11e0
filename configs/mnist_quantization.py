"""MNIST. Quantization: every kernel rounded to a uniform grid of 4 bits every 200 steps.

  python -m apps.train --config=configs/mnist_quantization.py \\
      --workdir=runs/mnist_quantization --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.quantization = common.rule(
        where=".*", every=200, compressor="UniformQuantization", bits=4
    )
    return config
