"""The trials of a sweep, as values."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from keras_compaware import compressors
from keras_compaware.base import Compressor

BASELINES = {
    "post_training": "compressed once after training",
    "straight_through": "straight-through at every step",
    "held_pruning": "held mask, cubic ramp",
    "dense_longer": "dense, trained as long as the trials",
}
"""What a sweep compares with besides the dense networks, with its name in tables and plots."""

_WHEN = ("action", "every", "begin", "end", "ramp", "hold", "controller", "alpha", "at_end")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with one result.

    Args:
        kind: "every" (a point of the grid), "dense", or a key of `BASELINES`.
        family: Key of the family in the configuration; "" without compression.
        budget: Label of the family's budget; "" without compression.
        every: Optimizer steps between two firings; None for baselines.
        schedule: Name of the learning-rate schedule.
        seed: Seed of weights, batches and noise.
        settings: All that decides about the result, as JSON values: "config" (data, model,
            optimizer, ...), "rule" (None without compression), "steps", "pretrain_steps",
            "steps_per_execution".

    Example:
    >>> Trial("every", "pruning", "95 %", 100, "cosine", 0).id
    'pruning:95 %:every-100:cosine:0'
    """

    kind: str
    family: str
    budget: str
    every: int | None
    schedule: str
    seed: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """The trial's name, unique in its sweep and the same in every run of it."""
        what = f"every-{self.every}" if self.kind == "every" else self.kind
        where = [self.family, self.budget] if self.family else []
        return ":".join([*where, what, self.schedule, str(self.seed)])

    @property
    def needs_dense(self) -> bool:
        """Whether it starts from the dense network of its schedule and seed."""
        further = self.kind != "dense" and self.settings["pretrain_steps"] is not None
        return further or self.kind == "post_training"

    def to_json(self) -> dict[str, Any]:
        """Returns what identifies the trial, as JSON values."""
        fields = {k: v for k, v in vars(self).items() if k != "settings"}
        return {"id": self.id, **fields}


def expand(config: Mapping[str, Any]) -> list[Trial]:
    """Returns all trials of a sweep: the dense networks, then seed by seed.

    A baseline stands where it makes sense: `post_training` and `straight_through` for compressors
    that are applied by `Every`, `held_pruning` for those of them that prune to a sparsity, and
    `dense_longer` where trials start from a trained network.

    Args:
        config: Resolved configuration of a sweep, with its key "sweep".
    """
    sweep = config["sweep"]
    schedules, seeds = sweep["schedules"], sweep["seeds"]
    dense = [_trial(config, "dense", s, n) for n in seeds for s in schedules]
    rest = [t for n in seeds for s in schedules for t in _compressing(config, s, n)]
    return dense + rest


def _compressing(config: Mapping[str, Any], schedule: str, seed: int) -> Iterator[Trial]:
    sweep = config["sweep"]
    if "dense_longer" in sweep["baselines"] and sweep["init"] == "pretrained":
        yield _trial(config, "dense_longer", schedule, seed)
    for family, entry in sweep["families"].items():
        for budget in entry["budgets"]:
            given = {key: value for key, value in budget.items() if key != "label"}
            rule = {**entry["rule"], **given}
            where = (schedule, seed, family, budget["label"])
            for every in sweep["every"]:
                yield _trial(config, "every", *where, {**rule, "every": every}, every)
            for kind, made in _baseline_rules(rule, sweep["steps"]).items():
                if kind in sweep["baselines"]:
                    yield _trial(config, kind, *where, made)


def _trial(config, kind, schedule, seed, family="", budget="", rule=None, every=None):
    sweep = config["sweep"]
    pretrained = sweep["init"] == "pretrained"
    settings = {
        "config": {
            **{key: value for key, value in config.items() if key != "sweep"},
            "optimizer": {**config["optimizer"], **sweep["schedules"][schedule]},
            "seed": seed,
        },
        "rule": rule,
        "steps": sweep["pretrain_steps"] if kind == "dense" and pretrained else sweep["steps"],
        "pretrain_steps": sweep["pretrain_steps"] if pretrained else None,
        "steps_per_execution": sweep["steps_per_execution"],
    }
    return Trial(kind, family, budget, every, schedule, seed, settings)


def _baseline_rules(rule: Mapping[str, Any], steps: int) -> dict[str, dict[str, Any]]:
    """Returns the rules of the baselines that make sense beside a rule."""
    kind = getattr(compressors, str(rule.get("compressor")), None)
    is_compressor = isinstance(kind, type) and issubclass(kind, Compressor)
    if rule.get("action", "Every") != "Every" or not is_compressor:
        return {}
    bare = {key: value for key, value in rule.items() if key not in _WHEN}
    found = {
        "post_training": {**bare, "action": "AtEnd"},
        "straight_through": {**bare, "action": "StraightThrough", "every": 1},
    }
    if kind.selects is True and "sparsity" in bare:
        # The gradual pruning of Zhu & Gupta (2017): masks grow in 100 firings, then stay.
        half = max(1, steps // 2)
        found["held_pruning"] = {
            **bare,
            "every": max(1, half // 100),
            "end": half,
            "ramp": {"initial": 0.0},
            "hold": True,
        }
    return found
