"""Fashion-MNIST. Group lasso on all neurons, with all that belongs to them, by its proximal map at
every step, of the strength that leaves half of the neurons after 60% of the training.

  python -m apps.train --config=configs/fashion_mnist_steered_group_lasso.py \\
      --workdir=runs/fashion_mnist_steered_group_lasso --data_dir=DIR

Run time: 97 s on 2 busy cores, besides 107 s for the dense twin, which is trained once. Result with
seed 0 on the TensorFlow backend: test accuracy 87.15 % (dense twin 89.43 %), 109,058 parameters
(266,610), LiteRT file 429 KB (1,045 KB), compressed by gzip 399 KB (966 KB), encoded weights 427 KB
(1,042 KB). Channels: dense1 300 -> 126, dense2 100 -> 74.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.steered = common.rule(
        action="Proximal",
        regularizer="GroupLasso",
        strength=1.0,
        controller={"dead_groups": 0.5, "end": "60%"},
    )
    return config
