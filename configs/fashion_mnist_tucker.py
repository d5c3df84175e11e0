"""Fashion-MNIST. Tucker-2: the wider convolutions in 30% of their parameters every 1,500 steps.

  python -m apps.train --config=configs/fashion_mnist_tucker.py \\
      --workdir=runs/fashion_mnist_tucker --data_dir=DIR

Run time: 343 s on 2 cores, besides 385 s for the dense twin, which is trained once. Result with
seed 0 on the TensorFlow backend: test accuracy 91.03 % (dense twin 91.97 %), 46,051 parameters
(111,146), LiteRT file 183 KB (436 KB), compressed by gzip 167 KB (403 KB), encoded weights 183 KB
(436 KB).
"""

from configs import common


def get_config():
    config = common.fashion_mnist("small_cnn")
    config.rules.tucker = common.rule(where="conv[23]", every=1500, compressor="Tucker2", ratio=0.3)
    return config
