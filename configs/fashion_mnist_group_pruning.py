"""Fashion-MNIST. Group pruning: up to 50% of the neurons lose all their weights, incoming and
outgoing, every 200 steps; they are removed in the end.
"""

from configs import common


def get_config():
    config = common.fashion_mnist()
    config.channels.pruning = common.rule(
        every=200,
        compressor="GroupPruning",
        sparsity=0.5,
        ramp={"initial": 0.0, "end": "50%"},
    )
    return config
