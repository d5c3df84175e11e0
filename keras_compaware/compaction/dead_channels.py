"""Which channels nothing reads."""

import keras
import numpy as np


def live_channels(analysis):
    """Returns which channels are read, for every space of which some can be removed.

    A channel is dead if all that could read it is zero, or belongs to channels that are dead
    themselves: a fixpoint, which is reached from the outputs to the inputs. Where all channels of
    a space or of a tensor are dead, the first stays.

    Args:
        analysis: `Analysis` of a model.

    Returns:
        Dict from the name of a space to a boolean mask of its channels, as `shrink` takes it.
    """
    readers = _readers(analysis.flow)
    masks = {
        space.name: np.ones(space.size, bool)
        for space in analysis.spaces.free
        if any(member.role == "consumer" for member in space.members)
    }
    changed = True
    while changed:
        changed = False
        for space in reversed(analysis.spaces.free):
            if space.name in masks:
                live = masks[space.name] & _read(space, readers, analysis.keep(masks))
                changed |= not np.array_equal(live, masks[space.name])
                masks[space.name] = live
    _leave_something(analysis, masks)
    return {name: mask for name, mask in masks.items() if not mask.all()}


def _readers(flow):
    """For every weight that reads channels: `(axes with channels, their labels, nonzero there)`."""
    axes = {}
    for binding in flow.bindings.values():
        axes.setdefault(id(binding.variable), {})[binding.axis] = binding
    readers = {}
    for variable, bindings in axes.items():
        if any(binding.role == "consumer" for binding in bindings.values()):
            kernel = keras.ops.convert_to_numpy(next(iter(bindings.values())).variable)
            order = sorted(bindings)
            others = tuple(axis for axis in range(kernel.ndim) if axis not in bindings)
            labels = [bindings[axis].ids for axis in order]
            readers[variable] = (order, labels, np.any(kernel != 0, axis=others))
    return readers


def _read(space, readers, keep):
    """Which channels of a space a weight reads for channels that are kept."""
    read = np.zeros(space.size, bool)
    for member in space.members:
        if member.role != "consumer":
            continue
        axes, labels, filled = readers[id(member.variable)]
        place = axes.index(member.axis)
        for axis in reversed(range(len(axes))):
            if axis != place:
                filled = np.compress(keep.mask(labels[axis]), filled, axis=axis).any(
                    axis=axis, keepdims=True
                )
        filled = filled.reshape(-1)
        inside = member.index_map >= 0
        read[member.index_map[inside & filled]] = True
    return read


def _leave_something(analysis, masks):
    """Keeps the first channel wherever a space, a weight or a tensor would have none."""
    for mask in masks.values():
        mask[0] |= not mask.any()
    flow = analysis.flow
    channels = {
        label: (name, channel)
        for name in masks
        for channel, label in zip(*analysis.labels[name], strict=True)
    }
    bound = [binding.ids for binding in flow.bindings.values()]
    for ids in (*bound, *(ids for _, ids in flow.tensors)):
        if not analysis.keep(masks).mask(ids).any():
            name, channel = channels[ids[0]]
            masks[name][channel] = True
