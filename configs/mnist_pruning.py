"""MNIST. Pruning: up to 90% of every kernel but the classifier's set to zero every 200 steps; no
mask persists.

  python -m apps.train --config=configs/mnist_pruning.py \\
      --workdir=runs/mnist_pruning --data_dir=DIR

Run time: 24 s on 2 cores, besides 22 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 98.10 % (dense twin 98.20 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 137 KB (965 KB), encoded weights 143
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=200,
        compressor="MagnitudePruning",
        sparsity=0.9,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
