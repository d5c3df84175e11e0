"""digits. Nuclear norm by its proximal map every 10 steps: singular values vanish, and the rank
with them.

  python -m apps.train --config=configs/digits_nuclear_norm.py \\
      --workdir=runs/digits_nuclear_norm

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.nuclear_norm = common.rule(
        where=None, action="Proximal", every=10, regularizer="NuclearNorm", strength=1.0
    )
    return config
