"""digits. Pruning: up to 90% of every kernel but the classifier's set to zero every 20 steps; no
mask persists.

  python -m apps.train --config=configs/digits_pruning.py \\
      --workdir=runs/digits_pruning

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.pruning = common.rule(
        where=None,
        every=20,
        compressor="MagnitudePruning",
        sparsity=0.9,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
