"""Arguments that the choices of channels and of ranks have in common."""

import math
import re
from collections.abc import Mapping

from keras_compaware.base import check_number


def checked_budget(owner, budget, kinds, unbounded=(), name="budget"):
    """Returns `(kind, limit)` of a budget: a fraction in (0, 1], or any number above 0.

    Args:
        owner: Name of the function, for messages.
        budget: Mapping with one entry.
        kinds: The keys that it may have.
        unbounded: Those among them that are no fractions.
        name: Name of the argument, for messages.
    """
    if not isinstance(budget, Mapping):
        raise TypeError(
            f"{owner}: `{name}` must be a mapping with one entry, such as "
            f"{{'macs': 0.5}}. Received: {budget!r}."
        )
    if len(budget) != 1 or not set(budget) <= set(kinds):
        raise ValueError(
            f"{owner}: `{name}` must have exactly one of the keys "
            f"{', '.join(map(repr, kinds))}. Received: {dict(budget)!r}."
        )
    ((kind, limit),) = budget.items()
    most = math.inf if kind in unbounded else 1.0
    check_number(owner, f"{name}[{kind!r}]", limit, 0.0, most, low_open=True)
    return kind, limit


def excluded_names(owner, exclude, names, what):
    """Returns the set of names in which one of the patterns is found.

    Args:
        owner: Name of the function, for messages.
        exclude: Regular expression, a sequence of them, or None.
        names: All names.
        what: What has these names.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    excluded = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{owner}: `exclude` must be a regular expression or a sequence of them. "
                f"Received: {pattern!r}."
            )
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(
                f"{owner}: `exclude` is not a valid regular expression: {pattern!r} ({error})."
            ) from error
        if not found:
            raise ValueError(
                f"{owner}: the pattern {pattern!r} of `exclude` matches no {what}. "
                f"Those of the model: {', '.join(names) or 'none'}."
            )
        excluded |= found
    return excluded
