"""digits. Low rank every 20 steps, and the two factors rounded to 8 bits at the end.

  python -m apps.train --config=configs/digits_low_rank_quantization.py \\
      --workdir=runs/digits_low_rank_quantization

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.low_rank = common.rule(
        where=None,
        every=20,
        compressor="LowRank",
        ratio=0.2,
        at_end={"compressor": "UniformQuantization", "bits": 8, "axis": "outputs"},
    )
    return config
