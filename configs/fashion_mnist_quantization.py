"""Fashion-MNIST. Quantization: every kernel rounded to a uniform grid of 4 bits every 1,000 steps.

  python -m apps.train --config=configs/fashion_mnist_quantization.py \\
      --workdir=runs/fashion_mnist_quantization --data_dir=DIR

Run time: 27 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 88.48 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 175 KB (966 KB), encoded weights 133
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.quantization = common.rule(
        where=".*", every=1000, compressor="UniformQuantization", bits=4
    )
    return config
