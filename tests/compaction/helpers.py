"""What the tests of compaction by kind of layer share."""

import keras
import numpy as np

from keras_compaware import LowRank, compact, find_targets
from keras_compaware.measure import macs, parameters


def data(shape, number=2, seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def randomise(model):
    """Gives all weights that begin with constants random values."""
    for number, variable in enumerate(model.trainable_variables):
        if "bias" in variable.path.split("/")[-1]:
            variable.assign(data(variable.shape[1:], variable.shape[0], number))
    return model


def lower_rank(model, rank=2, only=""):
    """Gives kernels a low rank, and biases random numbers, outside of training."""
    for target in find_targets(model)[0]:
        if only in target.name:
            target.write(LowRank(rank=rank)(target.read(), axes=target.axes))
    return randomise(model)


def outputs_of(model, inputs):
    return [array(output) for output in keras.tree.flatten(model(inputs, training=False))]


def check_same(model, small, inputs, tolerance=1e-5):
    pairs = zip(outputs_of(model, inputs), outputs_of(small, inputs), strict=True)
    for expected, received in pairs:
        assert np.max(np.abs(received - expected)) <= tolerance * np.max(np.abs(expected))


def check_compact(model, inputs, path=None, saves_macs=True, **arguments):
    """All laws of compaction of one model; returns the result.

    The same outputs, fewer parameters, as many as the rows say, fewer multiply-accumulates, and a
    file (if there is a `path`) that needs nothing but Keras.
    """
    before = [array(variable).copy() for variable in model.variables]
    result = compact(model, **arguments)
    small = result.model
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, array(variable))
    check_same(model, small, inputs)
    assert result.max_error <= 1e-5
    assert parameters(small) < parameters(model)
    saved = sum(row.before - row.after for row in result.rows)
    assert parameters(model) - parameters(small) == saved
    if saves_macs:
        assert macs(small) < macs(model)
    if path is not None:
        small.save(path)
        check_same(model, keras.models.load_model(path), inputs)
        if not arguments.get("recurrent_kernels"):
            assert "keras_compaware" not in small.to_json()
    return result


def check_training(model, inputs):
    """One step on random targets moves nearly every trainable weight."""
    targets = [data(output.shape[1:], len(output), 1) for output in outputs_of(model, inputs)]
    before = [array(variable).copy() for variable in model.trainable_variables]
    eagerly = keras.backend.backend() == "tensorflow"  # for one step, tracing takes longest
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eagerly)
    assert np.isfinite(model.train_on_batch(inputs, targets if len(targets) > 1 else targets[0]))
    moved = [
        np.any(old != array(variable))
        for old, variable in zip(before, model.trainable_variables, strict=True)
    ]
    assert np.mean(moved) > 0.8
