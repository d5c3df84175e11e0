"""Cutting channels of a trained model in cycles, each followed by further training."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_compaware import measure, scores
from keras_compaware.cli.config import unknown
from keras_compaware.cli.program import UserError, say
from keras_compaware.compaction import recalibrate_batch_norm, shrink

DEFAULTS: dict[str, Any] = {
    "budget": None,
    "score": "l2",
    "num_batches": 20,
    "scope": "global",
    "round_to": 1,
    "min_channels": 1,
    "max_ratio": 1.0,
    "exclude": None,
    "epochs": 5,
    "learning_rate": None,
}
"""The keys of a configuration's `shrink`, see `settings_of`."""

_CHOICE = ("scope", "round_to", "min_channels", "max_ratio", "exclude")
_KINDS = {"channels": "channels", "macs": "MACs", "params": "parameters"}
_FROM_DATA = {"taylor": scores.Taylor, "activation": scores.Activation}
_SCORES = ("l1", "l2", "batch_norm_scale", "geometric_median", "random", *_FROM_DATA)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the complete settings of `config.shrink`, or None if it is empty.

    Its keys are

    - `budget`: the share of the trained model's "macs", "params" or "channels" that is left, one
      of the three: {"macs": 0.5}, or a list of decreasing shares, a cycle for each: (0.5, 0.25),
    - `score`: "l1", "l2" (default), "batch_norm_scale", "geometric_median", "taylor",
      "activation" or "random"; `num_batches` (20) is how many training batches "taylor" and
      "activation" look at,
    - `scope` ("global"), `round_to`, `min_channels`, `max_ratio`, `exclude`: as of
      `choose_channels`,
    - `epochs` (5) of training after each cut, with the optimizer of the configuration at
      `learning_rate`; default None: a tenth of the optimizer's.

    Raises:
        UserError: If a key is unknown or a value does not fit.
    """
    given = config["shrink"]
    if not given:
        return None
    for key in given:
        if key not in DEFAULTS:
            raise UserError(unknown("key", f"config.shrink.{key}", DEFAULTS, "config.shrink."))
    settings = {**DEFAULTS, **given}
    settings["kind"], settings["shares"] = _budget(settings["budget"])
    if settings["score"] not in _SCORES:
        known = ", ".join(map(repr, _SCORES))
        raise UserError(
            f"config.shrink.score must be one of {known}. Received: {settings['score']!r}"
        )
    epochs = settings["epochs"]
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
        raise UserError(
            f"config.shrink.epochs must be an integer of at least 0. Received: {epochs!r}"
        )
    rate = settings["learning_rate"]
    if rate is None:
        settings["learning_rate"] = config["optimizer"]["learning_rate"] / 10
    elif not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise UserError(f"config.shrink.learning_rate must be positive or None. Received: {rate!r}")
    return settings


def _budget(budget: Any) -> tuple[str, list[float]]:
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in _KINDS:
        raise UserError(
            "config.shrink.budget must be a dictionary with one of the keys "
            f"{', '.join(map(repr, _KINDS))}, for example {{'macs': 0.5}}. Received: {budget!r}"
        )
    ((kind, value),) = budget.items()
    shares = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in shares)
    if not shares or not numbers or not all(0 < share <= 1 for share in shares):
        raise UserError(
            f"config.shrink.budget.{kind} must be a share in (0, 1], or a list of them. "
            f"Received: {value!r}"
        )
    if sorted(shares, reverse=True) != shares:
        raise UserError(
            f"config.shrink.budget.{kind} must decrease from cycle to cycle; every share is one of "
            f"the trained model. Received: {value!r}"
        )
    return kind, [float(share) for share in shares]


def check(model: keras.Model, settings: Mapping[str, Any]) -> None:
    """Raises a UserError if the smallest budget cannot be met."""
    _choose(model, "l2", settings["kind"], settings["shares"][-1], settings)


def _choose(model, score, kind, share, settings):
    limits = {key: settings[key] for key in _CHOICE}
    try:
        return scores.choose_channels(model, score, {kind: share}, **limits)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.shrink: {error}") from error


def cycles(
    model: keras.Model,
    settings: Mapping[str, Any],
    *,
    accuracy: Callable[[keras.Model], float],
    batches: Callable[[], Any],
    recalibrate_steps: int,
    train: Callable[[int, keras.Model], float],
) -> tuple[keras.Model, list[dict[str, Any]]]:
    """Cuts a compiled model and trains what is left, once for each budget.

    Args:
        model: The trained model. It is not changed.
        settings: Result of `settings_of`.
        accuracy: Function of a model.
        batches: Function that returns training data.
        recalibrate_steps: Batches for the statistics of batch normalisation after each cut.
        train: Function of the number of the cycle (1, 2, ...) and the model that was cut; trains it
            and returns the seconds it took.

    Returns:
        `(the last model, a row for each state: what was done, accuracy, parameters, MACs)`.
    """
    whole, before = _costs(model), 1.0
    rows = [_row("trained", model, accuracy(model))]
    say(_described(rows[-1], whole))
    for number, share in enumerate(settings["shares"], 1):
        kind = settings["kind"]
        # Of channels, what is left of the last cycle's; of costs, of what the model has by now.
        left = share / before if kind == "channels" else share * whole[kind] / _costs(model)[kind]
        before = share
        if left >= 1.0:
            say(f"cycle {number}: not more than that of the {_KINDS[kind]} is left already")
            continue
        score = settings["score"]
        if score in _FROM_DATA:
            score = _FROM_DATA[score](batches(), num_batches=settings["num_batches"])
        started = time.perf_counter()
        keep = _choose(model, score, kind, left, settings)
        model = shrink(model, keep)
        if recalibrate_steps:
            recalibrate_batch_norm(model, batches(), recalibrate_steps)
        seconds = time.perf_counter() - started
        what = f"cut to {_percent(share)} of the {_KINDS[kind]}"
        rows.append({**_row(what, model, accuracy(model)), "seconds": seconds})
        say(_described(rows[-1], whole))
        if settings["epochs"]:
            seconds = train(number, model)
            epochs = settings["epochs"]
            what = f"trained further for {epochs} epoch{'s' * (epochs > 1)}"
            rows.append({**_row(what, model, accuracy(model)), "seconds": seconds})
            say(_described(rows[-1], whole))
    return model, rows


def _costs(model: keras.Model) -> dict[str, int]:
    return {"macs": measure.macs(model), "params": measure.parameters(model)}


def _row(what: str, model: keras.Model, accuracy: float) -> dict[str, Any]:
    costs = _costs(model)
    return {
        "what": what,
        "keras_accuracy": accuracy,
        "parameters": costs["params"],
        "macs": costs["macs"],
    }


def _described(row: Mapping[str, Any], whole: Mapping[str, int]) -> str:
    return (
        f"{row['what']}: accuracy {100 * row['keras_accuracy']:.2f} %, parameters "
        f"{_percent(row['parameters'] / whole['params'])}, MACs "
        f"{_percent(row['macs'] / whole['macs'])}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
