"""How channels pass through the layers of Keras: one function for each kind of layer."""

import inspect

import keras
import numpy as np
from keras import layers

from keras_compaware._graph import Call, output_spec
from keras_compaware.coupling.flow import (
    Channels,
    Uncoupled,
    register_channel_rule,
    register_operation_rule,
    reshaped,
    size_of,
)

_ENTRYWISE = {
    getattr(keras.activations, name)
    for name in (
        "celu",
        "elu",
        "exponential",
        "gelu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_tanh",
        "leaky_relu",
        "linear",
        "log_sigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "soft_shrink",
        "softplus",
        "softsign",
        "sparse_plus",
        "sparse_sigmoid",
        "squareplus",
        "tanh",
        "tanh_shrink",
        "threshold",
    )
}

_ENTRYWISE_BY_NAME = {"keras_hub>gelu_approximate"}


def rules(*kinds):
    """Registers one rule for several classes."""

    def decorate(function):
        for kind in kinds:
            register_channel_rule(kind)(function)
        return function

    return decorate


def edited(saved, edit, keep):
    """Returns a layer that stands in the configuration of another one, edited.

    Args:
        saved: What `keras.saving.serialize_keras_object` has written down of the layer.
        edit: Function `(keep, config) -> dict of changes`, or None.
        keep: The `Keep`.
    """
    saved = {key: value for key, value in saved.items() if key != "build_config"}
    changes = {} if edit is None else edit(keep, saved["config"])
    return {**saved, "config": {**saved["config"], **changes}}


def arguments_of(call):
    """Returns the arguments of a layer's call by their names."""
    return inspect.signature(call.operation.call).bind(*call.args, **call.kwargs).arguments


def channel_axis(layer):
    """Returns the axis of channels that a layer's `data_format` names."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def activated(call, flow, ids, axis):
    """Returns the `Channels` after the layer's own activation."""
    check_activation(call, flow, ids, call.operation.activation)
    return Channels(ids, axis)


def check_activation(call, flow, ids, activation):
    """Freezes channels whose activation may mix them."""
    if activation is None or activation in _ENTRYWISE:
        return
    name = getattr(activation, "__name__", None)
    if name is None or keras.saving.get_registered_name(activation) not in _ENTRYWISE_BY_NAME:
        name = name or type(activation).__name__
        flow.freeze(ids, f"the activation {name} of '{call.path}' may mix its channels")


@rules(layers.Dense)
def _dense(call, flow):
    layer = call.operation
    flow.consume(layer.kernel, 0, flow.ids(call.inputs[0], -1))
    ids = flow.produce(layer.kernel, 1)
    flow.carry(layer.bias, 0, ids, "producer")
    flow.configure(call, lambda keep, config: {"units": keep.count(ids)})
    return activated(call, flow, ids, -1)


@rules(layers.EinsumDense)
def _einsum_dense(call, flow):
    layer = call.operation
    inputs, rest = layer.equation.replace(" ", "").split(",")
    kernel, outputs = rest.split("->")
    inputs, outputs = inputs.replace("...", ""), outputs.replace("...", "")
    is_dense = (
        len(kernel) == 2
        and inputs[-1] == kernel[0]
        and outputs[-1] == kernel[1]
        and inputs[:-1] == outputs[:-1]
        and kernel[0] not in outputs
        and kernel[1] not in inputs
        and layer.bias_axes in (None, kernel[1])
    )
    if not is_dense:
        raise Uncoupled(f"the equation {layer.equation} of '{call.path}' is not that of Dense")
    flow.consume(layer.kernel, 0, flow.ids(call.inputs[0], -1))
    ids = flow.produce(layer.kernel, 1)
    flow.carry(layer.bias, 0, ids, "producer")

    def configure(keep, config):
        shape = config["output_shape"]
        if isinstance(shape, int):
            return {"output_shape": keep.count(ids)}
        return {"output_shape": (*shape[:-1], keep.count(ids))}

    flow.configure(call, configure)
    return activated(call, flow, ids, -1)


@rules(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def _convolution(call, flow):
    layer = call.operation
    axis = channel_axis(layer)
    inputs = flow.ids(call.inputs[0], axis)
    if layer.groups == 1:
        flow.consume(layer.kernel, -2, inputs)
        ids = flow.produce(layer.kernel, -1)
        flow.carry(layer.bias, 0, ids, "producer")
        flow.configure(call, lambda keep, config: {"filters": keep.count(ids)})
        return activated(call, flow, ids, axis)
    # Whole groups are cut: the channels of a group and what is made of them stay together.
    size = len(inputs) // layer.groups
    groups = inputs.reshape(layer.groups, size)
    flow.merge(groups[:, :1], groups)
    ids = np.repeat(groups[:, 0], layer.filters // layer.groups)
    flow.carry(layer.kernel, -1, ids)
    flow.carry(layer.bias, 0, ids)
    flow.configure(
        call,
        lambda keep, config: {
            "filters": keep.count(ids),
            "groups": keep.count(inputs) // size,
        },
    )
    return activated(call, flow, ids, axis)


@rules(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
def _transposed_convolution(call, flow):
    layer = call.operation
    if getattr(layer, "groups", 1) != 1:
        raise Uncoupled(f"'{call.path}' is a transposed convolution in groups")
    axis = channel_axis(layer)
    flow.consume(layer.kernel, -1, flow.ids(call.inputs[0], axis))
    ids = flow.produce(layer.kernel, -2)
    flow.carry(layer.bias, 0, ids, "producer")
    flow.configure(call, lambda keep, config: {"filters": keep.count(ids)})
    return activated(call, flow, ids, axis)


@rules(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def _depthwise(call, flow):
    layer = call.operation
    axis = channel_axis(layer)
    inputs = flow.ids(call.inputs[0], axis)
    flow.carry(layer.kernel, -2, inputs)
    ids = np.repeat(inputs, layer.depth_multiplier)
    flow.carry(layer.bias, 0, ids)
    return activated(call, flow, ids, axis)


@rules(layers.SeparableConv1D, layers.SeparableConv2D)
def _separable(call, flow):
    layer = call.operation
    axis = channel_axis(layer)
    inputs = flow.ids(call.inputs[0], axis)
    flow.carry(layer.depthwise_kernel, -2, inputs)
    flow.consume(layer.pointwise_kernel, -2, np.repeat(inputs, layer.depth_multiplier))
    ids = flow.produce(layer.pointwise_kernel, -1)
    flow.carry(layer.bias, 0, ids, "producer")
    flow.configure(call, lambda keep, config: {"filters": keep.count(ids)})
    return activated(call, flow, ids, axis)


@rules(layers.Embedding)
def _embedding(call, flow):
    layer = call.operation
    indices = flow.channels(call.inputs[0])
    if indices is not None:
        flow.freeze(indices.ids, f"'{call.path}' takes them as indices")
    ids = flow.produce(layer.embeddings, 1)
    flow.configure(call, lambda keep, config: {"output_dim": keep.count(ids)})
    return Channels(ids, -1)


@rules(layers.BatchNormalization)
def _batch_normalization(call, flow):
    layer = call.operation
    ids = flow.ids(call.inputs[0], layer.axis)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        flow.carry(getattr(layer, name, None), 0, ids)
    return Channels(ids, layer.axis % len(call.inputs[0].shape))


@register_operation_rule("LayerScale")
def _layer_scale(call, flow):
    ids = flow.ids(call.inputs[0], -1)
    flow.carry(call.operation.gamma, 0, ids)
    flow.configure(call, lambda keep, config: {"projection_dim": keep.count(ids)})
    return Channels(ids, -1)


@register_operation_rule("StochasticDepth")
def _stochastic_depth(call, flow):
    return flow.channels(call.inputs[0])


@rules(layers.GroupNormalization)
def _group_normalization(call, flow):
    layer = call.operation
    ids = flow.ids(call.inputs[0], layer.axis)
    size = len(ids) // layer.groups
    groups = ids.reshape(layer.groups, size)
    flow.merge(groups[:, :1], groups)
    flow.carry(layer.gamma, 0, ids)
    flow.carry(layer.beta, 0, ids)
    flow.configure(call, lambda keep, config: {"groups": keep.count(ids) // size})
    return Channels(ids, layer.axis % len(call.inputs[0].shape))


@rules(layers.LayerNormalization, layers.RMSNormalization)
def _layer_normalization(call, flow):
    layer = call.operation
    channels = flow.channels(call.inputs[0])
    if channels is None:
        return None
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    axes = [axis % len(call.inputs[0].shape) for axis in axes]
    if channels.axis not in axes:
        return channels
    if not flow.allow_inexact:
        raise Uncoupled(f"'{call.path}' ({type(layer).__name__}) mixes its channels")
    for name in ("gamma", "beta", "scale"):
        weight = getattr(layer, name, None)
        if isinstance(weight, keras.Variable):
            flow.carry(weight, axes.index(channels.axis), channels.ids)
    return channels


@rules(layers.UnitNormalization, layers.Softmax)
def _normalises(call, flow):
    layer = call.operation
    channels = flow.channels(call.inputs[0])
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if channels.axis in [axis % len(call.inputs[0].shape) for axis in axes]:
        raise Uncoupled(f"'{call.path}' ({type(layer).__name__}) mixes its channels")
    return channels


@rules(layers.Activation)
def _activation(call, flow):
    channels = flow.channels(call.inputs[0])
    check_activation(call, flow, channels.ids, call.operation.activation)
    return channels


@rules(
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.Identity,
    layers.GaussianNoise,
    layers.GaussianDropout,
    layers.ActivityRegularization,
)
def _entrywise(call, flow):
    return flow.channels(call.inputs[0])


@rules(
    layers.Dropout,
    layers.AlphaDropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
)
def _dropout(call, flow):
    channels = flow.channels(call.inputs[0])
    shape = getattr(call.operation, "noise_shape", None)
    if shape is not None and shape[channels.axis] not in (None, 1):
        raise Uncoupled(f"the noise_shape of '{call.path}' states the number of channels")
    return channels


@rules(layers.Rescaling)
def _rescaling(call, flow):
    layer = call.operation
    if np.size(layer.scale) > 1 or np.size(layer.offset) > 1:
        raise Uncoupled(f"'{call.path}' (Rescaling) has constants for every channel")
    return flow.channels(call.inputs[0])


@rules(layers.Normalization)
def _normalization(call, flow):
    channels = flow.channels(call.inputs[0])
    if channels is not None:
        raise Uncoupled(f"'{call.path}' (Normalization) has constants for every channel")
    return None


@rules(layers.PReLU)
def _prelu(call, flow):
    channels = flow.channels(call.inputs[0])
    alpha = call.operation.alpha
    if channels is None:
        return None
    if alpha.shape[channels.axis - 1] == len(channels.ids) > 1:
        flow.carry(alpha, channels.axis - 1, channels.ids)
    elif len(channels.ids) == 1:
        flow.freeze(channels.ids, f"it is the only channel of '{call.path}'")
    return channels


def _on_channels(call, flow):
    """Returns the `Channels`, which must be along the layer's channel axis."""
    channels = flow.channels(call.inputs[0])
    axis = channel_axis(call.operation) % len(call.inputs[0].shape)
    if channels.axis != axis:
        raise Uncoupled(f"'{call.path}' works along the axis of the channels")
    return channels


@rules(
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
)
def _spatial(call, flow):
    return _on_channels(call, flow)


@rules(
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
)
def _global_pooling(call, flow):
    channels = _on_channels(call, flow)
    return Channels(channels.ids, channels.axis if call.operation.keepdims else 1)


@register_operation_rule("CustomScaleLayer")  # of InceptionResNetV2: x + scale * y
@rules(
    layers.Add,
    layers.Subtract,
    layers.Multiply,
    layers.Average,
    layers.Maximum,
    layers.Minimum,
)
def _merge(call, flow):
    return joined(call, flow, call.inputs)


def joined(call, flow, tensors, constants=()):
    """Returns the `Channels` of an elementwise join with broadcasting.

    Args:
        call: The call.
        flow: The `Flow`.
        tensors: Symbolic tensors that are joined.
        constants: What else is joined: scalars, arrays, variables.

    Raises:
        Uncoupled: If the channels cannot be followed.
    """
    shape = call.outputs[0].shape
    labelled = {}
    for tensor in tensors:
        channels = flow.channels(tensor)
        if channels is not None:
            place = channels.axis + len(shape) - len(tensor.shape)
            labelled.setdefault(place, []).append(channels.ids)
    if len(labelled) > 1:
        raise Uncoupled(f"'{call.path}' joins channels along different axes")
    ((place, groups),) = labelled.items()
    size = shape[place]

    def fix(reason):
        for ids in groups:
            flow.freeze(ids, reason)

    for ids in groups:
        if len(ids) != size:
            flow.freeze(ids, f"'{call.path}' broadcasts it over other channels")
    whole = [ids for ids in groups if len(ids) == size]
    for ids in whole[1:]:
        flow.merge(whole[0], ids)
    for tensor in tensors:
        axis = place - len(shape) + len(tensor.shape)
        if flow.is_fixed(tensor) and axis >= 0 and tensor.shape[axis] != 1:
            fix(f"'{call.path}' joins it with {flow.origin(tensor)}")
    for constant in constants:
        sizes = np.shape(constant)
        axis = place - len(shape) + len(sizes)
        if axis >= 0 and sizes[axis] != 1:
            fix(f"'{call.path}' joins it with a constant for every channel")
    return Channels(whole[0], place) if whole else None


@rules(layers.Concatenate)
def _concatenate(call, flow):
    return concatenated(call, flow, call.inputs, call.operation.axis)


def concatenated(call, flow, tensors, axis):
    """Returns the `Channels` of tensors that stand behind each other along an axis."""
    axis = axis % len(call.outputs[0].shape)
    known = [channels for channels in map(flow.channels, tensors) if channels is not None]
    if any(channels.axis == axis for channels in known):
        return Channels(np.concatenate([flow.ids(tensor, axis) for tensor in tensors]), axis)
    place = known[0].axis
    parts = [flow.ids(tensor, place) for tensor in tensors]
    for ids in parts[1:]:
        flow.merge(parts[0], ids)
    return Channels(parts[0], place)


@rules(layers.Flatten)
def _flatten(call, flow):
    channels = flow.channels(call.inputs[0])
    shape, axis = list(call.inputs[0].shape[1:]), channels.axis - 1
    if axis < 0 or size_of(shape) is None:
        raise Uncoupled(f"'{call.path}' (Flatten) works on sizes that are not known")
    if call.operation.data_format == "channels_first" and len(shape) > 1:
        shape = [*shape[1:], shape[0]]
        axis = (axis - 1) % len(shape)
    ids, _ = reshaped(flow, channels.ids, axis, shape, [size_of(shape)])
    return Channels(ids, 1)


@rules(layers.Reshape)
def _reshape(call, flow):
    channels = reshape(call, flow)
    flow.tie(call, "output", channels.ids)
    shape = call.outputs[0].shape[1:]

    def configure(keep, config):
        target = [-1 if size is None else size for size in shape]
        target[channels.axis - 1] = keep.count(channels.ids)
        return {"target_shape": tuple(target)}

    flow.configure(call, configure)
    return channels


def reshape(call, flow):
    """Returns the `Channels` after a reshape, with a non-negative axis."""
    channels = flow.channels(call.inputs[0])
    before, after = call.inputs[0].shape, call.outputs[0].shape
    axis = channels.axis
    if axis == len(before) - 1 and after[-1] == before[-1]:
        return Channels(channels.ids, len(after) - 1)
    if axis == 0 or before[0] != after[0] or None in before[1:] or None in after[1:]:
        raise Uncoupled(f"'{call.path}' reshapes sizes that are not known")
    ids, place = reshaped(flow, channels.ids, axis - 1, before[1:], after[1:])
    return Channels(ids, place + 1)


@rules(layers.Permute)
def _permute(call, flow):
    channels = flow.channels(call.inputs[0])
    return Channels(channels.ids, (0, *call.operation.dims).index(channels.axis))


@rules(layers.RepeatVector)
def _repeat_vector(call, flow):
    channels = flow.channels(call.inputs[0])
    return None if channels is None else Channels(channels.ids, 2)


@rules(layers.MultiHeadAttention)
def _multi_head_attention(call, flow):
    _refuse_other_attention(call, layers.MultiHeadAttention)
    heads, results = _attention(call, flow, 1, len(call.operation.attention_axes))
    flow.configure(call, lambda keep, config: {"num_heads": keep.count(heads)})
    return results


@rules(layers.GroupQueryAttention)
def _grouped_query_attention(call, flow):
    """A head of keys and values is cut with all heads of queries that read it."""
    _refuse_other_attention(call, layers.GroupQueryAttention)
    repeats = call.operation.num_query_heads // call.operation.num_key_value_heads
    heads, results = _attention(call, flow, repeats, 1)
    flow.configure(
        call,
        lambda keep, config: {
            "num_query_heads": keep.count(heads),
            "num_key_value_heads": keep.count(heads) // repeats,
        },
    )
    return results


def _refuse_other_attention(call, known):
    """Keras offers the steps of attention to be redefined, not only `build` and `call`."""
    kinds = type(call.operation).__mro__
    for kind in kinds[: kinds.index(known)]:
        for name, value in vars(kind).items():
            if name not in ("__init__", "get_config") and callable(value) and name in vars(known):
                raise Uncoupled(f"'{call.path}' ({kind.__name__}) has a `{name}` of its own")


def _attention(call, flow, repeats, num_axes):
    """The heads of attention: channels between its projections. Its inputs stay as they are.

    Args:
        call: The call.
        flow: The `Flow`.
        repeats: Number of heads of queries for each head of keys and values.
        num_axes: Number of axes that are attended over.

    Returns:
        `(label of every head of queries, what the rule returns)`.
    """
    layer = call.operation
    for tensor in call.inputs:
        if not flow.is_fixed(tensor):
            reason = f"of '{call.path}' ({type(layer).__name__}) only the heads can be cut"
            flow.freeze(flow.channels(tensor).ids, reason)
    parts = layer._flatten_layers(include_self=False, recursive=False)
    parts = {part.name: part for part in parts}
    with flow.inside("key"):
        groups = flow.produce(parts["key"].kernel, 1, name=f"{call.path}/heads")
    flow.mark_wide(groups)
    heads = np.repeat(groups, repeats)
    for name, ids in (("key", groups), ("value", groups), ("query", heads), ("gate", heads)):
        if name in parts:
            with flow.inside(name):
                flow.carry(parts[name].kernel, 1, ids, "producer")
                flow.carry(parts[name].bias, 0, ids, "producer")
    output = parts["attention_output"]
    with flow.inside(output.name):
        flow.consume(output.kernel, 0, heads)
    flow.read_inside(call, output, heads, -2)
    arguments = arguments_of(call)
    rank = len(arguments["query"].shape)
    mask = arguments.get("attention_mask")
    shape = mask.shape if hasattr(mask, "shape") else np.shape(mask)
    # The scores are (..., heads, axes of the queries, axes of the keys), here the mask as well.
    if len(shape) == rank + num_axes and shape[rank - num_axes - 1] != 1:
        flow.freeze(groups, f"the mask of '{call.path}' has an entry for every head")
    if len(call.outputs) == 1:
        return heads, None
    if rank != 3:  # Keras infers other shapes than it returns
        flow.freeze(groups, f"'{call.path}' returns the scores of its heads")
        return heads, [None, None]
    return heads, [None, Channels(heads, 1)]


@rules(layers.TimeDistributed)
def _time_distributed(call, flow):
    """The rule of the inner layer, on tensors without the axis of time."""
    outer, inner = call.operation, call.operation.layer
    (sequence,) = call.inputs
    channels = flow.channels(sequence)
    if channels is not None and channels.axis == 1:
        raise Uncoupled(f"'{call.path}' takes the axis of the channels for time")
    frame = keras.KerasTensor((sequence.shape[0], *sequence.shape[2:]), sequence.dtype)
    if channels is None:
        flow.inherit(frame, sequence)
    else:
        flow.enter(frame, Channels(channels.ids, channels.axis - 1))
    output = output_spec(inner, frame)
    path = call.path if inner.name == outer.name else f"{call.path}/{inner.name}"
    inner_call = Call(inner, (frame,), (output,), path, (frame,))
    flow.path = path
    result = flow.follow(inner_call)
    flow.path = call.path

    edit = flow.edits.get(id(inner))
    flow.configure(call, lambda keep, config: {"layer": edited(config["layer"], edit, keep)})
    if result is None:
        return None
    return Channels(result.ids, result.axis % len(output.shape) + 1)
