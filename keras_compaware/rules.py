"""Rules, and the plan that they make for a model: which action applies to which kernel."""

import collections
import dataclasses

import keras

from keras_compaware._text import text_table
from keras_compaware.base import (
    ACTIONS,
    AtEnd,
    Penalty,
    Proximal,
    Skip,
    StraightThrough,
    Value,
    check_keys,
    register,
)
from keras_compaware.kernels import check_where, matches, reason_to_skip
from keras_compaware.training import Assignment


@register
class Rule(Value):
    """Actions for the kernels that a selection takes.

    Args:
        where: A regular expression that is searched in target names (`backbone/conv1/kernel`), a
            layer, a class of layers, a function `target -> bool`, or None: all but the layers that
            produce the model's outputs.
        *actions: One or more actions: `Every`, `Proximal`, `Penalty`, `StraightThrough`, `AtEnd`
            or `Skip`.

    Example:
    >>> from keras_compaware import Every, MagnitudePruning, Skip
    >>> rules = [Rule("head", Skip()), Rule(keras.layers.Dense, Every(100, MagnitudePruning(0.9)))]
    """

    def __init__(self, where, *actions):
        check_where("Rule", where)
        if not actions:
            raise ValueError(
                f"Rule({where!r}): give at least one action, for example Skip(). Received: none."
            )
        for action in actions:
            if not isinstance(action, ACTIONS):
                raise TypeError(
                    f"Rule({where!r}): every action must be one of "
                    f"{', '.join(kind.__name__ for kind in ACTIONS)}. Received: {action!r}. "
                    "A compressor is put into an action: Every(100, MagnitudePruning(0.9))."
                )
        _check_combination(where, actions)
        self.where = where
        self.actions = actions

    def get_config(self):
        """Returns the configuration; classes of layers are stored by their registered name."""
        where = self.where
        if isinstance(where, type):
            where = {"layer_class": _class_name(where)}
        elif isinstance(where, keras.layers.Layer):
            raise ValueError(
                f"A rule for the layer object '{where.name}' cannot be saved; select by name: "
                f"Rule('{where.name}/', ...)."
            )
        return {"where": where, "actions": self.actions}

    @classmethod
    def from_config(cls, config):
        check_keys("Rule", config, ["where", "actions"])
        where, actions = config.get("where"), config.get("actions", ())
        if isinstance(where, dict) and "layer_class" in where:
            where = _layer_class(where)
        elif isinstance(where, dict):
            where = keras.saving.deserialize_keras_object(where)
        if isinstance(actions, dict):
            actions = keras.saving.deserialize_keras_object(actions)
        if not isinstance(actions, (list, tuple)):
            raise TypeError(f"Rule: `actions` must be a sequence. Received: {actions!r}.")
        actions = [
            keras.saving.deserialize_keras_object(a) if isinstance(a, dict) else a for a in actions
        ]
        return cls(where, *actions)

    def __eq__(self, other):
        return isinstance(other, Rule) and (self.where, self.actions) == (
            other.where,
            other.actions,
        )

    def __hash__(self):
        return hash((self.where, self.actions))

    def __repr__(self):
        where = self.where.__name__ if isinstance(self.where, type) else repr(self.where)
        return f"Rule({', '.join([where, *map(str, self.actions)])})"


def _class_name(layer_class):
    registered = keras.saving.get_registered_name(layer_class)
    if _find_class(registered) is not layer_class:
        raise ValueError(
            f"A rule for the layer class {layer_class.__name__} cannot be saved, since it could "
            "not be found again. Register the class with keras.saving.register_keras_serializable."
        )
    return registered


def _find_class(name):
    return keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)


def _layer_class(config):
    found = _find_class(config["layer_class"])
    if found is None:
        raise ValueError(
            f"The layer class '{config['layer_class']}' of a rule is not known. Register it with "
            "keras.saving.register_keras_serializable before loading the recipe."
        )
    return found


def _check_combination(where, actions):
    kinds = [type(action) for action in actions]
    for kind in (StraightThrough, Proximal, Penalty, AtEnd):
        if kinds.count(kind) > 1:
            raise ValueError(f"Rule({where!r}): {kind.__name__} may be given once only.")
    if Skip in kinds and len(kinds) > 1:
        raise ValueError(f"Rule({where!r}): Skip stands alone. Received: {list(actions)}.")
    if Proximal in kinds and Penalty in kinds:
        raise ValueError(
            f"Rule({where!r}): a kernel is regularized through the loss (Penalty) or by the "
            "proximal map (Proximal), not by both."
        )


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """What a recipe does with one kernel.

    Args:
        name: The target's name.
        layer: Class name of its layer.
        shape: Shape of the kernel.
        actions: Actions that apply, in order; empty if it is left alone.
        reason: Why it, or some action of its rule, is left alone; else "".
    """

    name: str
    layer: str
    shape: tuple
    actions: tuple
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe does with every kernel of a model; `print` shows it as a table.

    Args:
        rows: Tuple of `PlanRow`s in the order of the model's layers; kernels that cannot be
            compressed come last.
        assignments: Tuple of `Assignment`s.
    """

    rows: tuple
    assignments: tuple

    def to_json(self):
        """Returns the rows as plain JSON values."""
        return [
            {
                "name": row.name,
                "layer": row.layer,
                "shape": list(row.shape),
                "actions": [str(action) for action in row.actions],
                "reason": row.reason,
            }
            for row in self.rows
        ]

    def __str__(self):
        return text_table(
            ("kernel", "layer", "shape", "what happens"),
            [
                (row.name, row.layer, "x".join(map(str, row.shape)), _what_happens(row))
                for row in self.rows
            ],
        )


def _what_happens(row):
    if not row.actions:
        return f"left alone: {row.reason}"
    left_out = f" (other actions left out: {row.reason})" if row.reason else ""
    return " + ".join(map(_brief, row.actions)) + left_out


def _brief(value):
    """`repr` of a value without the arguments that have their default."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_brief, value))}]"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    shown = [
        f"{field.name}={_brief(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def checked_rules(name, rules):
    """Returns rules as a tuple; raises unless each of them is a `Rule`."""
    if not isinstance(rules, (list, tuple)):
        raise TypeError(
            f"Recipe: `{name}` must be a sequence of Rule(where, *actions). Received: {rules!r}."
        )
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"Recipe: `{name}` must be a sequence of Rule(where, *actions). Received: {rule!r}."
            )
    return tuple(rules)


def deserialized_rules(rules):
    """Returns the rules of a saved recipe."""
    if isinstance(rules, dict):
        rules = keras.saving.deserialize_keras_object(rules)
    if not isinstance(rules, (list, tuple)):
        return rules
    return [keras.saving.deserialize_keras_object(r) if isinstance(r, dict) else r for r in rules]


def subject_of(action):
    """What an action applies, or None."""
    names = ("constraint", "compressor", "regularizer")
    return next(filter(None, (getattr(action, name, None) for name in names)), None)


def planned(rules, targets, skipped, what, model, strict=False):
    """Returns `(rows, assignments)` of rules on targets, each of which is a `what`."""
    taken = collections.Counter()
    rows, assignments, waived = [], [], set()
    for target in targets:
        number = _first_match(rules, target)
        actions, reason = _actions_for(target, None if number is None else rules[number])
        if number is not None:
            taken[number] += 1
        if actions:
            assignments.append(Assignment(target, actions))
        kind = type(target.layer).__name__
        rows.append(PlanRow(target.name, kind, target.shape, actions, reason))
    for entry in skipped:
        rows.append(PlanRow(entry.name, type(entry.layer).__name__, (), (), entry.reason))
        number = _first_match(rules, entry, _matches_skipped)
        if number is not None and isinstance(rules[number].actions[0], Skip):
            taken[number] += 1
            waived.add(entry.name)
    _check_rules_take_something(rules, taken, targets, skipped, what, model)
    open_questions = [entry for entry in skipped if entry.name not in waived]
    if strict and open_questions:
        reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in open_questions)
        raise ValueError(f"Recipe(strict=True): some kernels cannot be compressed: {reasons}.")
    return rows, assignments


def _first_match(rules, target, matches=matches):
    for number, rule in enumerate(rules):
        if matches(rule.where, target):
            return number
    return None


def _actions_for(target, rule):
    if rule is None:
        reason = "it produces the model's output" if target.is_head else "no rule takes it"
        return (), reason
    if isinstance(rule.actions[0], Skip):
        return (), rule.actions[0].reason
    reasons = {action: _reason_against(action, target) for action in rule.actions}
    kept = tuple(action for action in rule.actions if not reasons[action])
    return kept, "; ".join(dict.fromkeys(filter(None, reasons.values())))


def _check_rules_take_something(rules, taken, targets, skipped, what, model):
    for number, rule in enumerate(rules):
        if taken[number]:
            continue
        matched = [target for target in targets if matches(rule.where, target)]
        hopeless = [entry for entry in skipped if _matches_skipped(rule.where, entry)]
        if matched:
            first = _first_match(rules, matched[0])
            why = f"'{matched[0].name}' is taken by rule {first + 1}, {rules[first]!r}"
        elif hopeless:
            entry = hopeless[0]
            why = f"it matches only what cannot be compressed: {entry.name}: {entry.reason}"
        else:
            known = ", ".join(target.name for target in targets) or "none"
            why = f"{what}s of the model '{model.name}': {known}"
        raise ValueError(f"Rule {number + 1}, {rule!r}, takes no {what}: {why}.")


def _reason_against(action, target):
    """Why an action has nothing to gain on a target, or None."""
    return reason_to_skip(subject_of(action), target)


def _matches_skipped(where, entry):
    """Whether a selection takes what cannot be compressed; functions are only asked for targets."""
    is_selection = where is None or isinstance(where, (str, type, keras.layers.Layer))
    return is_selection and matches(where, entry)
