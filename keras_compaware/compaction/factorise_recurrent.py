"""Recurrent layers whose kernels have low rank."""

import keras

from keras_compaware.compaction.factorise import Factorisation, find_shared_factors
from keras_compaware.compaction.factorise_parts import (
    NOT_TAKEN_OVER,
    Around,
    Parts,
    as_kernel,
    dense_factor,
    in_sequence,
    reason_against_sequence,
)
from keras_compaware.compaction.rebuild import copy_variable
from keras_compaware.compaction.strip import plain_config
from keras_compaware.layers import LowRankGRUCell, LowRankLSTMCell, LowRankSimpleRNNCell

# Cells that are known -> what they become when their recurrent kernel is split, too.
_CELLS = {
    keras.layers.LSTMCell: LowRankLSTMCell,
    keras.layers.GRUCell: LowRankGRUCell,
    keras.layers.SimpleRNNCell: LowRankSimpleRNNCell,
    LowRankLSTMCell: None,
    LowRankGRUCell: None,
    LowRankSimpleRNNCell: None,
}
# What is configured at the layer and not at its cell.
_SETTINGS = (
    "name",
    "trainable",
    "dtype",
    "activity_regularizer",
    "return_sequences",
    "return_state",
    "go_backwards",
    "stateful",
    "unroll",
    "zero_output_for_mask",
)


def recurrent(layer, known):
    """`Parts` of a recurrent layer, or why it stays.

    The input kernel's left factor becomes a `Dense` layer on the sequence; a recurrent kernel is
    split inside the cell, which is one of this package then.
    """
    return _fall_apart(layer, {"kernel": layer}, known)


def bidirectional(layer, known):
    """`Parts` of a Bidirectional layer, or why it stays: one `Dense` layer for both directions."""
    directions = {"forward": layer.forward_layer, "backward": layer.backward_layer}
    kinds = (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)
    for direction in directions.values():
        if type(direction) not in kinds:
            return f"it runs a layer of another kind ({type(direction).__name__})"
    return _fall_apart(layer, directions, known)


def _fall_apart(layer, directions, known):
    for direction in directions.values():
        if type(direction.cell) not in _CELLS:
            return f"its cell is of another kind ({type(direction.cell).__name__})"
        if direction.stateful:
            return "it is stateful: its states belong to a batch, not to the model"
    shared = _input_factors(layer, directions, known)
    recurrent_factors = {
        name: _recurrent_factors(direction, known) for name, direction in directions.items()
    }
    split = {
        name: found for name, found in recurrent_factors.items() if isinstance(found, Factorisation)
    }
    notes = [_note("", shared)]
    for name, found in recurrent_factors.items():
        if found is not None:
            kernel = "recurrent kernel" if len(directions) == 1 else f"{name} recurrent kernel"
            notes.append(_note(kernel, found))
    if isinstance(shared, str) and not split:
        return "; ".join([shared, *notes[1:]])
    saved = sum(
        _size(direction.cell.recurrent_kernel) - split[name].num_parameters
        for name, direction in directions.items()
        if name in split
    )
    before = []
    in_parts = not isinstance(shared, str)
    if in_parts:
        saved += sum(_size(direction.cell.kernel) for direction in directions.values())
        saved -= shared.num_parameters
        cell = next(iter(directions.values())).cell
        if cell.dropout > 0:  # of the inputs, as the cell did: the same entries at all steps
            name = known.name(layer, "dropout")
            before = [keras.layers.SpatialDropout1D(cell.dropout, seed=cell.seed, name=name)]
        before.append(dense_factor(layer, shared.ranks[0], known.name(layer, "left")))
    takes_states = _takes_states(layer, known)
    outer = known.name(layer, "right") if in_parts and not takes_states else layer.name
    cores = {
        name: _rebuilt(direction, split.get(name), in_parts, outer if direction is layer else None)
        for name, direction in directions.items()
    }
    core = _joined(layer, cores, outer)

    def fill(new):
        built = new
        if in_parts:
            before[-1].kernel.assign(shared.kernels["left"])
            built = new.core if takes_states else new.layers[-1]
        _fill(built, directions, shared, split)

    note = "; ".join(notes)
    if not in_parts:
        return Parts(core, fill, note, saved)
    if takes_states:
        return Parts(Around(core, {"sequences": before}), fill, note, saved)
    return Parts(in_sequence(layer, [*before, core], known), fill, note, saved)


def _input_factors(layer, directions, known):
    takes_states = _takes_states(layer, known)
    if takes_states and id(layer) in known.in_sequence:
        return "it returns states inside a Sequential"
    reason = None if takes_states else reason_against_sequence(layer, known)
    if reason:
        return reason
    cells = [direction.cell for direction in directions.values()]
    if len({cell.dropout for cell in cells}) > 1:
        return "its directions drop different shares of the inputs"
    if any(cell.dropout > 0 and cell.recurrent_dropout > 0 for cell in cells):
        return "its inputs are dropped for each gate by itself"
    return find_shared_factors(
        {name: as_kernel(direction.cell, "kernel", known) for name, direction in directions.items()}
    )


def _recurrent_factors(direction, known):
    """Returns a `Factorisation`, or why there is none, or None if there is nothing to say."""
    cell = direction.cell
    if _CELLS[type(cell)] is None:
        return "of low rank already"
    again = 0 if getattr(cell, "reset_after", True) else cell.units
    kernel = as_kernel(cell, "recurrent_kernel", known)
    found = find_shared_factors({"recurrent_kernel": kernel})
    if isinstance(found, str):
        return found
    if again and found.num_parameters + again * found.ranks[0] >= kernel[0].size:
        return f"{found} saves no multiply-accumulates"
    if not known.recurrent_kernels:
        return f"{found} needs recurrent_kernels=True"
    return found


def _takes_states(layer, known):
    """Whether a layer returns states or is called with an initial one."""
    inner = getattr(layer, "forward_layer", layer)
    return inner.return_state or any(
        len(call.args) > 1 or call.kwargs.get("initial_state") is not None
        for call in known.calls.get(id(layer), ())
    )


def _rebuilt(direction, split, narrow, name):
    """Returns a recurrent layer for a narrow input kernel, or for a split recurrent kernel."""
    changes = {**NOT_TAKEN_OVER, "dropout": 0.0} if narrow else {}
    config = plain_config(direction)
    config["name"] = name or config["name"]
    if split is None and type(direction) is not keras.layers.RNN:
        return type(direction).from_config({**config, **changes})
    kind = type(direction.cell)
    cell = {**plain_config(direction.cell), **changes}
    if split is not None:
        kind = _CELLS[kind]
        cell |= {"recurrent_regularizer": None, "recurrent_constraint": None}
        cell["rank"] = split.ranks[0]
    settings = {name: config[name] for name in _SETTINGS if name in config}
    return keras.layers.RNN(kind.from_config(cell), **settings)


def _joined(layer, cores, name):
    if "kernel" in cores:
        return cores["kernel"]
    config = {**plain_config(layer), "name": name}
    del config["layer"], config["backward_layer"]
    return keras.layers.Bidirectional(cores["forward"], backward_layer=cores["backward"], **config)


def _fill(built, directions, shared, split):
    for name, old in directions.items():
        cell = (built if name == "kernel" else getattr(built, f"{name}_layer")).cell
        if isinstance(shared, str):
            copy_variable(old.cell.kernel, cell.kernel)
        else:
            cell.kernel.assign(shared.kernels[name])
        if name in split:
            cell.recurrent_projection.assign(split[name].kernels["left"])
            cell.recurrent_kernel.assign(split[name].kernels["recurrent_kernel"])
        else:
            for attribute in ("recurrent_projection", "recurrent_kernel"):
                if hasattr(old.cell, attribute):
                    copy_variable(getattr(old.cell, attribute), getattr(cell, attribute))
        if old.cell.bias is not None:
            copy_variable(old.cell.bias, cell.bias)
        copy_variable(old.cell.seed_generator.state, cell.seed_generator.state)


def _note(kernel, found):
    if isinstance(found, str):
        return f"{kernel or 'input kernel'} as it is: {found}"
    return f"{kernel} {found}".strip()


def _size(variable):
    return variable.shape[0] * variable.shape[1]
