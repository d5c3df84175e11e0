"""Fashion-MNIST. Weight decay, rare and strong: every kernel is multiplied by 0.98 every 200
steps, up to the last fifth. It regularizes and compresses nothing.

  python -m apps.train --config=configs/fashion_mnist_weight_decay.py \\
      --workdir=runs/fashion_mnist_weight_decay --data_dir=DIR

Run time: 33 s on 2 cores, besides 26 s for the dense twin, which is trained once. Result with seed
0 on the TensorFlow backend: test accuracy 89.20 % (dense twin 89.43 %), 266,610 parameters
(266,610), LiteRT file 1,045 KB (1,045 KB), compressed by gzip 968 KB (966 KB), encoded weights
1,042 KB (1,042 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.rules.decay = common.rule(
        where=".*", every=200, end="80%", compressor="WeightDecay", rate=0.02
    )
    return config
