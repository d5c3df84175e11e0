"""Fashion-MNIST. Binary codes: every hidden kernel as a sum of 2 planes of signs, scaled for each
output, every 1,000 steps.

  python -m apps.train --config=configs/fashion_mnist_binary_codes.py \\
      --workdir=runs/fashion_mnist_binary_codes --data_dir=DIR

Run time: 26 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 86.73 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 133 KB (966 KB), encoded weights 75
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.binary_codes = common.rule(
        where="dense", every=1000, compressor="BinaryCodeQuantization", bits=2, axis="outputs"
    )
    return config
