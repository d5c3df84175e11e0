"""digits. Group lasso by its proximal map every 5 steps: output units whose incoming weights
vanish.

  python -m apps.train --config=configs/digits_group_lasso.py \\
      --workdir=runs/digits_group_lasso

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.group_lasso = common.rule(
        where=None,
        action="Proximal",
        every=5,
        regularizer="GroupLasso",
        axis="outputs",
        strength=0.02,
    )
    return config
