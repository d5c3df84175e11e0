"""Digits. Group lasso on 60% of the neurons of each layer, with all that belongs to them, by its
proximal map at every step: those disappear, the others are free.
"""

from configs import common


def get_config():
    config = common.digits()
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="PartialGroupLasso", strength=0.3, fraction=0.6
    )
    return config
