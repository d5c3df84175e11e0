"""digits. Quantization: every kernel rounded to a uniform grid of 4 bits every 20 steps.

  python -m apps.train --config=configs/digits_quantization.py \\
      --workdir=runs/digits_quantization

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.quantization = common.rule(
        where=".*", every=20, compressor="UniformQuantization", bits=4
    )
    return config
