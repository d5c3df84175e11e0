"""Channel spaces: the sets of channels of a model that can only be cut together."""

import collections
import dataclasses
import math
import operator
from collections.abc import Sequence

import keras
import numpy as np

from keras_compaware._graph import input_layers, trace
from keras_compaware._text import text_table
from keras_compaware.coupling.flow import Flow, Keep, components
from keras_compaware.kernels import unique_name

_KERNELS = {
    (
        keras.layers.Dense,
        keras.layers.EinsumDense,
        keras.layers.Conv1D,
        keras.layers.Conv2D,
        keras.layers.Conv3D,
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
        keras.layers.DepthwiseConv1D,
        keras.layers.DepthwiseConv2D,
    ): ("kernel",),
    (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D): (
        "depthwise_kernel",
        "pointwise_kernel",
    ),
    (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell): (
        "kernel",
        "recurrent_kernel",
    ),
    # Keras does not export the cell.
    (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D): (
        "cell.kernel",
        "cell.recurrent_kernel",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one weight along which the channels of a space stand.

    Args:
        name: Path of the weight in the tree of layers, as of a `Target`: `block/conv1/kernel`.
        variable: The `keras.Variable`.
        axis: Its axis.
        index_map: Integer array (size of the axis,): the channel of the space that each entry
            belongs to, -1 for entries that belong to other spaces (after a concatenation).
        role: "producer" (writes the channels), "consumer" (reads them), or "carrier" (a number or
            small map for each channel in between).
    """

    name: str
    variable: keras.Variable
    axis: int
    index_map: np.ndarray
    role: str


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelSpace:
    """Channels that are cut together.

    Args:
        name: Path of the first layer that writes them, with "/heads" behind it for the heads of
            attention.
        size: Number of channels. Where several entries of a tensor only go together (a group of a
            grouped convolution), they are one channel.
        members: Tuple of `Member`s.
        frozen: None, or why these channels cannot be cut.
        is_wide: Whether each channel is many entries wide, as the heads of attention are; their
            number is not rounded by `choose_channels` and budgets.
    """

    name: str
    size: int
    members: tuple
    frozen: str | None = None
    is_wide: bool = False

    def __str__(self):
        roles = collections.Counter(member.role for member in self.members)
        parts = [f"{count} {role}{'s' * (count > 1)}" for role, count in sorted(roles.items())]
        end = f", frozen: {self.frozen}" if self.frozen else ""
        return f"{self.name}: {self.size} channels, {', '.join(parts)}{end}"


class ChannelSpaces(Sequence):
    """The channel spaces of a model, in the order of its graph; `print` shows a table.

    Args:
        spaces: Sequence of `ChannelSpace`s.
        kernels: Sequence of the model's dense, convolution and recurrent kernels, for `coverage`.
    """

    def __init__(self, spaces, kernels):
        self._spaces = tuple(spaces)
        self._kernels = tuple(kernels)

    def __len__(self):
        return len(self._spaces)

    def __getitem__(self, key):
        """Returns a space by its place or its name; of a slice, a tuple."""
        if isinstance(key, str):
            for space in self._spaces:
                if space.name == key:
                    return space
            raise KeyError(
                f"There is no channel space '{key}'. Those of the model: "
                f"{', '.join(space.name for space in self._spaces) or 'none'}."
            )
        return self._spaces[key]

    @property
    def free(self):
        """Tuple of the spaces that can be cut."""
        return tuple(space for space in self._spaces if space.frozen is None)

    def coverage(self):
        """Returns the share of dense, convolution and recurrent weights that a free space can cut.

        Returns:
            Number in [0, 1]: parameters of these kernels with a free channel along at least one
            axis, divided by all of them; 0 for a model without such kernels.
        """
        axes = collections.defaultdict(dict)
        for space in self.free:
            for member in space.members:
                found = axes[id(member.variable)]
                covered = found.get(member.axis, np.zeros(len(member.index_map), bool))
                found[member.axis] = covered | (member.index_map >= 0)
        total = covered = 0
        for kernel in self._kernels:
            size = math.prod(kernel.shape)
            fixed = math.prod(1.0 - float(np.mean(free)) for free in axes[id(kernel)].values())
            total += size
            covered += size * (1.0 - fixed)
        return covered / total if total else 0.0

    def __str__(self):
        rows = [
            (
                space.name,
                str(space.size),
                *(
                    str(sum(member.role == role for member in space.members))
                    for role in ("producer", "carrier", "consumer")
                ),
                "free" if space.frozen is None else f"frozen: {space.frozen}",
            )
            for space in self._spaces
        ]
        header = ("space", "channels", "producers", "carriers", "consumers", "can it be cut")
        return text_table(header, rows)

    def __repr__(self):
        return f"<ChannelSpaces: {len(self)} spaces, {len(self.free)} free>"


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The channel spaces with what it takes to cut them.

    Args:
        spaces: `ChannelSpaces`.
        flow: The `Flow`: labels of all tensors and weights, and how configurations follow.
        graph: The graph of calls that was analysed.
        labels: Dict from the name of a space to `(channel of each label, labels)`.
    """

    spaces: ChannelSpaces
    flow: Flow
    graph: object
    labels: dict

    def keep(self, masks):
        """Returns the `Keep` that goes with boolean masks of channels, by the name of the space."""
        number = sum(size for _, size, _ in self.flow.blocks)
        kept = np.ones(number, bool)
        for name, mask in masks.items():
            channels, labels = self.labels[name]
            kept[labels] = mask[channels]
        return Keep(kept)


def channel_spaces(model, allow_inexact=False):
    """Finds which channels of a model must be cut together, and which cannot be cut at all.

    A channel is followed from the layer that writes it through everything that keeps channels
    apart to the layers that read it. Where two tensors are added or multiplied, their channels go
    together; behind a concatenation, flattening, reshape or split, each entry knows its channel.
    Channels that reach the inputs or outputs of the model, or an operation that mixes them or that
    nobody has taught the package about (`register_channel_rule`), are frozen, with the reason.

    The heads of MultiHeadAttention are channels inside the layer, between its projections; those of
    GroupQueryAttention are its heads of keys and values, each with the heads of queries that read
    it. What attention reads and returns is frozen.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        allow_inexact: Whether the channels under a LayerNormalization or RMSNormalization may be
            cut. Their statistics change then, so that a cut is no longer the same as zeroing what
            is read from the channels. Default False: they are frozen.

    Returns:
        `ChannelSpaces`: a sequence of `ChannelSpace`s.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no static graph (subclassed, or not built).

    Example:
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, name="hidden"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> print(channel_spaces(model)["hidden"])
    hidden: 4 channels, 1 consumer, 2 producers
    """
    return analyse(model, allow_inexact).spaces


def analyse(model, allow_inexact=False):
    """Returns the `Analysis` of a model; arguments as of `channel_spaces`."""
    graph = trace(model)
    flow = Flow(allow_inexact)
    for tensor, declared, layer in zip(
        graph.inputs, model.inputs, input_layers(model), strict=True
    ):
        name = declared.name if layer is None else layer.name
        flow.source(tensor, f"it is the model's input '{name}'", name)
    for call in graph.calls:
        flow.apply(call)
    for tensor in graph.outputs:
        if not flow.is_fixed(tensor):
            flow.freeze(flow.channels(tensor).ids, "it is an output of the model")
    roots = flow.finish()
    spaces, labels = _spaces(flow, roots)
    return Analysis(ChannelSpaces(spaces, _kernels(model)), flow, graph, labels)


def _spaces(flow, roots):
    if not len(roots):
        return [], {}
    block = np.repeat(np.arange(len(flow.blocks)), [size for _, size, _ in flow.blocks])
    first = _connected_blocks(block, roots, len(flow.blocks))
    of_label = first[block]  # the first block of the space that a label belongs to
    reasons = {}
    for ids, reason in flow.frozen:
        for space in np.unique(of_label[ids]):
            reasons.setdefault(int(space), reason)
    wide = {int(space) for ids in flow.wide for space in np.unique(of_label[ids])}
    members, channel = collections.defaultdict(list), np.zeros(len(roots), int)
    order = np.argsort(of_label, kind="stable")
    labels_of = dict(
        zip(
            np.unique(of_label).tolist(),
            np.split(order, np.flatnonzero(np.diff(of_label[order])) + 1),
            strict=True,
        )
    )
    sizes = {}
    for space, labels in labels_of.items():
        own, index = np.unique(roots[labels], return_inverse=True)
        channel[labels] = index
        sizes[space] = len(own)
    for binding in flow.bindings.values():
        for space in np.unique(of_label[binding.ids]).tolist():
            index_map = np.where(of_label[binding.ids] == space, channel[binding.ids], -1)
            members[space].append(
                Member(binding.name, binding.variable, binding.axis, index_map, binding.role)
            )
    spaces, labels, names = [], {}, set()
    for space in sorted(members):
        name = unique_name(flow.blocks[space][2], names)
        reason = reasons.get(space)
        found = tuple(members[space])
        spaces.append(ChannelSpace(name, sizes[space], found, reason, space in wide))
        labels[name] = (channel[labels_of[space]], labels_of[space])
    return spaces, labels


def _connected_blocks(block, roots, number):
    pairs = np.unique(block * number + block[roots])
    return components(number, [np.stack(np.divmod(pairs, number))])


def _kernels(model):
    found = {}
    for layer in model._flatten_layers():
        for kinds, names in _KERNELS.items():
            if isinstance(layer, kinds):
                for name in names:
                    kernel = operator.attrgetter(name)(layer)
                    found[id(kernel)] = kernel
    return found.values()
