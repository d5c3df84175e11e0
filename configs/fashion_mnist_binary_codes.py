"""Fashion-MNIST. Binary codes: every kernel as a sum of 2 planes of signs, scaled for each output,
every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_binary_codes.py \\
      --workdir=runs/fashion_mnist_binary_codes --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.binary_codes = common.rule(
        where=".*", every=200, compressor="BinaryCodeQuantization", bits=2, axis="outputs"
    )
    return config
