"""Digits, a small LeNet-300-100: how often to prune and to truncate, in miniature.

python -m apps.sweep --config=configs/sweeps/digits.py --workdir=runs/sweep_digits
"""

from ml_collections import ConfigDict

from configs import common


def get_config():
    config = common.digits()
    config.model_args = ConfigDict({"units": (64, 32)})
    config.sweep = ConfigDict(sort_keys=False)
    config.sweep.families = ConfigDict(sort_keys=False)
    config.sweep.families.pruning = common.family(
        "pruning", {"90 %": {"sparsity": 0.9}}, compressor="MagnitudePruning"
    )
    config.sweep.families.low_rank = common.family(
        "low rank", {"1/4": {"ratio": 0.25}}, compressor="LowRank"
    )
    config.sweep.every = [1, 5, 20]
    config.sweep.schedules = ConfigDict({"cosine": {"schedule": "cosine"}})
    config.sweep.seeds = [0, 1]
    config.sweep.steps = 400
    return config
