"""Channel spaces as targets: what is cut together, gathered to channels x parameters."""

import keras

from keras_compaware.base import ChannelLayout, KernelAxes, Target
from keras_compaware.coupling.spaces import channel_spaces
from keras_compaware.kernels import Skipped, walk

_PREFERENCE = ("consumer", "producer", "carrier")
_WHOLE = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def coupled_targets(model):
    """Returns `(targets, skipped)`: one target for each channel space that can be cut.

    Its tensor has a row for each channel with all trainable weights that are cut together with it:
    what writes the channel, what reads it, and what scales it in between. The row is one group of
    `GroupLasso` and `GroupPruning`; a channel whose row is zero is read by nobody, so `compact`
    removes it without changing the model's outputs. A weight that stands in the space along two of
    its axes (a layer that adds to its own input) belongs to the channel that it reads.

    A kernel between two spaces belongs to both, so the groups of neighbouring spaces overlap.
    Proximal maps are applied to one space after the other, which is the usual splitting and not the
    proximal map of the sum.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.

    Returns:
        `(list of Target, list of Skipped)`, in the order of the graph. Targets are called
        "<name of the space>/channels" and have the axes of a matrix (channels, parameters).

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no static graph.

    Example:
    >>> import keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, name="hidden"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> targets, skipped = coupled_targets(model)
    >>> [(target.name, target.shape) for target in targets]  # 8 incoming, 1 bias, 2 outgoing
    [('hidden/channels', (4, 11))]
    >>> [entry.reason for entry in skipped if "head" in entry.name]
    ['it is an output of the model']
    """
    spaces = channel_spaces(model)
    owners = _owners(model)
    targets, skipped = [], []
    for space in spaces:
        name = f"{space.name}/channels"
        members = _members(space)
        layer = owners[id(members[0].variable)] if members else None
        reason = space.frozen or _reason_against(members)
        if reason:
            skipped.append(Skipped(name, layer, reason))
        else:
            variables = tuple(member.variable for member in members)
            layout = ChannelLayout(
                shapes=[tuple(variable.shape) for variable in variables],
                axes=[member.axis for member in members],
                index_maps=[member.index_map.tolist() for member in members],
                size=space.size,
            )
            axes = KernelAxes(inputs=(0,), outputs=(1,))
            targets.append(Target(name, variables, axes, layer, layout=layout))
    return targets, skipped


def _owners(model):
    """Returns for the id of every weight the innermost layer with it; attention is one layer."""
    owners = {}
    for _, layer in walk(model):
        for weight in layer.weights:
            if not isinstance(owners.get(id(weight)), _WHOLE):
                owners[id(weight)] = layer
    return owners


def _members(space):
    """Returns one member for each weight that belongs to a channel, in order, statistics aside."""
    chosen = {}
    for role in _PREFERENCE:
        for member in space.members:
            trained = role != "carrier" or member.variable.trainable
            if member.role == role and trained:
                chosen.setdefault(id(member.variable), member)
    return [member for member in space.members if chosen.get(id(member.variable)) is member]


def _reason_against(members):
    frozen = next((member for member in members if not member.variable.trainable), None)
    return None if frozen is None else f"'{frozen.name}' is frozen (trainable=False)"
