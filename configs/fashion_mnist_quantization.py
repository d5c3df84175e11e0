"""Fashion-MNIST. Quantization: every kernel rounded to a uniform grid of 4 bits every 1,000 steps.

  python -m apps.train --config=configs/fashion_mnist_quantization.py \\
      --workdir=runs/fashion_mnist_quantization --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.quantization = common.rule(
        where=".*", every=1000, compressor="UniformQuantization", bits=4
    )
    return config
