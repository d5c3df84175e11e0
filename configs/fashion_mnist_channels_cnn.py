"""Fashion-MNIST, a small network with batch normalisation. Group lasso on half of the channels and
neurons of each layer, with all that belongs to them, by its proximal map at every step: those
disappear, the others are free.
"""

from configs import common


def get_config():
    config = common.fashion_mnist("small_cnn")
    config.epochs = 8
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="PartialGroupLasso", strength=0.03, fraction=0.5
    )
    return config
