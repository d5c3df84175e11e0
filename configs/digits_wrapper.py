"""digits. Straight-through: layers run with kernels of low rank, 20% of their parameters, on a
basis refreshed every 20 steps.

  python -m apps.train --config=configs/digits_wrapper.py \\
      --workdir=runs/digits_wrapper

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.wrapper = common.rule(
        where=None, action="StraightThrough", every=20, compressor="LowRank", ratio=0.2
    )
    return config
