"""Fashion-MNIST. N:M pruning: of every four weights along the inputs two are kept, every 200
steps.

  python -m apps.train --config=configs/fashion_mnist_nm_pruning.py \\
      --workdir=runs/fashion_mnist_nm_pruning --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None, every=200, compressor="NMPruning", keep=2, block=4
    )
    return config
