"""Fashion-MNIST. Tucker-2: the wider convolutions in 30% of their parameters every 1,500 steps.

  python -m apps.train --config=configs/fashion_mnist_tucker.py \\
      --workdir=runs/fashion_mnist_tucker --data_dir=DIR

Run time: not measured yet.
"""

from configs import common


def get_config():
    config = common.fashion_mnist("small_cnn")
    config.rules.tucker = common.rule(where="conv[23]", every=1500, compressor="Tucker2", ratio=0.3)
    return config
