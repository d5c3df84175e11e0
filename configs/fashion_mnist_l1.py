"""Fashion-MNIST. L1 penalty by its proximal map at every step: entries become exactly zero.

  python -m apps.train --config=configs/fashion_mnist_l1.py \\
      --workdir=runs/fashion_mnist_l1 --data_dir=DIR

Run time: 220 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result
with seed 0 on the TensorFlow backend: test accuracy 88.38 % (dense twin 89.43 %), 249,795
parameters (266,610), LiteRT file 979 KB (1,045 KB), compressed by gzip 896 KB (966 KB), encoded
weights 976 KB (1,042 KB). Channels: dense1 300 -> 281.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.l1 = common.rule(action="Proximal", regularizer="L1", strength=0.05)
    return config
