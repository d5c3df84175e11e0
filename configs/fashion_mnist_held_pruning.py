"""Fashion-MNIST. Pruning with a held mask: the sparsity ramps up to 90% every 100 steps of the
first half, zeros stay zero in between, and the second half heals.

  python -m apps.train --config=configs/fashion_mnist_held_pruning.py \\
      --workdir=runs/fashion_mnist_held_pruning --data_dir=DIR

Run time: 48 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 88.85 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 139 KB (966 KB), encoded weights 143
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=100,
        compressor="MagnitudePruning",
        sparsity=0.9,
        end="50%",
        ramp={"initial": 0.0},
        hold=True,
    )
    return config
