"""Building a model again with other layers, and copying models."""

import contextlib
import copy
import tempfile
import types

import keras
import numpy as np

from keras_compaware._graph import has_graph


def copy_model(model):
    """Returns an independent copy of a model: architecture, weights and compiled state."""
    with what_it_is_compiled_with(model, check=False):  # it copies lambdas as well
        return copy.deepcopy(model)


@contextlib.contextmanager
def what_it_is_compiled_with(model, check=True):
    """Within it, Keras finds the functions and classes by which a model was compiled.

    A new model is compiled from the configuration of the old one. That holds the mere names of
    losses, metrics and schedules of one's own, which need not be registered: they are at hand.

    Raises:
        ValueError: If something cannot be made from its configuration even so, as lambdas, unless
            `check` is False.
    """
    parts = [part for part in model._flatten_layers() if getattr(part, "compiled", False)]
    named = {}
    for part in parts:
        _collect(vars(getattr(part, "_compile_config", None) or part.optimizer), named)
    # A scope of custom objects would hide the caller's.
    known = keras.saving.get_custom_objects()
    added = {name: value for name, value in named.items() if name not in known}
    known.update(added)
    try:
        for part in parts if check else ():
            _check_compiles(part)
        yield
    finally:
        for name in added:
            known.pop(name, None)


_COMPILED = (
    keras.Loss,
    keras.Metric,
    keras.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
)


def _collect(value, named, depth=4):
    """Adds the functions and classes outside Keras that stand in a value, by their names."""
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, named, depth)
        return
    is_function = isinstance(value, types.FunctionType)
    kind = value if is_function else type(value)
    if is_function or isinstance(value, _COMPILED):
        if not kind.__module__.startswith("keras."):
            named.setdefault(kind.__name__, kind)
        if not is_function and depth:
            _collect(vars(value), named, depth - 1)


def _check_compiles(model):
    try:
        keras.saving.deserialize_keras_object(model.get_compile_config())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"What the model '{model.name}' is compiled with cannot be made again from its "
            "configuration, so that the new model cannot be compiled likewise. Compile it with "
            "named functions in place of lambdas, and with classes whose get_config() returns the "
            "arguments of their constructors; or compile it anew without them, as by "
            f"model.compile(). The cause: {str(error)[:300]}"
        ) from error


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

    with what_it_is_compiled_with(model), contextlib.ExitStack() as stack:
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
