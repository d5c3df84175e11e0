"""Which layers of a model an error of a converter or an interpreter is about."""

import contextlib
import re
from collections.abc import Iterable

import keras

from keras_compaware import _graph
from keras_compaware.export import interpreter

_MOST = 8  # names in a message


def half_precision(model: keras.Model) -> tuple[str, list[str]] | None:
    """Returns the half precision that some of a model's layers compute in, and their names."""
    layers = _layers(model)
    for dtype in ("bfloat16", "float16"):
        if names := [name for name, layer in layers.items() if layer.compute_dtype == dtype]:
            return dtype, names
    if not _graph.has_graph(model) and model.compute_dtype.endswith("float16"):
        return model.compute_dtype, [model.name]
    return None


def recurrent(model: keras.Model) -> list[str]:
    """Returns the names of the layers that are recurrent, or hold one that is."""
    return [
        name
        for name, layer in _layers(model).items()
        if any(isinstance(inner, keras.layers.RNN) for inner in layer._flatten_layers())
    ]


def blamed(model: keras.Model, content: bytes, message: str) -> list[str]:
    """Returns the layers that the operators belong to of which LiteRT says that they failed.

    Args:
        model: what was converted.
        content: the file that it became.
        message: what LiteRT says, with "Node number 2 (RESHAPE)".

    Returns:
        Their names, by those of the operators' results, or, where these are the model's own
        outputs, of the constants that the operators read.
    """
    found: list[str] = []
    for number, kind in re.findall(r"Node number (\d+) \((\w+)\)", message):
        for results, constants in interpreter.tensor_names(content, kind, int(number)):
            for names in (results, constants):
                scopes = [scope for name in names for scope in name.split(";") if "/" in scope]
                if scopes:
                    found += scopes
                    break
    return layers_at(model, found)


def layers_at(model: keras.Model, scopes: Iterable[str]) -> list[str]:
    """Returns the layers that stand at scopes of TensorFlow.

    TensorFlow numbers scopes that it meets again: an operation of the layer "dense" in the model
    "block" of a model "net" may be called "net_1/block_1/dense_2/MatMul". Of two layers that fit,
    such as "dense" and "dense_1" for "dense_1", the number is taken for TensorFlow's.

    Args:
        model: any model.
        scopes: names of operations or their scopes.

    Returns:
        For each scope the name of its layer, behind those of the models around it, "block/dense";
        or the scope as it is, where there is no such layer. Each once.
    """
    paths = [path.split("/") for path in _layers(model)] if _graph.has_graph(model) else []
    found = []
    for scope in scopes:
        parts = scope.split("/")[1:]
        fitting = [path for path in paths if _fits(path, parts)]
        best = max(fitting, key=lambda path: (len(path), -_equal(path, parts)), default=None)
        found.append("/".join(best) if best else scope)
    return list(dict.fromkeys(found))


def listed(names: Iterable[str]) -> str:
    """Returns names for a message: "'a', 'b' and 7 more"."""
    names = list(names)
    text = ", ".join(map(repr, names[:_MOST]))
    return text if len(names) <= _MOST else f"{text} and {len(names) - _MOST} more"


def _layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """A model's layers by their paths; those of a subclassed model by their names."""
    if _graph.has_graph(model):
        with contextlib.suppress(ValueError):  # an error is being told: no other may hide it
            return {
                call.path: call.operation
                for call in _graph.calls(model)
                if isinstance(call.operation, keras.layers.Layer)
            }
    return {layer.name: layer for layer in model._flatten_layers(include_self=False)}


def _fits(path: list[str], parts: list[str]) -> bool:
    return len(path) <= len(parts) and all(
        re.fullmatch(rf"{re.escape(name)}(_\d+)?", part)
        for name, part in zip(path, parts, strict=False)
    )


def _equal(path: list[str], parts: list[str]) -> int:
    return sum(name == part for name, part in zip(path, parts, strict=False))
