"""Fashion-MNIST. Group pruning: up to 50% of the neurons lose all their incoming weights every 200
steps.

  python -m apps.train --config=configs/fashion_mnist_group_pruning.py \\
      --workdir=runs/fashion_mnist_group_pruning --data_dir=DIR

Run time: 37 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 89.16 % (dense twin 89.43 %), 184,010 parameters
(266,610), LiteRT file 723 KB (1,045 KB), compressed by gzip 619 KB (966 KB), encoded weights 525
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=200,
        compressor="GroupPruning",
        axis="outputs",
        sparsity=0.5,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
