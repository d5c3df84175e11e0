"""digits. Quantization: every kernel rounded to a uniform grid of 4 bits every 20 steps.

  python -m apps.train --config=configs/digits_quantization.py \\
      --workdir=runs/digits_quantization

Run time: 37 s on 2 cores, besides 14 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 95.09 % (dense twin 97.21 %), 50,610 parameters
(50,610), LiteRT file 201 KB (201 KB), compressed by gzip 41 KB (185 KB), encoded weights 28 KB
(198 KB).
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.quantization = common.rule(
        where=".*", every=20, compressor="UniformQuantization", bits=4
    )
    return config
