"""Fashion-MNIST. N:M pruning: of every four weights along the inputs two are kept, every 200
steps.

  python -m apps.train --config=configs/fashion_mnist_nm_pruning.py \\
      --workdir=runs/fashion_mnist_nm_pruning --data_dir=DIR

Run time: 38 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 89.05 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 575 KB (966 KB), encoded weights 557
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.pruning = common.rule(
        where=None, every=200, compressor="NMPruning", keep=2, block=4
    )
    return config
