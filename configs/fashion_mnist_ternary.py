"""Fashion-MNIST. Ternary weights: every kernel in minus one, zero and one, scaled for each output,
every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_ternary.py \\
      --workdir=runs/fashion_mnist_ternary --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.ternary = common.rule(
        where=".*", every=200, compressor="TernaryQuantization", axis="outputs"
    )
    return config
