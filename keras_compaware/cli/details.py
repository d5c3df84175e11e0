"""What a report tells of single layers and kernels, beside the totals."""

from typing import Any

import keras
import numpy as np

from keras_compaware import _graph, measure
from keras_compaware._math.svd import above_rounding
from keras_compaware.kernels import find_targets
from keras_compaware.reporting.spectra import singular_values

_NUMBER = 96  # singular values of a kernel that are recorded


def layers_of(dense: keras.Model, small: keras.Model) -> list[dict[str, Any]]:
    """Returns what every layer cost before and costs now, as JSON values.

    A layer that was replaced by several bears its old name, and counts with all that is in it.
    Layers without weights and multiplications are left out.

    Args:
        dense: A built functional or Sequential model with full input shapes.
        small: What it was compacted to.

    Returns:
        For each layer, in execution order: `name` (its path), `class`, and pairs of values before
        and after: `parameters`, `macs` (None if the layer's kind is not known) and `channels` (of
        its output; None on the side that lacks the layer).

    Raises:
        ValueError: If a model has no static graph or no full input shapes.

    Example:
    >>> def network(units):
    ...     hidden = keras.layers.Dense(units, name="hidden")
    ...     return keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(2, name="head")])
    >>> layers_of(network(4), network(3))[1]["parameters"]
    [10, 8]
    """
    before = _costs(dense)
    after: dict[str, dict[str, Any]] = {}
    for path, cost in _costs(small).items():
        name = _owner(path, before)
        known = after.setdefault(name, {**cost, "parameters": 0, "macs": 0})
        known["parameters"] += cost["parameters"]
        known["macs"] = _sum(known["macs"], cost["macs"])
        known["channels"] = cost["channels"]
    rows = []
    nothing = {"parameters": 0, "macs": 0, "channels": None}
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, nothing), after.get(name, nothing)
        rows.append(
            {
                "name": name,
                "class": before.get(name, new)["class"],
                **{key: [old[key], new[key]] for key in nothing},
            }
        )
    return [row for row in rows if any((*row["parameters"], *row["macs"]))]


def _costs(model: keras.Model) -> dict[str, dict[str, Any]]:
    macs, seen = measure.macs_by_layer(model), set()
    found: dict[str, dict[str, Any]] = {}
    for call in _graph.trace(model, batch_size=1).calls:
        weights = getattr(call.operation, "weights", ())
        new = {id(weight): weight for weight in weights if id(weight) not in seen}
        seen |= set(new)
        row = found.setdefault(
            call.path, {"class": type(call.operation).__name__, "parameters": 0, "channels": None}
        )
        row["parameters"] += sum(int(np.prod(weight.shape)) for weight in new.values())
        row["macs"] = macs[call.path]
        if weights and call.outputs:
            shape = call.outputs[0].shape
            first = getattr(call.operation, "data_format", None) == "channels_first"
            row["channels"] = shape[1 if first else -1] if len(shape) > 1 else None
    return found


def _owner(path: str, names: dict[str, Any]) -> str:
    """The longest of some names that is the path or a folder above it; else the path itself."""
    parts = path.split("/")
    heads = ("/".join(parts[:number]) for number in range(len(parts), 0, -1))
    return next((head for head in heads if head in names), path)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def spectra_of(dense: keras.Model | None, trained: keras.Model) -> list[dict[str, Any]]:
    """Returns the singular values of every kernel, of the dense twin's as well, as JSON values.

    A kernel is seen as a matrix whose columns run over its output units; of a stack of matrices the
    values are means over the stack, the rank is the largest in it. Vectors are left out, and
    kernels that would take long.

    Args:
        dense: The dense twin, or None.
        trained: The trained model, before its kernels were split into factors.

    Returns:
        For each kernel: `name`, `layer` (the path of its layer), `full_rank`, `rank` (of the
        trained kernel: values that are more than rounding), and lists of pairs `[k, k-th largest
        value]`, the largest first: `trained` and, if the twin has the kernel, `dense`. At most 96
        pairs are kept, evenly spread on a logarithmic scale of k.

    Example:
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="head")])
    >>> (row,) = spectra_of(None, model)
    >>> row["name"], row["full_rank"], len(row["trained"])
    ('head/kernel', 4, 4)
    """
    twins = {target.name: target for target in find_targets(dense)[0]} if dense else {}
    rows = []
    for target in find_targets(trained)[0]:
        found = singular_values(target)
        if found is None:
            continue
        values, sizes = found
        row = {
            "name": target.name,
            "layer": target.name.rpartition("/")[0],
            "full_rank": values.shape[-1],
            "rank": int(above_rounding(values, sizes).sum(axis=-1).max()),
            "trained": _thinned(values.mean(axis=0)),
        }
        twin = singular_values(twins[target.name]) if target.name in twins else None
        if twin is not None:
            row["dense"] = _thinned(twin[0].mean(axis=0))
        rows.append(row)
    return rows


def _thinned(values: np.ndarray) -> list[list[float]]:
    places = np.arange(len(values))
    if len(values) > _NUMBER:
        places = np.unique(np.geomspace(1, len(values), _NUMBER).round().astype(int)) - 1
    return [[int(place) + 1, float(f"{values[place]:.5g}")] for place in places]
