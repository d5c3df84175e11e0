"""Fashion-MNIST. Clustering: every kernel takes 16 values, found by k-means every 200 steps.

  python -m apps.train --config=configs/fashion_mnist_clustering.py \\
      --workdir=runs/fashion_mnist_clustering --data_dir=DIR

Run time: 72 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 88.68 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 174 KB (966 KB), encoded weights 134
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.clustering = common.rule(
        where=".*", every=200, compressor="WeightClustering", num_clusters=16
    )
    return config
