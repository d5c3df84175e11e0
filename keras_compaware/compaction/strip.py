"""Back to plain Keras: no wrapper, regularizer or constraint of this package."""

import keras

from keras_compaware.base import PACKAGE, Compressor, ProximalRegularizer
from keras_compaware.compaction.rebuild import copy_weights, what_it_is_compiled_with
from keras_compaware.layers import Compressed


def stripped_layer(layer):
    """Returns `(plain layer, unbuilt; function that fills its variables once it is built)`."""
    inner = layer.layer if isinstance(layer, Compressed) else layer
    plain = type(inner).from_config(plain_config(inner))

    def fill(built):
        copy_weights(inner, built)
        if isinstance(layer, Compressed):
            for target, kernel in layer.forward_kernels():
                place = [v is target.variables[0] for v in inner.variables].index(True)
                built.variables[place].assign(kernel)

    return plain, fill


def plain_config(layer):
    """Returns a layer's configuration without regularizers and constraints of this package."""
    return _stripped(layer.get_config())


def _stripped(value):
    if _is_ours(value):
        return None
    if isinstance(value, dict):
        return {name: _stripped(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_stripped, value))
    return value


def _is_ours(value):
    if isinstance(value, (Compressor, ProximalRegularizer)):
        return True
    registered = value.get("registered_name") if isinstance(value, dict) else None
    package = registered.split(">")[0] if isinstance(registered, str) else ""
    if package.split(".")[0] != PACKAGE:
        return False
    kinds = (keras.constraints.Constraint, keras.regularizers.Regularizer)
    found = keras.saving.get_registered_object(registered)
    return isinstance(found, type) and issubclass(found, kinds)


def compile_plainly(model, like=None):
    """Compiles a model as another one, or itself, is: without a recipe's optimizer wrapper."""
    source = model if like is None else like
    config = source.get_compile_config()
    plain = _without_wrapper(config)
    if like is not None or plain != config:
        with what_it_is_compiled_with(source):
            model.compile_from_config(plain)


def _without_wrapper(value):
    if isinstance(value, dict):
        if value.get("registered_name") == f"{PACKAGE}>CompressionOptimizer":
            return _without_wrapper(value["config"]["inner_optimizer"])
        return {key: _without_wrapper(item) for key, item in value.items()}
    return value
