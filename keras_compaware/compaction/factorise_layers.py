"""Layers with one kernel of low rank, as chains of smaller layers."""

import math
import string

import keras

from keras_compaware.compaction.factorise import (
    CONVOLUTIONS,
    FORMS,
    each,
    find_factorisation,
    kernel_name,
    window_of,
)
from keras_compaware.compaction.factorise_parts import (
    NOT_TAKEN_OVER,
    Parts,
    array,
    dense_factor,
    in_sequence,
    reason_against_sequence,
)
from keras_compaware.compaction.rebuild import copy_variable
from keras_compaware.compaction.strip import plain_config
from keras_compaware.kernels import kernel_axes

_PLAIN = {
    "use_bias": False,
    "activation": "linear",
    "bias_regularizer": None,
    "activity_regularizer": None,
    "bias_constraint": None,
}


def single(layer, known):
    """`Parts` of a Dense or convolution layer, or why it stays: a chain of the same kind."""
    found = _find(layer, known)
    if isinstance(found, str):
        return found
    config = {**plain_config(layer), **NOT_TAKEN_OVER}
    names = list(found.kernels)
    layers = [
        type(layer).from_config(
            {
                **config,
                **(_PLAIN if name != names[-1] else {}),
                **_size_config(layer, found, name),
                "name": f"{layer.name}_{name}",
            }
        )
        for name in names
    ]
    note = str(found)
    if isinstance(layer, CONVOLUTIONS):
        note += ", Tucker-2" if found.form == "tucker" else f", {found.form} split"
    return _chain(layer, layers, found, note, known)


def _find(layer, known):
    reason = reason_against_sequence(layer, known)
    if reason:
        return reason
    variable = getattr(layer, kernel_name(layer))
    return find_factorisation(layer, array(variable), known.shapes(layer), known.code(variable))


def _chain(layer, layers, found, note, known, input_dtype=None):
    sequence = in_sequence(layer, layers, known, input_dtype)

    def fill(built):
        for inner, kernel in zip(built.layers, found.kernels.values(), strict=True):
            getattr(inner, kernel_name(inner)).assign(kernel)
        if getattr(layer, "bias", None) is not None:
            copy_variable(layer.bias, built.layers[-1].bias)

    size = getattr(layer, kernel_name(layer)).shape
    return Parts(sequence, fill, note, int(math.prod(size)) - found.num_parameters)


def _size_config(layer, found, name):
    """Units, or filters with what belongs to the window axes that the layer takes care of."""
    *_, outputs = found.kernels[name].shape
    if isinstance(layer, keras.layers.Dense):
        return {"units": outputs}
    own = FORMS[found.form][name]
    of_window = {
        "kernel_size": layer.kernel_size,
        "strides": layer.strides,
        "dilation_rate": layer.dilation_rate,
    }
    return {
        "filters": outputs,
        **{key: window_of(each(layer, value), own) for key, value in of_window.items()},
    }


def einsum(layer, known):
    """`Parts` of an EinsumDense layer: one equation to a new letter, one back from it."""
    equation = layer.equation.replace(" ", "")
    inputs, kernel, outputs = equation.replace("->", ",").split(",")
    letters = [part.replace(".", "") for part in (inputs, kernel, outputs)]
    reason = reason_against_equation(*letters, "..." in inputs)
    if reason:
        return f"{reason} ({layer.equation})"
    found = _find(layer, known)
    if isinstance(found, str):
        return found
    axes = kernel_axes(layer, "kernel")
    batch, reduced, made = (
        "".join(kernel[axis] for axis in role)
        for role in (axes.batch(len(kernel)), axes.inputs, axes.outputs)
    )
    rank = next(letter for letter in string.ascii_letters if letter not in equation)
    between = "".join(letter for letter in letters[0] if letter not in reduced) + rank
    sizes = dict(zip(batch + reduced + rank, found.kernels["left"].shape, strict=True))
    shape = [sizes.get(letter) for letter in between]
    elided = between
    if "..." in inputs:
        elided = f"...{between}" if inputs.startswith("...") else f"{between}..."
    config = {**plain_config(layer), **NOT_TAKEN_OVER}
    first = {
        **config,
        **{name: value for name, value in _PLAIN.items() if name != "use_bias"},
        "name": f"{layer.name}_left",
        "equation": f"{inputs},{batch}{reduced}{rank}->{elided}",
        "output_shape": shape if elided.startswith("...") else shape[1:],
        "bias_axes": None,
    }
    last = {
        **config,
        "name": f"{layer.name}_right",
        "equation": f"{elided},{batch}{rank}{made}->{outputs}",
    }
    layers = [keras.layers.EinsumDense.from_config(part) for part in (first, last)]
    return _chain(layer, layers, found, str(found), known)


def reason_against_equation(inputs, kernel, outputs, is_elided):
    """Returns why an EinsumDense of these indices is no product of matrices, or None."""
    if any(len(set(part)) < len(part) for part in (inputs, kernel, outputs)):
        return "an index of its equation is repeated"
    if set(kernel) - set(inputs + outputs) or set(inputs) - set(kernel + outputs):
        return "an index of its equation is summed over one operand only"
    if not is_elided and inputs[0] in kernel:
        return "its kernel depends on the example's place in the batch"
    return None


def embedding(layer, known):
    """`Parts` of an Embedding: a narrow table, and a `Dense` layer that widens its rows."""
    called = known.calls.get(id(layer))
    if not called:
        return "it is never called"
    found = _find(layer, known)
    if isinstance(found, str):
        return found
    config = {
        **plain_config(layer),
        "embeddings_regularizer": None,
        "embeddings_constraint": None,
        "activity_regularizer": None,
        "output_dim": found.ranks[0],
        "name": f"{layer.name}_left",
    }
    wide = dense_factor(
        layer,
        layer.output_dim,
        f"{layer.name}_right",
        activity_regularizer=plain_config(layer).get("activity_regularizer"),
    )
    layers = [keras.layers.Embedding.from_config(config), wide]
    return _chain(layer, layers, found, str(found), known, called[0].inputs[0].dtype)


def tied(layer, known):
    """Why a ReversibleEmbedding stays."""
    return "its table is read in both directions"
