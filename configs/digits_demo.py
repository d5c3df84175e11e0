"""placeholder header"""

from configs import common


def get_config():
    config = common.digits()
    config.rules.low_rank = common.rule(where=None, every=20, compressor="LowRank", ratio=0.2)
    return config
