"""Configurations of sweeps: defaults and validation."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from keras_compaware.cli.config import DEFAULTS as EXPERIMENT
from keras_compaware.cli.config import optimizer_of, recipe_of, unknown
from keras_compaware.cli.config import resolve as resolve_experiment
from keras_compaware.cli.program import UserError
from keras_compaware.compressors import WeightNoise
from keras_compaware.search import BASELINES, Trial, expand

SHARED = (
    *("data", "model", "model_args", "init_from"),
    *("batch_size", "optimizer", "recalibrate_steps"),
)
"""The keys of an experiment's configuration that the trials of a sweep share."""

DEFAULTS: dict[str, Any] = {
    "families": {},
    "every": [1, 10, 100, 1000],
    "schedules": {"constant": {"schedule": "constant"}, "cosine": {"schedule": "cosine"}},
    "seeds": [0, 1, 2],
    "steps": 20_000,
    "init": "fresh",
    "pretrain_steps": 20_000,
    "baselines": list(BASELINES),
    "steps_per_execution": 10,
}
"""Every key of `config.sweep`, with the value of those that it leaves out."""

_INITS = ("fresh", "pretrained")
_NAME = re.compile(r"[\w.+-]+")


def resolve(config: ConfigDict | Mapping) -> dict[str, Any]:
    """Returns the complete configuration of a sweep as plain JSON values.

    It is that of an experiment (data, model, optimizer, batch size) with a key `sweep`, in which

    - `families` is a dictionary of name -> `label`, what the family is called; `rule`, as in
      `config.rules`; and `budgets`, a list of dictionaries, each with a `label` and the arguments
      that it puts into the rule;
    - `every` and `seeds` are lists; `schedules` is a dictionary of name -> what it changes in
      `config.optimizer`;
    - `steps` is the number of optimizer steps of a trial;
    - `init` is "fresh", or "pretrained": trials start from the dense network of their schedule and
      seed, which was trained for `pretrain_steps`;
    - `baselines` is a list of names;
    - `steps_per_execution` is the most optimizer steps that are run at once; fewer where a period
      needs it.

    The base's epochs and seed are left out, `steps` and `seeds` stand in for them.

    Raises:
        UserError: If a key is unknown, or a value has a wrong type or is out of its range.
    """
    if not isinstance(config, ConfigDict | Mapping) or not isinstance(
        config.get("sweep"), ConfigDict | Mapping
    ):
        raise UserError(
            "expected the configuration of a sweep, with a dictionary config.sweep; see "
            f"configs/sweeps. Received: {config!r}"
        )
    given = config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(dict(config))
    sweep = given.pop("sweep")
    base = resolve_experiment(given)
    for key, default in EXPERIMENT.items():
        if key not in (*SHARED, "epochs", "seed") and base[key] != default:
            reason = "what is done to the kernels is said by config.sweep.families"
            if key in ("distribute", "num_devices"):
                reason = "every trial runs on one device"
            raise UserError(
                f"config.{key} must be left out in a sweep: {reason}. Received: {base[key]!r}"
            )
    checked = {"sweep": _sweep(sweep), **{key: base[key] for key in SHARED}}
    if checked["data"]["validation"] <= 0:
        raise UserError(
            "config.data.validation must be positive in a sweep: the best period is chosen on the "
            f"validation split. Received: {checked['data']['validation']}"
        )
    for name, settings in checked["sweep"]["schedules"].items():
        trial = {**EXPERIMENT, **base, "optimizer": {**base["optimizer"], **settings}}
        try:
            optimizer_of(resolve_experiment(trial), total_steps=1)
        except UserError as error:
            raise UserError(f"config.sweep.schedules.{name}: {error}") from error
    return checked


def _sweep(given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in DEFAULTS:
            raise UserError(unknown("key", f"config.sweep.{key}", DEFAULTS, "config.sweep."))
    sweep = {**copy.deepcopy(DEFAULTS), **given}
    for name, low in (("steps", 1), ("pretrain_steps", 1), ("steps_per_execution", 1)):
        _check_integer(f"config.sweep.{name}", sweep[name], low)
    for name, low, high in (("every", 1, math.inf), ("seeds", 0, 2**32 - 1)):
        sweep[name] = _distinct(f"config.sweep.{name}", sweep[name])
        for value in sweep[name]:
            _check_integer(f"every element of config.sweep.{name}", value, low, high)
    if sweep["init"] not in _INITS:
        raise UserError(
            f"config.sweep.init must be one of {', '.join(_INITS)}. Received: {sweep['init']!r}"
        )
    sweep["baselines"] = _distinct("config.sweep.baselines", sweep["baselines"], empty=True)
    for name in sweep["baselines"]:
        if name not in BASELINES:
            raise UserError(f"config.sweep.baselines: {unknown('baseline', str(name), BASELINES)}")
    for key in ("families", "schedules"):
        entries = sweep[key]
        if not isinstance(entries, Mapping) or not entries:
            raise UserError(
                f"config.sweep.{key} must be a dictionary with at least one entry. "
                f"Received: {entries!r}"
            )
        for name, entry in entries.items():
            where = f"config.sweep.{key}.{name}"
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"{where}: a name must consist of letters, digits and . _ + -. "
                    f"Received: {name!r}"
                )
            if not isinstance(entry, Mapping):
                raise UserError(f"{where} must be a dictionary. Received: {entry!r}")
    sweep["families"] = {
        name: _family(f"config.sweep.families.{name}", name, entry)
        for name, entry in sweep["families"].items()
    }
    try:
        return json.loads(json.dumps(sweep, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            "config.sweep must hold numbers, text, booleans, None, lists and dictionaries only, "
            f"for it is written to config.json: {error}"
        ) from error


def _family(where: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    known = ("label", "rule", "budgets")
    for key in entry:
        if key not in known:
            raise UserError(unknown("key", f"{where}.{key}", known, f"{where}."))
    label, rule = entry.get("label", name), entry.get("rule")
    if not isinstance(label, str):
        raise UserError(f"{where}.label must be text. Received: {label!r}")
    if not isinstance(rule, Mapping) or "every" in rule:
        raise UserError(
            f"{where}.rule must be a dictionary as in config.rules, without `every`, which is "
            f"config.sweep.every. Received: {rule!r}"
        )
    budgets = _distinct(f"{where}.budgets", entry.get("budgets"))
    labels = []
    for budget in budgets:
        text = budget.get("label") if isinstance(budget, Mapping) else None
        if not isinstance(text, str) or not re.fullmatch(r"[^:\s]([^:\n]*[^:\s])?", text):
            raise UserError(
                f"{where}.budgets: every element must be a dictionary with a `label` (text without "
                f"colons) and the arguments that it puts into the rule. Received: {budget!r}"
            )
        labels.append(text)
    _distinct(f"the labels of {where}.budgets", labels)
    return {"label": label, "rule": dict(rule), "budgets": [dict(budget) for budget in budgets]}


def _check_integer(name: str, value: Any, low: float, high: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name} must be an integer {limits}. Received: {value!r}")


def _distinct(name: str, values: Any, empty: bool = False) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not (values or empty):
        raise UserError(f"{name} must be a list, not an empty one. Received: {values!r}")
    if any(value in values[:place] for place, value in enumerate(values)):
        raise UserError(f"{name} must not repeat an element. Received: {values!r}")
    return list(values)


def recipe_config(trial: Trial) -> dict[str, Any]:
    """Returns the configuration of the experiment that a trial is.

    Weight noise, unless its seed is given, is that of the trial's seed.
    """
    config, rule = trial.settings["config"], trial.settings["rule"]
    if rule is not None and rule.get("compressor") == WeightNoise.__name__:
        rule = {"seed": config["seed"], **rule}
    rules = {} if rule is None else {trial.family: rule}
    return {**copy.deepcopy(EXPERIMENT), **config, "rules": rules}


def check(config: Mapping[str, Any], model: Any) -> list[Trial]:
    """Returns the trials of a sweep; finds out what cannot work before any of them runs.

    Args:
        config: Resolved configuration.
        model: A model as the trials train it.

    Raises:
        UserError: If a rule does not fit, or would compress nothing.
    """
    trials = expand(config)
    checked = set()
    for trial in trials:
        what = (trial.kind, trial.family, trial.budget, trial.every)
        if trial.family and what not in checked:
            checked.add(what)
            where = f"config.sweep.families.{trial.family}, {trial.budget}"
            try:
                recipe = recipe_of(recipe_config(trial), 1, trial.settings["steps"])
                plan = recipe.plan(model)
            except (UserError, ValueError, TypeError) as error:
                raise UserError(f"{where}: {error}") from error
            if not plan.assignments:
                raise UserError(f"{where}: nothing would be compressed:\n{plan}")
    return trials
