"""How channels pass through raw operations (`x + y`, `keras.ops.reshape(x, shape)`)."""

import keras
import numpy as np

from keras_compaware.coupling.flow import Channels, Uncoupled, register_operation_rule
from keras_compaware.coupling.layer_rules import concatenated, joined, reshape


@register_operation_rule(
    "Abs Absolute Arctan Cast Ceil Celu Conj Copy Cos Cosh Elu Erf Exp Expm1 Fabs Floor Gelu "
    "HardShrink HardSigmoid HardSilu HardSwish HardTanh Isfinite Isinf Isnan LeakyRelu Log Log10 "
    "Log1p Log2 LogSigmoid LogicalNot NanToNum Negative OnesLike Reciprocal Relu Relu6 Round Rsqrt "
    "SaturateCast Selu Sigmoid Sign Silu Sin Sinh SoftShrink Softplus Softsign SparsePlus "
    "SparseSigmoid Sqrt Square Squareplus StopGradient Tan Tanh TanhShrink Threshold Trunc "
    "ZerosLike"
)
def _entrywise(call, flow):
    return flow.channels(call.inputs[0])


@register_operation_rule("Clip")
def _clip(call, flow):
    if np.size(call.operation.x_min) > 1 or np.size(call.operation.x_max) > 1:
        raise Uncoupled(f"'{call.path}' has constants for every channel")
    return flow.channels(call.inputs[0])


@register_operation_rule(
    "Add Subtract Multiply Divide DivideNoNan TrueDivide FloorDivide Power Mod Fmod Maximum "
    "Minimum Fmax Fmin Arctan2 Hypot Logaddexp Equal NotEqual Greater GreaterEqual Less LessEqual "
    "LogicalAnd LogicalOr LogicalXor Where"
)
def _join(call, flow):
    return joined(call, flow, call.inputs, _constants(call))


def _constants(call):
    values = (*call.args, *call.kwargs.values())
    return [value for value in values if not isinstance(value, keras.KerasTensor)]


@register_operation_rule("All Amax Amin Any Max Mean Median Min Prod Std Sum Var")
def _reduce(call, flow):
    channels = flow.channels(call.inputs[0])
    ndim = len(call.inputs[0].shape)
    axes = _axes(call.operation.axis, ndim)
    if channels.axis in axes:
        raise Uncoupled(f"'{call.path}' reduces over the channels")
    if call.operation.keepdims:
        return channels
    return Channels(channels.ids, channels.axis - sum(axis < channels.axis for axis in axes))


def _axes(axis, ndim):
    if axis is None:
        return list(range(ndim))
    axes = [axis] if isinstance(axis, int) else axis
    return [axis % ndim for axis in axes]


@register_operation_rule("Softmax LogSoftmax")
def _softmax(call, flow):
    channels = flow.channels(call.inputs[0])
    if channels.axis in _axes(call.operation.axis, len(call.inputs[0].shape)):
        raise Uncoupled(f"'{call.path}' (Softmax) mixes its channels")
    return channels


@register_operation_rule("Concatenate")
def _concatenate(call, flow):
    return concatenated(call, flow, call.inputs, call.operation.axis)


@register_operation_rule("Reshape")
def _reshape(call, flow):
    channels = reshape(call, flow)
    flow.tie(call, "output", channels.ids)
    shape = call.outputs[0].shape

    def configure(keep, config):
        target = [-1 if size is None else size for size in shape]
        target[channels.axis] = keep.count(channels.ids)
        return {"newshape": tuple(target)}

    flow.configure(call, configure)
    return channels


@register_operation_rule("Split")
def _split(call, flow):
    operation = call.operation
    channels = flow.channels(call.inputs[0])
    axis = operation.axis % len(call.inputs[0].shape)
    if axis != channels.axis:
        return [channels] * len(call.outputs)
    sizes = [tensor.shape[axis] for tensor in call.outputs]
    parts = np.split(channels.ids, np.cumsum(sizes)[:-1])
    flow.tie(call, "input", channels.ids)

    def configure(keep, config):
        counts = [keep.count(ids) for ids in parts]
        if len(set(counts)) == 1:
            return {"indices_or_sections": len(counts)}
        return {"indices_or_sections": tuple(int(end) for end in np.cumsum(counts)[:-1])}

    flow.configure(call, configure)
    return [Channels(ids, axis) for ids in parts]


@register_operation_rule("Transpose")
def _transpose(call, flow):
    channels = flow.channels(call.inputs[0])
    ndim = len(call.inputs[0].shape)
    axes = call.operation.axes
    axes = list(reversed(range(ndim))) if axes is None else _axes(axes, ndim)
    return Channels(channels.ids, axes.index(channels.axis))


@register_operation_rule("Swapaxes")
def _swap_axes(call, flow):
    channels = flow.channels(call.inputs[0])
    pair = _axes((call.operation.axis1, call.operation.axis2), len(call.inputs[0].shape))
    axis = channels.axis
    return Channels(channels.ids, pair[1 - pair.index(axis)] if axis in pair else axis)


@register_operation_rule("ExpandDims")
def _expand_dims(call, flow):
    channels = flow.channels(call.inputs[0])
    new = _axes(call.operation.axis, len(call.outputs[0].shape))
    old = [axis for axis in range(len(call.outputs[0].shape)) if axis not in new]
    return Channels(channels.ids, old[channels.axis])


@register_operation_rule("Squeeze")
def _squeeze(call, flow):
    channels = flow.channels(call.inputs[0])
    shape, axis = call.inputs[0].shape, call.operation.axis
    ones = [i for i, size in enumerate(shape) if size == 1]
    gone = ones if axis is None else _axes(axis, len(shape))
    if channels.axis in gone:
        raise Uncoupled(f"'{call.path}' takes the axis of its only channel away")
    return Channels(channels.ids, channels.axis - sum(axis < channels.axis for axis in gone))


@register_operation_rule("Pad")
def _pad(call, flow):
    channels = flow.channels(call.inputs[0])
    width = call.operation.pad_width
    width = width[channels.axis] if len(width) > 1 else width[0]
    if tuple(width) != (0, 0):
        raise Uncoupled(f"'{call.path}' pads the channels")
    return channels


@register_operation_rule("GetItem")
def _get_item(call, flow):
    channels = flow.channels(call.inputs[0])
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    key = key if isinstance(key, tuple) else (key,)
    simple = all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in key)
    if not simple or key.count(Ellipsis) > 1:
        raise Uncoupled(f"'{call.path}' takes entries by an index that is not plain")
    ndim = len(call.inputs[0].shape)
    missing = ndim - sum(part is not None and part is not Ellipsis for part in key)
    place = key.index(Ellipsis) if Ellipsis in key else len(key)
    key = (*key[:place], *[slice(None)] * missing, *key[place + 1 :])
    read = written = 0
    for part in key:
        if part is None:
            written += 1
            continue
        if read == channels.axis:
            if part != slice(None):
                raise Uncoupled(f"'{call.path}' picks some of the channels")
            return Channels(channels.ids, written)
        read += 1
        written += isinstance(part, slice)
    raise Uncoupled(f"'{call.path}' takes entries by an index that is not plain")


@register_operation_rule("DepthToSpace")
def _depth_to_space(call, flow):
    channels = _last_channels(call, flow)
    blocks = channels.ids.reshape(call.operation.block_size**2, -1)
    flow.merge(blocks[:1], blocks)
    return Channels(blocks[0], -1)


@register_operation_rule("SpaceToDepth")
def _space_to_depth(call, flow):
    channels = _last_channels(call, flow)
    return Channels(np.tile(channels.ids, call.operation.block_size**2), -1)


def _last_channels(call, flow):
    channels = flow.channels(call.inputs[0])
    if call.operation.data_format != "channels_last" or channels.axis != 3:
        raise Uncoupled(f"'{call.path}' moves channels that are not along the last axis")
    return channels
