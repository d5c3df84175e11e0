"""Fashion-MNIST. Sparse group lasso on all neurons, with all that belongs to them, by its proximal
map at every step: neurons disappear, and entries of those that stay become zero.

  python -m apps.train --config=configs/fashion_mnist_sparse_group_lasso.py \\
      --workdir=runs/fashion_mnist_sparse_group_lasso --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.lasso = common.rule(
        action="Proximal", regularizer="SparseGroupLasso", strength=0.05, l1_strength=0.01
    )
    return config
