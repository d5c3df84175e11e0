"""Fashion-MNIST. Group lasso by its proximal map every 20 steps: output units whose incoming
weights vanish.

  python -m apps.train --config=configs/fashion_mnist_group_lasso.py \\
      --workdir=runs/fashion_mnist_group_lasso --data_dir=DIR

Run time: 37 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 87.81 % (dense twin 89.43 %), 224,362 parameters
(266,610), LiteRT file 880 KB (1,045 KB), compressed by gzip 790 KB (966 KB), encoded weights 1,042
KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="GroupLasso", strength=0.02
    )
    return config
