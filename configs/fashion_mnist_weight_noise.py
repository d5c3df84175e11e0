"""Fashion-MNIST. Weight noise, rare: uniform noise of standard deviation 0.01 on every kernel
every 200 steps, up to the last fifth. It regularizes and compresses nothing.

  python -m apps.train --config=configs/fashion_mnist_weight_noise.py \\
      --workdir=runs/fashion_mnist_weight_noise --data_dir=DIR

Run time: 41 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 89.41 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 968 KB (966 KB), encoded weights
1,042 KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.noise = common.rule(
        where=".*", every=200, end="80%", compressor="WeightNoise", stddev=0.01
    )
    return config
