"""Fashion-MNIST. Sparse group lasso on all neurons, with all that belongs to them, by its proximal
map at every step: neurons disappear, and entries of those that stay become zero.

  python -m apps.train --config=configs/fashion_mnist_sparse_group_lasso.py \\
      --workdir=runs/fashion_mnist_sparse_group_lasso --data_dir=DIR

Run time: 205 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result
with seed 0 on the TensorFlow backend: test accuracy 87.81 % (dense twin 89.43 %), 105,423
parameters (266,610), LiteRT file 415 KB (1,045 KB), compressed by gzip 392 KB (966 KB), encoded
weights 412 KB (1,042 KB). Channels: dense1 300 -> 121, dense2 100 -> 79.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.lasso = common.rule(
        action="Proximal", regularizer="SparseGroupLasso", strength=0.03, l1_strength=0.01
    )
    return config
