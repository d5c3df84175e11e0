"""What the content of a `report.json` must look like to be shown."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

REPORT_FORMAT = 1
"""The format of `report.json` that this version writes; it reads all up to this one."""

_MEASURED = (
    *("accuracy", "parameters", "macs", "encoded_bytes", "litert_bytes", "gzip_bytes"),
    "latency_ms",
)


def number(value: Any) -> float | int | None:
    """Returns a finite number as it is, and None for anything else.

    >>> number(0.5), number(float("nan")), number("0.5"), number(True)
    (0.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floating-point numbers
        return None


def _is_pair(value):
    return isinstance(value, list) and len(value) == 2 and all(map(_is_cost, value))


def _is_cost(value):
    return value is None or (number(value) is not None and value >= 0)


def _is_count(value):
    return number(value) is not None and value >= 0


def _is_text(value):
    return isinstance(value, str)


def _is_list(value):
    return isinstance(value, list)


def _is_object(value):
    return isinstance(value, dict)


def _is_spectrum(value):
    return isinstance(value, list) and bool(value) and all(map(_is_pair, value))


# Parts that a report may lack: lists of objects, with what each object must have.
_PARTS: dict[tuple[str, ...], dict[str, Callable[[Any], bool]]] = {
    ("plan",): {"name": _is_text, "layer": _is_text, "shape": _is_list, "actions": _is_list},
    ("layers",): {
        "name": _is_text,
        "class": _is_text,
        **dict.fromkeys(("parameters", "macs", "channels"), _is_pair),
    },
    ("spectra",): {
        "name": _is_text,
        "layer": _is_text,
        "trained": _is_spectrum,
        "rank": _is_count,
        "full_rank": _is_count,
    },
    ("dense", "history"): {},
    ("compact", "history"): {},
    ("compact", "firings"): {"step": _is_count, "distortion": _is_object},
    ("compact", "layers"): {
        "name": _is_text,
        "layer": _is_text,
        "note": _is_text,
        "before": _is_count,
        "after": _is_count,
    },
    ("compact", "channels"): {"name": _is_text, "before": _is_count, "after": _is_count},
    ("compact", "shrink"): {
        "what": _is_text,
        "keras_accuracy": _is_count,
        "parameters": _is_count,
        "macs": _is_count,
    },
}


def checked(report: Any) -> Mapping[str, Any]:
    """Returns a report as it is, if it can be shown.

    Args:
        report: Content of a `report.json` file.

    Raises:
        ValueError: If it is not the report of a run, lacks what every report has, holds a part of
            another kind than it should, or was written in a later format.

    Example:
    >>> checked({"format": 99})
    Traceback (most recent call last):
    ...
    ValueError: it has format 99 and was written by a later version of keras_compaware; ...
    """
    if not isinstance(report, dict):
        raise ValueError(
            f"it is no report of a run: expected an object, received {_kind(report)}. Is it the "
            "report.json of a folder that `train` has filled?"
        )
    _check_format(report)
    for key, is_right, expected in (
        ("name", _is_text, "a text"),
        ("dense", _is_object, "an object"),
        ("compact", _is_object, "an object"),
        ("config", _is_object, "an object"),
        ("command", _is_text, "a text"),
    ):
        if key not in report:
            raise ValueError(f"it is no report of a run: it lacks {key!r}. {_MEND}")
        _require(is_right(report[key]), key, expected, report[key])
    for part in ("dense", "compact"):
        for key in _MEASURED:
            if key not in report[part]:
                raise ValueError(f"it lacks {part}.{key}. {_MEND}")
            value = report[part][key]
            _require(_is_count(value), f"{part}.{key}", "a number of at least 0", value)
    for key in ("model", "seed"):
        if key not in report["config"]:
            raise ValueError(f"it lacks config.{key}. {_MEND}")
    for path, keys in _PARTS.items():
        _check_part(report, path, keys)
    _check_early(report["compact"].get("early"), report["config"])
    return report


_MEND = "Run `train` again, with --overwrite in the same folder."


def _check_format(report):
    version = report.get("format", REPORT_FORMAT)  # the first reports did not tell theirs
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"its format must be an integer from 1 on, received {version!r}. {_MEND}")
    if version > REPORT_FORMAT:
        raise ValueError(
            f"it has format {version} and was written by a later version of keras_compaware; this "
            f"one reads formats up to {REPORT_FORMAT}. Upgrade: "
            "pip install --upgrade keras-compaware"
        )


def _check_part(report, path, keys):
    *folder, last = path
    value = (report[folder[0]] if folder else report).get(last)
    if value is None:
        return
    name = ".".join(path)
    _require(isinstance(value, list), name, "a list", value)
    for place, row in enumerate(value):
        where = f"{name}[{place}]"
        _require(isinstance(row, dict), where, "an object", row)
        for key, is_right in keys.items():
            _require(is_right(row.get(key)), f"{where}.{key}", _EXPECTED[is_right], row.get(key))


_EXPECTED = {
    _is_text: "a text",
    _is_list: "a list",
    _is_object: "an object",
    _is_count: "a number of at least 0",
    _is_pair: "two numbers, before and after",
    _is_spectrum: "pairs of numbers",
}


def _check_early(early, config):
    if not early:
        return
    if "epochs" not in config:
        raise ValueError(f"it lacks config.epochs. {_MEND}")
    _require(_is_object(early), "compact.early", "an object", early)
    for key in ("epoch", "parameters"):
        value = early.get(key)
        _require(_is_count(value), f"compact.early.{key}", "a number of at least 0", value)
    seconds = early.get("seconds_per_epoch")
    is_right = _is_object(seconds) and all(_is_count(seconds.get(k)) for k in ("before", "after"))
    _require(is_right, "compact.early.seconds_per_epoch", "two numbers, before and after", seconds)


def _require(is_right, name, expected, value):
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"its part {name} is damaged: expected {expected}, received {shown}.")


def _kind(value):
    names = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")
