"""Batch normalisation folded into the layer before it."""

import collections

import keras
import numpy as np

from keras_compaware._graph import trace
from keras_compaware.compaction.rebuild import clone, copy_variable, made_anew

# layer class -> (name of the kernel, its axes of the output channels, in their order)
_LAST = {
    keras.layers.Dense: "kernel",
    keras.layers.Conv1D: "kernel",
    keras.layers.Conv2D: "kernel",
    keras.layers.Conv3D: "kernel",
    keras.layers.SeparableConv1D: "pointwise_kernel",
    keras.layers.SeparableConv2D: "pointwise_kernel",
}
_LAST_BUT_ONE = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_LAST_TWO = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_KERNELS = {
    **{kind: (name, (-1,)) for kind, name in _LAST.items()},
    **dict.fromkeys(_LAST_BUT_ONE, ("kernel", (-2,))),
    **dict.fromkeys(_LAST_TWO, ("kernel", (-2, -1))),
}


def fold_batch_norm(model):
    """Returns a model in which batch normalisation is part of the layers before it.

    With moving statistics, batch normalisation is a scale and a shift of each channel, and so is
    what it makes of a layer that is linear in its kernel:

        f = gamma / sqrt(variance + epsilon)
        kernel' = f * kernel,   bias' = f * (bias - mean) + beta

    The outputs are those of `model(x, training=False)`. The new model has fewer parameters and no
    statistics, is not compiled, and computes the same in training: fold when training is over. A
    linear `Activation` of the same name stands where a normalisation was.

    Folded is what follows a Dense, convolution, depthwise, separable or transposed convolution
    (and no subclass of them) without an activation, of which nothing else reads the output, where
    both layers are called once. Any other batch normalisation stays as it is. LiteRT's converter
    does the same by itself; ONNX and other runtimes need not.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.

    Returns:
        The new model.

    Raises:
        TypeError: If it is no Keras model.
        ValueError: If it is subclassed, or not built.

    Example:
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, use_bias=False, name="hidden"),
    ...         keras.layers.BatchNormalization(name="norm"),
    ...     ]
    ... )
    >>> folded = fold_batch_norm(model)
    >>> model.count_params(), folded.count_params()  # 8 x 4 + 4 x 4, and 8 x 4 + 4
    (48, 36)
    """
    pairs = _pairs(trace(model))
    norms = {id(norm) for norm in pairs.values()}
    linear = {id(layer): (layer, norm) for layer, norm in pairs.items()}
    made = {}

    def change(layer):
        if id(layer) in norms:
            nothing = keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
            return nothing, None
        if id(layer) in linear:
            made[id(layer)] = made_anew(layer, {**layer.get_config(), "use_bias": True})
            return made[id(layer)], None
        new = made_anew(layer, layer.get_config())
        return new, new

    folded = clone(model, change)
    for key, (layer, norm) in linear.items():
        _fill(made[key], layer, norm)
    return folded


def _pairs(graph):
    """Returns a dict from layers to the batch normalisation that is folded into each."""
    made_by = {id(tensor): call for call in graph.calls for tensor in call.outputs}
    readers = collections.Counter(id(tensor) for call in graph.calls for tensor in call.inputs)
    readers.update(id(tensor) for tensor in graph.outputs)
    times = collections.Counter(id(call.operation) for call in graph.calls)
    pairs = {}
    for call in graph.calls:
        norm = call.operation
        if type(norm) is not keras.layers.BatchNormalization or call.kwargs.get("training"):
            continue
        before = made_by.get(id(call.inputs[0]))
        if (
            before is not None
            and readers[id(call.inputs[0])] == 1
            and times[id(norm)] == times[id(before.operation)] == 1
            and _takes(before.operation, norm, len(call.inputs[0].shape))
        ):
            pairs[before.operation] = norm
    return pairs


def _takes(layer, norm, ndim):
    if type(layer) not in _KERNELS or layer.activation is not keras.activations.linear:
        return False
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return False
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    axis = norm.axis[0] if isinstance(norm.axis, (list, tuple)) else norm.axis
    return axis % ndim == (1 if first else ndim - 1)


def _fill(new, layer, norm):
    kernel_name, axes = _KERNELS[type(layer)]
    mean, variance = _array(norm.moving_mean), _array(norm.moving_variance)
    factor = (_array(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance + norm.epsilon)
    bias = _array(layer.bias) if layer.use_bias else 0.0
    shift = _array(norm.beta) if norm.center else 0.0
    for source, destination in zip(layer.variables, new.variables, strict=False):
        copy_variable(source, destination)  # the bias comes last, where there was none
    kernel = _array(getattr(layer, kernel_name))
    shape = [1] * kernel.ndim
    for axis in axes:
        shape[axis] = kernel.shape[axis]
    getattr(new, kernel_name).assign(kernel * factor.reshape(shape))
    new.bias.assign(factor * (bias - mean) + shift)


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), "float64")
