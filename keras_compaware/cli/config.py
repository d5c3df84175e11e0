"""Configurations: defaults, validation, and the recipe that they describe."""

import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
from ml_collections import ConfigDict

from keras_compaware import base, compressors, regularizers
from keras_compaware.cli.program import UserError
from keras_compaware.data import AUGMENTATIONS
from keras_compaware.recipe import Recipe
from keras_compaware.rules import Rule
from keras_compaware.schedules import Ramp, StrengthController

DEFAULTS: dict[str, Any] = {
    "data": {"name": "digits", "validation": 0.1, "image_size": None, "augment": ""},
    "model": "small_cnn",
    "model_args": {},
    "init_from": "",
    "epochs": 10,
    "batch_size": 128,
    "seed": 0,
    "optimizer": {
        "name": "adam",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "weight_decay": 0.0,
    },
    "rules": {},
    "channels": {},
    "shrink": {},
    "compact_at_epoch": None,
    "recalibrate_steps": 100,
    "distribute": None,
    "num_devices": None,
}
"""Every key that a configuration may have, with the value of those that it leaves out.

For `rules` and `channels` see `recipe_of`, for `optimizer` `optimizer_of`, for `shrink` the module
`shrinking`, for `compact_at_epoch` the module `early`, for `distribute` and `num_devices`
`distribution`.
"""

_SUBJECTS = ("constraint", "compressor", "regularizer")  # what actions call what they apply
_FREE = ("model_args", "rules", "channels", "shrink")  # what reads them checks their keys
_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "recalibrate_steps": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
}
DURATIONS = ("every", "begin", "end")
"""The keys of a rule that hold optimizer steps, or text such as "3 epochs"."""

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%|)\s*")


def resolve(config: ConfigDict | Mapping) -> dict[str, Any]:
    """Returns the complete configuration as plain JSON values.

    Raises:
        UserError: If a key is unknown (with the key that was probably meant), or a value has a
            wrong type or is out of its range.
    """
    if not isinstance(config, ConfigDict | Mapping):
        raise UserError(
            "the configuration must be a ml_collections.ConfigDict. "
            f"Received: {config!r}. Does get_config() return it?"
        )
    _check_order(config)
    # `to_dict` keeps the order of rules, which counts: the first match wins.
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    merged = _merge(DEFAULTS, given, "config.")
    for key, (low, high) in _RANGES.items():
        value = functools.reduce(dict.__getitem__, key.split("."), merged)
        if not low <= value <= high or not math.isfinite(value):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"config.{key} must be {limits}. Received: {value}")
    rate = merged["optimizer"]["learning_rate"]
    if not 0 < rate < math.inf:
        raise UserError(f"config.optimizer.learning_rate must be positive. Received: {rate}")
    if merged["data"]["augment"]:  # "": images as they are
        _named("config.data.augment", merged["data"]["augment"], AUGMENTATIONS, "augmentation")
    try:
        return json.loads(json.dumps(merged, allow_nan=False))
    except (TypeError, ValueError) as error:
        where = next(_no_json(merged, "config"), "config")
        raise UserError(
            "the configuration must hold numbers, text, booleans, None, lists and dictionaries "
            f"only, for it is written to config.json; {where} is something else: {error}"
        ) from error


def _no_json(value: Any, name: str) -> Iterator[str]:
    """Yields the names of what is no JSON value."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in parts:
            yield from _no_json(part, f"{name}.{key}")
    else:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield name


def _check_order(config: Any) -> None:
    """Refuses rules that would be read in alphabetical order without anyone having said so."""
    for key in ("rules", "channels"):
        rules = config.get(key)
        # There is no public way to ask. Where the attribute is missing, nothing is refused.
        if isinstance(rules, ConfigDict) and len(rules) > 1 and getattr(rules, "_sort_keys", False):
            raise UserError(
                f"config.{key} is a ConfigDict that sorts its keys, so the rules would not apply "
                "in the order in which they are written, and the first match wins. Make it with "
                f"config.{key} = ConfigDict(sort_keys=False) and add one rule after the other."
            )


def _merge(defaults: Mapping, given: Mapping, prefix: str) -> dict[str, Any]:
    for key in given:
        if key not in defaults:
            raise UserError(unknown("key", f"{prefix}{key}", defaults, prefix))
    merged = {}
    for key, default in defaults.items():
        value = given.get(key, copy.deepcopy(default))
        name = prefix + key
        if isinstance(default, dict):
            if not isinstance(value, Mapping):
                keys = "" if key in _FREE else f" with keys of {list(default)}"
                raise UserError(f"{name} must be a dictionary{keys}. Received: {value!r}")
            merged[key] = dict(value) if key in _FREE else _merge(default, value, f"{name}.")
        else:
            merged[key] = _typed(name, value, default)
    return merged


def _typed(name: str, value: Any, default: Any) -> Any:
    if default is None:  # what reads it checks it
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, type(default)) or isinstance(value, bool) != isinstance(default, bool):
        raise UserError(
            f"{name} must be of type {type(default).__name__}, like its default "
            f"{default!r}. Received: {value!r}"
        )
    return value


def unknown(kind: str, name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the message for an unknown name, with the one that was probably meant.

    Args:
        kind: What it is a name of.
        name: The name, which begins with `prefix`.
        known: The names that exist, without the prefix.
        prefix: What stands before each of them.

    Example:
    >>> unknown("key", "config.epoch", ["epochs", "seed"], "config.")
    "unknown key 'config.epoch'. Did you mean 'config.epochs'? Known: epochs, seed"
    """
    known = list(known)
    close = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
    meant = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    return f"unknown {kind} '{name}'.{meant} Known: {', '.join(known) or 'none'}"


def steps_of(duration: Any, steps_per_epoch: int, total_steps: int, name: str) -> int | None:
    """Converts a duration into optimizer steps.

    Args:
        duration: An integer (steps), or text: "200" or "200 steps", "1.5 epochs", "25%" (of all
            steps). None stays None.
        steps_per_epoch: Optimizer steps of an epoch.
        total_steps: Optimizer steps of the run.
        name: What it is, for the message.

    Raises:
        UserError: If it is none of these.

    Example:
    >>> steps_of("1.5 epochs", steps_per_epoch=100, total_steps=1000, name="every")
    150
    """
    if duration is None or (isinstance(duration, int) and not isinstance(duration, bool)):
        return duration
    found = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if found is None:
        raise UserError(
            f"{name} must be a number of optimizer steps, or text such as '200 steps', '3 epochs' "
            f"or '25%'. Received: {duration!r}"
        )
    number, unit = float(found[1]), found[2]
    scale = {"%": total_steps / 100}.get(unit, steps_per_epoch if unit.startswith("epoch") else 1)
    steps = math.floor(number * scale + 0.5)
    if number > 0 and steps == 0:
        raise UserError(f"{name}: {duration!r} is less than one optimizer step")
    return steps


def recipe_of(config: Mapping, steps_per_epoch: int, total_steps: int) -> Recipe | None:
    """Returns the recipe of a configuration's `rules` and `channels`, or None without any.

    A rule for kernels or channel spaces is a dictionary in which

    - `where` is a regular expression that is searched in the names of kernels or channel spaces, or
      None (default): all but the output layers,
    - `action` is the name of an action (default "Every"),
    - `compressor` or `regularizer`, whichever the action takes, is the name of a class,
    - the other keys are arguments of the action (`every`, `begin`, `end`, see `steps_of`; `hold`)
      or of that class,
    - `ramp` (and `alpha` of StraightThrough) holds the arguments of a `Ramp`, `controller` those of
      a `StrengthController`, and `at_end` names a compressor, with its arguments, that follows at
      the end of training.

    Raises:
        UserError: If a name is unknown or an argument does not fit.
    """
    convert = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    rules, channels = (
        [_rule(f"config.{key}.{name}", rule, convert) for name, rule in config[key].items()]
        for key in ("rules", "channels")
    )
    if not (rules or channels):
        return None
    try:
        return Recipe(rules, channels=channels)
    except ValueError as error:
        raise UserError(str(error)) from error


def _rule(prefix: str, rule: Any, convert: Mapping[str, int]) -> Rule:
    rule = _dictionary(prefix, rule)
    selection = rule.pop("where", None)
    if selection is not None and not isinstance(selection, str):
        raise UserError(
            f"{prefix}.where must be a regular expression, or None: all but the output layers. "
            f"Received: {selection!r}"
        )
    at_end = rule.pop("at_end", None)
    try:
        actions = [_action(prefix, rule, convert)]
        if at_end is not None:
            settings = _dictionary(f"{prefix}.at_end", at_end)
            actions.append(base.AtEnd(_subject(f"{prefix}.at_end", settings, "compressor")))
        return Rule(selection, *actions)
    except (TypeError, ValueError) as error:
        raise UserError(f"{prefix}: {error}") from error


def _dictionary(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a dictionary. Received: {value!r}")
    return dict(value)


def _action(prefix: str, rule: dict, convert: Mapping[str, int]) -> Any:
    kinds = {kind.__name__: kind for kind in base.ACTIONS}
    kind = _named(f"{prefix}.action", rule.pop("action", "Every"), kinds, "action")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments = {key: rule.pop(key) for key in list(rule) if key in fields and key not in _SUBJECTS}
    for key in DURATIONS:
        if key in arguments:
            arguments[key] = steps_of(arguments[key], name=f"{prefix}.{key}", **convert)
    for key, schedule in (("ramp", Ramp), ("alpha", Ramp), ("controller", StrengthController)):
        if arguments.get(key) is not None:
            arguments[key] = _schedule(f"{prefix}.{key}", schedule, arguments[key], convert)
    subject = next((name for name in _SUBJECTS if name in fields), None)
    if subject is not None:
        # What `Every` calls a constraint is a compressor in a configuration.
        key = "regularizer" if subject == "regularizer" else "compressor"
        arguments[subject] = _subject(prefix, rule, key, kind.__name__)
    elif rule:
        key = next(iter(rule))
        raise UserError(unknown("key", f"{prefix}.{key}", fields, f"{prefix}."))
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            raise UserError(f"{prefix}.{name} is missing: the action {kind.__name__} needs it")
    return kind(**arguments)


def _schedule(prefix: str, kind: type, value: Any, convert: Mapping[str, int]) -> Any:
    arguments = _dictionary(prefix, value)
    _check_arguments(prefix, kind, arguments)
    for key in arguments.keys() & set(DURATIONS):
        arguments[key] = steps_of(arguments[key], name=f"{prefix}.{key}", **convert)
    return kind(**arguments)


def _subject(prefix: str, arguments: dict, key: str, action: str = "AtEnd") -> Any:
    """Returns the compressor or regularizer that the `key` of a rule names."""
    package = regularizers if key == "regularizer" else compressors
    known = {name: getattr(package, name) for name in package.__all__ if name != "Chain"}
    other = "compressor" if key == "regularizer" else "regularizer"
    if other in arguments:
        actions = ", ".join(
            kind.__name__
            for kind in base.ACTIONS
            if kind is not base.Skip
            and ("regularizer" in {f.name for f in dataclasses.fields(kind)})
            == (other == "regularizer")
        )
        raise UserError(
            f"{prefix}: the action {action} takes a `{key}`, not a `{other}`. "
            f"Actions that take a `{other}`: {actions}"
        )
    if arguments.get(key) is None:
        raise UserError(f"{prefix}.{key} is missing. Known: {', '.join(known)}")
    kind = _named(f"{prefix}.{key}", arguments.pop(key), known, key)
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    _check_arguments(prefix, kind, arguments)
    return kind(**arguments)


def _check_arguments(prefix: str, kind: type, arguments: Mapping[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in arguments:
        if name not in fields:
            message = unknown(
                f"argument of {kind.__name__}", f"{prefix}.{name}", fields, f"{prefix}."
            )
            raise UserError(message)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            raise UserError(f"{prefix}.{name} is missing: {kind.__name__} needs it")


def _named(where: str, name: Any, known: Mapping[str, Any], kind: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where}: {unknown(kind, str(name), known)}")
    return known[name]


@base.register
class ScheduleFrom(keras.optimizers.schedules.LearningRateSchedule):
    """A learning-rate schedule from one of its steps on, for an optimizer that counts from 0.

    Args:
        schedule: A `LearningRateSchedule`.
        step: The step of it that comes first.

    Example:
    >>> halves = keras.optimizers.schedules.PiecewiseConstantDecay([3], [1.0, 0.5])
    >>> [float(ScheduleFrom(halves, 2)(step)) for step in range(4)]
    [1.0, 1.0, 0.5, 0.5]
    """

    def __init__(self, schedule: Any, step: int) -> None:
        self.schedule = schedule
        self.step = step

    def __call__(self, step: Any) -> Any:
        return self.schedule(step + self.step)

    def get_config(self) -> dict[str, Any]:
        serialized = keras.saving.serialize_keras_object(self.schedule)
        return {"schedule": serialized, "step": self.step}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ScheduleFrom":
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["step"])


def learning_rate_of(config: Mapping[str, Any], total_steps: int, first_step: int = 0) -> Any:
    """Returns the learning rate of a resolved configuration, or its schedule.

    The schedule "steps" takes a tenth of the learning rate after half of the steps, and a hundredth
    after three quarters.

    Args:
        config: Resolved configuration.
        total_steps: Optimizer steps of the run.
        first_step: Those that were done before the optimizer's first. Default 0.

    Raises:
        UserError: If the schedule is unknown.
    """
    settings = config["optimizer"]
    rate = settings["learning_rate"]
    schedules = {
        "constant": lambda: rate,
        "cosine": lambda: keras.optimizers.schedules.CosineDecay(rate, total_steps),
        # A boundary is the last step of the rate before it, and steps are counted from 0.
        "steps": lambda: keras.optimizers.schedules.PiecewiseConstantDecay(
            [math.ceil(total_steps * part) - 1 for part in (0.5, 0.75)],
            [rate, rate / 10, rate / 100],
        ),
    }
    schedule = _named("config.optimizer.schedule", settings["schedule"], schedules, "schedule")()
    if first_step and isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return ScheduleFrom(schedule, first_step)
    return schedule


def optimizer_of(
    config: Mapping[str, Any], total_steps: int, first_step: int = 0
) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a resolved configuration, see `learning_rate_of`.

    "sgd" has Nesterov momentum 0.9; the others have Keras's defaults.

    Raises:
        UserError: If its name or schedule is unknown.
    """
    settings = config["optimizer"]
    kind = _named("config.optimizer.name", settings["name"], _optimizers(), "optimizer")
    arguments = {"learning_rate": learning_rate_of(config, total_steps, first_step)}
    if settings["weight_decay"]:
        arguments["weight_decay"] = settings["weight_decay"]
    if settings["name"] == "sgd":
        arguments |= {"momentum": 0.9, "nesterov": True}
    return kind(**arguments)


def _optimizers() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Keras's optimizers by their names in lower case, without those that wrap others."""
    found = {name.lower(): value for name, value in vars(keras.optimizers).items()}
    return {
        name: value
        for name, value in sorted(found.items())
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and value is not keras.optimizers.Optimizer
        and "learning_rate" in inspect.signature(value).parameters
    }


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the dense twin: the same run without rules."""
    without = {"rules": {}, "channels": {}, "shrink": {}, "compact_at_epoch": None}
    return {**copy.deepcopy(dict(config)), **without}


def fingerprint(config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """Returns a hash of a configuration and of what else decides about the result."""
    text = json.dumps([config, extra], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_of(name: str) -> str:
    """Returns what the name of a model or of weights stands for, as far as it may change.

    Args:
        name: The path of a file, "package.module:function", or the name of a model.

    Returns:
        The hash of the file or of the module's source; "" for a name of this package.
    """
    path = pathlib.Path(name).expanduser()
    if not name.endswith((".keras", ".h5")):
        module, separator, _ = name.partition(":")
        path = pathlib.Path(importlib.import_module(module).__file__) if separator else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches of an epoch, the partial last one included."""
    return math.ceil(num_examples / batch_size)
