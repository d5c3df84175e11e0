"""Fashion-MNIST. Quantization: every kernel rounded to a uniform grid of 3 bits every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_quantization.py --workdir=runs/fashion_mnist_quantization \\
      --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.quantization = common.rule(
        where=".*", every=200, compressor="UniformQuantization", bits=3
    )
    return config
