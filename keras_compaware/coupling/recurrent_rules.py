"""How channels pass through recurrent layers: their units, with all gates and states."""

import keras
import numpy as np
from keras import layers

from keras_compaware.coupling.flow import Channels, Uncoupled, rule_for
from keras_compaware.coupling.layer_rules import (
    arguments_of,
    channel_axis,
    check_activation,
    edited,
    rules,
)

_CELLS = (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell)
_CONVOLUTIONAL = (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)
_RECURRENT = (layers.SimpleRNN, layers.LSTM, layers.GRU, *_CONVOLUTIONAL, layers.RNN)
_STEPS = ("inner_loop", "get_initial_state")  # of a recurrent layer, beside `build` and `call`


@rules(*_RECURRENT)
def _recurrent(call, flow):
    """A unit is cut with its gates and states; the layer reads its own units in the next step."""
    layer, arguments = call.operation, arguments_of(call)
    states, edit = _recurrence(call, flow, layer, arguments["sequences"])
    _begin(call, flow, layer, states, arguments.get("initial_state"))
    flow.configure(call, edit)
    results = [_over_time(layer, states[-1])]
    if layer.return_state:
        results += [Channels(ids, channel_axis(layer)) for ids in states]
    return results if len(results) > 1 else results[0]


@rules(layers.Bidirectional)
def _bidirectional(call, flow):
    """Keras takes both directions for equally wide, so their units are cut in pairs."""
    outer, arguments = call.operation, arguments_of(call)
    directions, states, edits = (outer.forward_layer, outer.backward_layer), [], []
    for layer in directions:
        with flow.inside(layer.name):
            if rule_for(layer) is not _recurrent:
                described = f"'{flow.path}' ({type(layer).__name__})"
                raise Uncoupled(f"{described} inside '{call.path}' has no rule for channels")
            found, edit = _recurrence(call, flow, layer, arguments["sequences"])
        states.append(found)
        edits.append(edit)
    forward, backward = (found[-1] for found in states)
    if len(forward) != len(backward):
        raise Uncoupled(f"the directions of '{call.path}' have different numbers of units")
    flow.merge(forward, backward)
    _begin(call, flow, directions[0], [*states[0], *states[1]], arguments.get("initial_state"))

    def configure(keep, config):
        names = ("layer", "backward_layer")
        return {n: edited(config[n], edit, keep) for n, edit in zip(names, edits, strict=True)}

    flow.configure(call, configure)
    axis = channel_axis(directions[0])
    if outer.merge_mode is None:
        results = [_over_time(directions[0], ids) for ids in (forward, backward)]
    elif outer.merge_mode == "concat" and axis == -1:
        results = [_over_time(directions[0], np.concatenate([forward, backward]))]
    else:
        results = [_over_time(directions[0], forward)]
    if outer.return_state:
        results += [Channels(ids, axis) for found in states for ids in found]
    return results if len(results) > 1 else results[0]


def _over_time(layer, ids):
    """Returns the `Channels` of what a recurrent layer returns: the last output, or all."""
    axis = channel_axis(layer)
    return Channels(ids, axis + 1 if axis > 0 and layer.return_sequences else axis)


def _recurrence(call, flow, layer, sequence):
    """Binds the weights of a recurrent layer to the channels of a sequence and to its units.

    Returns:
        `(labels of the units for every state, edit of the layer's configuration)`; the output has
        the labels of the last state.
    """
    known = next(kind for kind in type(layer).__mro__ if kind in _RECURRENT)
    for name in _STEPS:
        if getattr(type(layer), name) is not getattr(known, name):
            kind = type(layer).__name__
            raise Uncoupled(f"'{flow.path}' ({kind}) has a `{name}` of its own")
    axis = channel_axis(layer)
    inputs = flow.ids(sequence, axis + 1 if axis > 0 else axis)
    if known in _CONVOLUTIONAL:
        states, edit = _units(call, flow, layer.cell, inputs, "filters")
    else:
        states, edit = _cell(call, flow, layer.cell, inputs)
    if known is layers.RNN:  # the others have the arguments of their cells
        return states, lambda keep, config: {"cell": edited(config["cell"], edit, keep)}
    return states, edit


def _cell(call, flow, cell, inputs, in_stack=False):
    """Returns `(labels of the units for every state, edit)` of a cell or of a stack of them."""
    kind = type(cell)
    if kind is layers.StackedRNNCells:
        states, edits = [], []
        with flow.inside(cell.name):
            for part in cell.cells:
                found, edit = _cell(call, flow, part, inputs, in_stack=True)
                states, edits, inputs = [*states, *found], [*edits, edit], found[-1]

        def configure(keep, config):
            pairs = zip(config["cells"], edits, strict=True)
            return {"cells": [edited(saved, edit, keep) for saved, edit in pairs]}

        return states, configure
    known = next((base for base in kind.__mro__ if base in _CELLS), None)
    if known is None or (kind.build, kind.call) != (known.build, known.call):
        raise Uncoupled(
            f"the cell of '{call.path}' ({kind.__name__}) is none of SimpleRNNCell, LSTMCell and "
            "GRUCell, of which the units are known"
        )
    return _units(call, flow, cell, inputs, "units", in_stack)


def _units(call, flow, cell, inputs, argument, in_stack=False):
    """As `_cell`, of one cell; `argument` is what its number of units is called.

    The gates stand side by side along the last axis of all weights. The states of a step are read
    through the recurrent kernel only; in between, every unit goes on by itself.
    """
    with flow.inside(cell.name):
        flow.consume(cell.kernel, -2, inputs)
        name = None if in_stack else call.path
        gates = flow.produce(cell.kernel, -1, name).reshape(-1, cell.recurrent_kernel.shape[-2])
        ids = gates[0]
        flow.merge(ids, gates)
        flow.consume(cell.recurrent_kernel, -2, ids)
        for weight in (cell.recurrent_kernel, cell.bias):
            flow.carry(weight, -1, gates.reshape(-1), "producer")
    for activation in (cell.activation, getattr(cell, "recurrent_activation", None)):
        check_activation(call, flow, ids, activation)
    number = 1 if isinstance(cell, (layers.SimpleRNNCell, layers.GRUCell)) else 2
    return [ids] * number, lambda keep, config: {argument: keep.count(ids)}


def _begin(call, flow, layer, states, given):
    """The states that a layer is given stand for its units, which are cut together with them."""
    if given is None:
        return
    given = keras.tree.flatten(given)
    if len(given) != len(states):
        raise Uncoupled(f"'{call.path}' takes states of another number than it has")
    for ids, state in zip(states, given, strict=True):
        if not isinstance(state, keras.KerasTensor):
            flow.freeze(ids, f"'{call.path}' begins with constants for every channel")
        elif flow.is_fixed(state):
            flow.freeze(ids, f"'{call.path}' begins with {flow.origin(state)}")
        else:
            flow.merge(ids, flow.ids(state, channel_axis(layer)))
