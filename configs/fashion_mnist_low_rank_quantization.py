"""Fashion-MNIST. Low rank every 1,500 steps, and the two factors rounded to 8 bits at the end.

  python -m apps.train --config=configs/fashion_mnist_low_rank_quantization.py \\
      --workdir=runs/fashion_mnist_low_rank_quantization --data_dir=DIR

Run time: 31 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 89.16 % (dense twin 89.43 %), 64,978 parameters
(266,610), LiteRT file 258 KB (1,045 KB), compressed by gzip 141 KB (966 KB), encoded weights 72 KB
(1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.low_rank = common.rule(
        where=None,
        every=1500,
        compressor="LowRank",
        ratio=0.24,
        at_end={"compressor": "UniformQuantization", "bits": 8, "axis": "outputs"},
    )
    return config
