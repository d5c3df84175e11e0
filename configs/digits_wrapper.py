"""digits. Straight-through: layers run with kernels of low rank, 20% of their parameters, on a
basis refreshed every 20 steps.

  python -m apps.train --config=configs/digits_wrapper.py \\
      --workdir=runs/digits_wrapper

Run time: 29 s on 2 cores, besides 14 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 97.21 % (dense twin 97.21 %), 11,050 parameters
(50,610), LiteRT file 47 KB (201 KB), compressed by gzip 42 KB (185 KB), encoded weights 45 KB (198
KB).
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.wrapper = common.rule(
        where=None, action="StraightThrough", every=20, compressor="LowRank", ratio=0.2
    )
    return config
