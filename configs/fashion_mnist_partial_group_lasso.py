"""Fashion-MNIST. Group lasso on 60% of the neurons of each layer, with all that belongs to them, by
its proximal map at every step: those disappear, the others are free.

  python -m apps.train --config=configs/fashion_mnist_partial_group_lasso.py \\
      --workdir=runs/fashion_mnist_partial_group_lasso --data_dir=DIR

Run time: 50 s on 2 busy cores, besides 62 s for the dense twin, which is trained once. Result with
seed 0 on the TensorFlow backend: test accuracy 88.56 % (dense twin 89.43 %), 99,450 parameters
(266,610), LiteRT file 392 KB (1,045 KB), compressed by gzip 362 KB (966 KB), latency 4.1 µs (17.1
µs). Channels: dense1 300 -> 120, dense2 100 -> 40.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="PartialGroupLasso", strength=0.1, fraction=0.6
    )
    return config
