"""Fashion-MNIST. Quantization: every kernel rounded to a uniform grid of 4 bits every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_quantization.py \\
      --workdir=runs/fashion_mnist_quantization --data_dir=DIR

Run time: 39 s on 2 cores, besides 35 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 87.97 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 190 KB (966 KB), encoded weights 132
KB (1,041 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.quantization = common.rule(
        where=".*", every=200, compressor="UniformQuantization", bits=4
    )
    return config
