"""digits. Pruning: up to 90% of every kernel but the classifier's set to zero every 20 steps; no
mask persists.

  python -m apps.train --config=configs/digits_pruning.py \\
      --workdir=runs/digits_pruning

Run time: 34 s on 2 cores, besides 14 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 96.88 % (dense twin 97.21 %), 50,610 parameters
(50,610), LiteRT file 201 KB (201 KB), compressed by gzip 31 KB (185 KB), encoded weights 32 KB
(198 KB).
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
