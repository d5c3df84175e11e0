"""MNIST. Quantization: every kernel rounded to a uniform grid of 4 bits every 200 steps.

  python -m apps.train --config=configs/mnist_quantization.py \\
      --workdir=runs/mnist_quantization --data_dir=DIR

Run time: 26 s on 2 cores, besides 22 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 97.73 % (dense twin 98.20 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 188 KB (965 KB), encoded weights 133
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.quantization = common.rule(
        where=".*", every=200, compressor="UniformQuantization", bits=4
    )
    return config
