"""Fashion-MNIST. Weight noise, rare: uniform noise of standard deviation 0.02 on every kernel
every 200 steps, up to the last fifth. It regularizes and compresses nothing.

  python -m apps.train --config=configs/fashion_mnist_weight_noise.py \\
      --workdir=runs/fashion_mnist_weight_noise --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.noise = common.rule(
        where=".*", every=200, end="80%", compressor="WeightNoise", stddev=0.02
    )
    return config
