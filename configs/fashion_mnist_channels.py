"""Fashion-MNIST, LeNet-5. Group lasso on half of the channels and neurons of each layer, with all
that belongs to them, by its proximal map at every step: those disappear, the others are free.
"""

from configs import common


def get_config():
    config = common.fashion_mnist("lenet_5")
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="PartialGroupLasso", strength=0.03, fraction=0.5
    )
    return config
