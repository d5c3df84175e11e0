"""Fashion-MNIST. Partial group lasso on blocks: of the outgoing weights of 60% of the neurons only
those that lead to neurons which stay are penalised, by the proximal map at every step; the others
disappear with the neurons that they lead to.

  python -m apps.train --config=configs/fashion_mnist_partial_block.py \\
      --workdir=runs/fashion_mnist_partial_block --data_dir=DIR

Run time: 91 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result with
seed 0 on the TensorFlow backend: test accuracy 88.57 % (dense twin 89.43 %), 99,450 parameters
(266,610), LiteRT file 392 KB (1,045 KB), compressed by gzip 362 KB (966 KB), encoded weights 389 KB
(1,042 KB). Channels: dense1 300 -> 120, dense2 100 -> 40.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    lasso = {"action": "Proximal", "regularizer": "PartialGroupLasso", "mode": "block"}
    lasso |= {"strength": 2.0, "fraction": 0.6}
    config.rules.hidden = common.rule(where="dense2", **lasso)
    config.rules.head = common.rule(where="head", next_fraction=0.0, **lasso)
    return config
