"""The law of channel spaces: cutting channels equals zeroing what every consumer reads."""

import keras
import numpy as np

from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import channel_spaces


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def randomise(model, seed=0):
    """Gives every weight random values: biases, beta and moving statistics are not zero."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" not in variable.dtype:
            continue
        shape = tuple(variable.shape)
        if variable.name in ("variance", "moving_variance", "gamma", "scale"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.normal(size=shape) / 2
        variable.assign(value)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with constants made of its weights
    return model


def random_keep(spaces, share=0.3, seed=0):
    """Drops a share of the channels of every free space, at least one where that is possible."""
    rng = np.random.default_rng(seed)
    keep = {}
    for space in spaces.free:
        if space.size > 1:
            number = min(space.size - 1, max(1, round(share * space.size)))
            mask = np.ones(space.size, bool)
            mask[rng.choice(space.size, number, replace=False)] = False
            keep[space.name] = mask
    return keep


def inputs_of(model, seed=0):
    rng = np.random.default_rng(seed)

    def one(tensor):
        shape = [(2 if i == 0 else 8) if n is None else n for i, n in enumerate(tensor.shape)]
        if "int" in tensor.dtype:
            return rng.integers(0, 5, shape).astype(tensor.dtype)
        return rng.normal(size=shape).astype(tensor.dtype)

    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(one, inputs)


def outputs_of(model, inputs):
    return [array(t) for t in keras.tree.flatten(model(inputs, training=False))]


def zero_consumers(spaces, keep):
    """Overwrites the model: nothing is read from the channels that `keep` drops."""
    for space in spaces:
        if space.name not in keep:
            continue
        for member in space.members:
            if member.role != "consumer":
                continue
            dropped = (member.index_map >= 0) & ~keep[space.name][member.index_map]
            kernel = np.array(array(member.variable))
            np.moveaxis(kernel, member.axis, 0)[dropped] = 0
            member.variable.assign(kernel)


def check_law(model, tolerance=1e-9, share=0.3, seed=0):
    """Cuts a model at random and compares; returns `(spaces, keep, new model)`."""
    randomise(model, seed)
    spaces = channel_spaces(model)
    keep = random_keep(spaces, share, seed)
    before = [np.array(array(v)) for v in model.weights]
    inputs = inputs_of(model, seed)
    small = shrink(model, keep)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    received = outputs_of(small, inputs)
    whole = outputs_of(model, inputs)
    zero_consumers(spaces, keep)
    expected = outputs_of(model, inputs)
    effect = 0.0
    for a, b, c in zip(received, expected, whole, strict=True):
        scale = np.max(np.abs(b))
        assert scale > 0
        assert np.max(np.abs(a - b)) <= tolerance * scale
        effect = max(effect, np.max(np.abs(b - c)) / scale)
    assert effect > 10 * tolerance  # or any cut would pass
    assert small.count_params() < model.count_params()
    return spaces, keep, small
