"""Fashion-MNIST. Partial group lasso on blocks: of the outgoing weights of 60% of the neurons only
those that lead to neurons which stay are penalised, by the proximal map at every step; the others
disappear with the neurons that they lead to.

  python -m apps.train --config=configs/fashion_mnist_partial_block.py \\
      --workdir=runs/fashion_mnist_partial_block --data_dir=DIR

RESULT
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    lasso = {"action": "Proximal", "regularizer": "PartialGroupLasso", "mode": "block"}
    lasso |= {"strength": 2.0, "fraction": 0.6}
    config.rules.hidden = common.rule(where="dense2", **lasso)
    config.rules.head = common.rule(where="head", next_fraction=0.0, **lasso)
    return config
