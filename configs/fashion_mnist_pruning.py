"""Fashion-MNIST. Pruning: up to 90% of every kernel but the classifier's set to zero every 200
steps; no mask persists.

  python -m apps.train --config=configs/fashion_mnist_pruning.py \\
      --workdir=runs/fashion_mnist_pruning --data_dir=DIR

Run time: 23 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 88.15 % (dense twin 89.36 %), 248,025 parameters, since
some inputs are read by no unit any more (266,610), LiteRT file 972 KB (1,045 KB), compressed by
gzip 135 KB (966 KB), encoded weights 140 KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None,
        every=200,
        compressor="MagnitudePruning",
        sparsity=0.9,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
