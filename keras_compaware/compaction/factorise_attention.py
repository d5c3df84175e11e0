"""Attention layers whose projections have low rank."""

import math

import keras
import numpy as np

from keras_compaware.compaction.factorise import find_shared_factors
from keras_compaware.compaction.factorise_parts import (
    NOT_TAKEN_OVER,
    Around,
    Parts,
    as_kernel,
    dense_factor,
)
from keras_compaware.compaction.rebuild import copy_variable, copy_weights
from keras_compaware.compaction.strip import plain_config


def multi_head(layer, known):
    """`Parts` of a MultiHeadAttention layer, or why it stays.

    Inputs of a projection are made narrow by a `Dense` layer before the attention, its output is
    made wide by one behind it. The query's gate reads the same inputs as the query.
    """
    projections = _projections(layer)
    found = {"query": _shared(projections, ("query", "gate"), known)}
    found |= {name: _shared(projections, (name,), known) for name in ("key", "value")}
    found["output"] = _output(layer, projections["attention_output"], known)
    return _around(layer, projections, found, known)


def grouped_query(layer, known):
    """`Parts` of a GroupQueryAttention layer: of its keys only, or why it stays."""
    projections = _projections(layer)
    found = {"key": _shared(projections, ("key",), known)}
    found |= dict.fromkeys(("query", "value", "output"), "the layer wants them of one width")
    return _around(layer, projections, found, known)


def _projections(layer):
    inner = layer._flatten_layers(include_self=False, recursive=False)
    return {part.name: part for part in inner}


def _shared(projections, names, known):
    """Returns the `Factorisation` of projections of one input, or why there is none."""
    kernels = {
        name: as_kernel(projections[name], "kernel", known) for name in names if name in projections
    }
    return find_shared_factors(kernels)


def _output(layer, projection, known):
    kernel = as_kernel(projection, "kernel", known)
    if len(kernel[1].outputs) > 1:
        return "its outputs have more than one axis"
    if projection.activity_regularizer is not None:
        return "its outputs are regularized"
    # The narrow outputs have a bias as well, which stays zero.
    return find_shared_factors({"attention_output": kernel}, extra=int(layer.use_bias))


def _around(layer, projections, found, known):
    factors = {name: part for name, part in found.items() if not isinstance(part, str)}
    if not factors:
        return _reasons(found)
    config = {**plain_config(layer), **NOT_TAKEN_OVER}
    *_, width = projections["attention_output"].kernel.shape
    output = factors.get("output")
    if isinstance(layer, keras.layers.MultiHeadAttention):
        if output is not None:
            config["output_shape"] = output.ranks[0]
        elif "query" in factors and config["output_shape"] is None:
            config["output_shape"] = width  # by default as wide as the query
    before = {
        name: [dense_factor(layer, part.ranks[0], known.name(layer, name))]
        for name, part in factors.items()
        if name != "output"
    }
    after = []
    if output is not None:
        biases = {key: config[key] for key in ("bias_regularizer", "bias_constraint")}
        name = known.name(layer, "output")
        after = [dense_factor(layer, width, name, use_bias=layer.use_bias, **biases)]
    core = type(layer).from_config(config)
    kernels = {}
    for part in factors.values():
        kernels |= {inner: kernel for inner, kernel in part.kernels.items() if inner != "left"}
    saved = sum(math.prod(projections[inner].kernel.shape) for inner in kernels)
    saved -= sum(part.num_parameters for part in factors.values())
    if output is not None:
        saved -= output.ranks[0] * layer.use_bias
        kernels["attention_output"] = output.kernels["left"]

    def fill(new):
        for name, (dense,) in before.items():
            dense.kernel.assign(factors[name].kernels["left"])
        inner = new.core._flatten_layers(include_self=False, recursive=False)
        for old, part in zip(projections.values(), inner, strict=True):
            if part.name not in kernels:
                copy_weights(old, part)
                continue
            part.kernel.assign(kernels[part.name])
            if old.bias is None:
                continue
            if part.name == "attention_output":
                part.bias.assign(np.zeros(part.bias.shape))
            else:
                copy_variable(old.bias, part.bias)
        for dense in after:
            dense.kernel.assign(output.kernels["attention_output"])
            if layer.use_bias:
                copy_variable(projections["attention_output"].bias, dense.bias)

    return Parts(Around(core, before, after, {"key": "value"}), fill, _note(found), saved)


def _note(found):
    done = [f"{name} {part}" for name, part in found.items() if not isinstance(part, str)]
    return "; ".join([*done, f"the rest as it is: {_reasons(found)}"] if _reasons(found) else done)


def _reasons(found):
    """Why some projections stay, the same reason once."""
    names = {}
    for name, reason in found.items():
        if isinstance(reason, str):
            names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(same)}: {reason}" for reason, same in names.items())
