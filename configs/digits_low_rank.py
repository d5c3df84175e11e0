"""digits. Low rank: every kernel but the classifier's truncated to 20% of its parameters every 20
steps.

  python -m apps.train --config=configs/digits_low_rank.py \\
      --workdir=runs/digits_low_rank

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.low_rank = common.rule(where=None, every=20, compressor="LowRank", ratio=0.2)
    return config
