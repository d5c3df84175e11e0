"""Fashion-MNIST. Clustering: every kernel takes 16 values, found by k-means every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_clustering.py \\
      --workdir=runs/fashion_mnist_clustering --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.clustering = common.rule(
        where=".*", every=200, compressor="WeightClustering", num_clusters=16
    )
    return config
