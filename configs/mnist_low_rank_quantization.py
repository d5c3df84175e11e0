"""MNIST. Low rank every 1,500 steps, and the two factors rounded to 8 bits at the end.

  python -m apps.train --config=configs/mnist_low_rank_quantization.py \\
      --workdir=runs/mnist_low_rank_quantization --data_dir=DIR

Run time: not measured yet.
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
