"""Configurations of sweeps and records of trials, made by hand."""

from keras_compaware.search import Trial

CONFIG = {
    "model": "lenet_300_100",
    "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"},
    "sweep": {
        "families": {
            "pruning": {
                "label": "pruning",
                "rule": {"where": None, "compressor": "MagnitudePruning"},
                "budgets": [
                    {"label": "90 %", "sparsity": 0.9},
                    {"label": "95 %", "sparsity": 0.95},
                ],
            },
            "low_rank": {
                "label": "low rank",
                "rule": {"compressor": "LowRank"},
                "budgets": [{"label": "1/4", "ratio": 0.25}],
            },
            "noise": {
                "label": "weight noise",
                "rule": {"compressor": "WeightNoise"},
                "budgets": [{"label": "0.1", "stddev": 0.1}],
            },
        },
        "every": [1, 10],
        "schedules": {"constant": {"schedule": "constant"}, "cosine": {"schedule": "cosine"}},
        "seeds": [0, 1],
        "steps": 1000,
        "init": "fresh",
        "pretrain_steps": 500,
        "baselines": ["post_training", "straight_through", "held_pruning", "dense_longer"],
        "steps_per_execution": 10,
    },
}


def changed(**sweep):
    """The configuration with other values in its `sweep`."""
    return {**CONFIG, "sweep": {**CONFIG["sweep"], **sweep}}


def record(
    every=1, *, validation=0.8, test=0.8, seed=0, kind="every", budget="1/4", status="done", **more
):
    """A record of a trial of the family `low_rank`."""
    family = "" if kind.startswith("dense") else "low_rank"
    trial = Trial(
        kind, family, budget if family else "", every if kind == "every" else None, "cosine", seed
    )
    measured = {"validation": validation, "test": test, "kernel_ratio": 0.25}
    found = measured if status == "done" else {}
    return {**trial.to_json(), "attempt": 1, "status": status, "seconds": 2.0, **found, **more}
