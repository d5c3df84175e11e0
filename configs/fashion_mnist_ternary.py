"""Fashion-MNIST. Ternary weights: every hidden kernel in minus one, zero and one, scaled for each
output, every 1,000 steps.

  python -m apps.train --config=configs/fashion_mnist_ternary.py \\
      --workdir=runs/fashion_mnist_ternary --data_dir=DIR

Run time: 24 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 85.86 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 108 KB (966 KB), encoded weights 73
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.ternary = common.rule(
        where="dense", every=1000, compressor="TernaryQuantization", axis="outputs"
    )
    return config
