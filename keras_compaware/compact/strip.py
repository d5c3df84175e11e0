"""Back to plain Keras: no wrapper, regularizer or constraint of this package."""

import keras

from keras_compaware.base import PACKAGE, Compressor, ProximalRegularizer
from keras_compaware.compact.rebuild import copy_weights
from keras_compaware.layers import Compressed


def stripped_layer(layer):
    """Returns `(plain layer, unbuilt; function that fills its variables once it is built)`."""
    inner = layer.layer if isinstance(layer, Compressed) else layer
    plain = type(inner).from_config(plain_config(inner))

    def fill(built):
        copy_weights(inner, built)
        if isinstance(layer, Compressed):
            for target in layer.targets:
                place = [v is target.variables[0] for v in inner.variables].index(True)
                value = layer.compressor.settle(target.read(), target.axes)(
                    target.read(), axes=target.axes
                )
                built.variables[place].assign(value)

    return plain, fill


def plain_config(layer):
    """Returns a layer's configuration without regularizers and constraints of this package."""
    return {name: None if _is_ours(value) else value for name, value in layer.get_config().items()}


def _is_ours(value):
    if isinstance(value, (Compressor, ProximalRegularizer)):
        return True
    registered = value.get("registered_name") if isinstance(value, dict) else None
    if not isinstance(registered, str) or not registered.startswith(f"{PACKAGE}>"):
        return False
    kinds = (keras.constraints.Constraint, keras.regularizers.Regularizer)
    found = keras.saving.get_registered_object(registered)
    return isinstance(found, type) and issubclass(found, kinds)
