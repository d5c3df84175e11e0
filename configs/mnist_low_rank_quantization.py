"""MNIST. Low rank every 1,500 steps, and the two factors rounded to 8 bits at the end.

  python -m apps.train --config=configs/mnist_low_rank_quantization.py \\
      --workdir=runs/mnist_low_rank_quantization --data_dir=DIR

Run time: 21 s on 2 cores, besides 22 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 98.16 % (dense twin 98.20 %), 64,978 parameters
(266,610), LiteRT file 258 KB (1,045 KB), compressed by gzip 143 KB (965 KB), encoded weights 72 KB
(1,042 KB).
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.low_rank = common.rule(
        where=None,
        every=1500,
        compressor="LowRank",
        ratio=0.24,
        at_end={"compressor": "UniformQuantization", "bits": 8, "axis": "outputs"},
    )
    return config
