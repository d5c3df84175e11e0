"""Building a model again with other layers, and copying models."""

import contextlib
import copy
import tempfile

import keras
import numpy as np

from keras_compaware._graph import has_graph


def copy_model(model):
    """Returns an independent copy of a model: architecture, weights and compiled state."""
    return copy.deepcopy(model)


def clone(model, change):
    """Returns a new model in which layers are replaced, with the old weights.

    Args:
        model: A Sequential or functional model; nested ones are entered, shared layers stay shared.
        change: Function `layer -> (new layer for the graph, layer that takes the old weights)`;
            with None as the second, the weights are not copied, and the caller sets them: what
            `change` has not built begins with zeros. Called once per layer.

    Raises:
        ValueError: If the model is subclassed, since its graph is not known.
    """
    if not has_graph(model):
        if isinstance(model, keras.Sequential) and not model.built:
            raise ValueError(
                f"The model '{model.name}' is not built yet. Begin it with keras.Input(shape), or "
                "call it once on data."
            )
        raise ValueError(
            f"The model '{model.name}' ({type(model).__name__}) is subclassed: its layers can be "
            "compressed in training, but not replaced, since Keras does not know how they are "
            "connected. Build it as a functional or Sequential model."
        )
    copies = []

    def clone_function(operation):
        if not isinstance(operation, keras.Layer):
            return type(operation).from_config(operation.get_config())
        if has_graph(operation):  # Keras 3.12 does not enter models that are nested two deep
            return enter(operation)
        new, receiver = change(operation)
        if receiver is not None:
            copies.append((operation, receiver))
        stack.enter_context(zeros_at_first(new))
        return new

    def enter(nested):
        return keras.models.clone_model(nested, clone_function=clone_function, recursive=True)

    with contextlib.ExitStack() as stack:
        cloned = enter(model)
    for old, new in copies:
        copy_weights(old, new)
    return cloned


def made_anew(operation, config):
    """Returns a new operation of a configuration, unbuilt."""
    if type(operation) is keras.layers.Lambda and isinstance(config["function"], dict):
        # Bytecode would lose the names that the function uses; the function itself is at hand.
        return keras.layers.Lambda(**{**config, "function": operation.function})
    return type(operation).from_config(config)


@contextlib.contextmanager
def zeros_at_first(layer):
    """Within it, weights of a layer begin with zeros, where they are overwritten soon.

    Drawing random numbers takes longer than building the rest of a model; JAX compiles it for every
    shape. The initializers are in their places again afterwards.
    """
    initializers = [
        (part, name, value)
        for part in layer._flatten_layers()
        for name, value in vars(part).items()
        if isinstance(value, keras.initializers.Initializer) and not name.startswith("_")
    ]
    for part, name, _ in initializers:
        setattr(part, name, keras.initializers.Zeros())
    try:
        yield
    finally:
        for part, name, value in initializers:
            setattr(part, name, value)


def copy_weights(old, new):
    """Copies all variables of a layer into another one of the same structure."""
    for source, destination in zip(old.variables, new.variables, strict=True):
        copy_variable(source, destination)
    copy_adapted(old, new)


def copy_adapted(old, new):
    """Copies what `adapt` has left in a preprocessing layer beside its variables, copied before."""
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):  # Normalization computes with constants made from them
        new.finalize_state()


def copy_variable(source, destination):
    """Copies a variable's value to memory of its own.

    On JAX two variables that share an array both lose it when one of them is trained.
    """
    value = keras.ops.convert_to_tensor(source)
    if getattr(value, "is_fully_addressable", True) or value.is_fully_replicated:
        value = np.array(keras.ops.convert_to_numpy(value))
    else:  # on JAX, other processes hold parts of it
        value = keras.ops.copy(value)
    destination.assign(value)
