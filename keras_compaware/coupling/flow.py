"""Labels of channels that flow through a model, and the table of rules that move them.

The channel axis of every tensor carries an integer label per entry. Layers that write channels
make new labels, layers in between pass them on, elementwise joins declare labels equal, and
consumers record which labels stand along the axes of their kernels. What nobody can follow is
frozen, with the reason.
"""

import contextlib
import dataclasses
import math

import keras
import numpy as np

LAYER_RULES = {}
OPERATION_RULES = {}
NAMED_RULES = {}  # by registered names, of layers of packages that are not imported


class Uncoupled(Exception):
    """Raised by a rule that cannot follow the channels through a call; the message says why.

    Everything that enters and leaves the call is frozen then.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The labels along one axis of a tensor.

    Args:
        ids: Integer array (size of the axis,): entries with equal labels are cut together.
        axis: The axis; negative ones count from the end.
    """

    ids: np.ndarray
    axis: int


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A tensor without an axis that could be cut; `origin` says whose it is ("it is ...")."""

    origin: str
    name: str


def register_channel_rule(layer_class):
    """Tells how channels pass through a layer class; a decorator for a function `(call, flow)`.

    The function gets the `call` (with `operation`, `inputs`, `outputs`, `args`, `kwargs`) and a
    `Flow`. It asks for the labels of the inputs, says which axes of which weights they run along,
    and returns the `Channels` of the output (a list of them for several outputs, None where there
    is no axis that could be cut). It raises `Uncoupled(reason)` where it does not know.

    - `flow.ids(tensor, axis)`: labels along an axis of an input.
    - `flow.channels(tensor)`: the `Channels` of an input, wherever its axis is, or None.
    - `flow.produce(variable, axis)`: new labels for an axis of a weight that writes channels;
      `name` for channels inside the layer, which no tensor of the model has.
    - `flow.consume(variable, axis, ids)`: this axis of a weight reads those channels.
    - `flow.carry(variable, axis, ids)`: one entry per channel, as the scale of a normalisation.
    - `flow.merge(ids, others)`: these channels are cut together, one by one.
    - `flow.freeze(ids, reason)`: these channels cannot be cut.
    - `flow.mark_wide(ids)`: each of them is many entries wide, as a head of attention; numbers of
      them are not rounded.
    - `flow.inside(name)`: a context for the weights of a layer inside this one.
    - `flow.read_inside(call, layer, ids, axis)`: a layer inside this one reads channels that no
      tensor of the model has; scores of activations look there.
    - `flow.configure(call, function)`: how the configuration follows, as a function
      `(keep, config) -> dict of changes`; `keep.count(ids)` is the number of kept channels.

    The rule counts for the class and for subclasses that redefine neither `build` nor `call`.

    Args:
        layer_class: Subclass of `keras.layers.Layer`.

    Returns:
        The decorator.

    Raises:
        TypeError: If `layer_class` is no class of Keras layers.

    Example:
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.factor = self.add_weight(shape=(input_shape[-1],), name="factor")
    ...
    ...     def call(self, x):
    ...         return x * self.factor
    >>> @register_channel_rule(Scale)
    ... def scale(call, flow):
    ...     ids = flow.ids(call.inputs[0], -1)
    ...     flow.carry(call.operation.factor, 0, ids)
    ...     return Channels(ids, -1)
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(
            "register_channel_rule: `layer_class` must be a class of Keras layers. "
            f"Received: {layer_class!r}."
        )

    def decorate(function):
        LAYER_RULES[layer_class] = function
        return function

    return decorate


def register_operation_rule(names):
    """Tells how channels pass through raw operations and layers that Keras does not export.

    A decorator for a function `(call, flow)`, as of `register_channel_rule`. Keras has no public
    name for the classes of raw operations, so they are given by the names of the classes, which
    reasons mention: "'matmul' (Matmul) has no rule for channels". Operations of other packages are
    written as layers, for which there is `register_channel_rule`.

    Args:
        names: Names of classes of Keras, separated by spaces.

    Returns:
        The decorator.

    Raises:
        TypeError: If `names` is not a string.

    Example:
    >>> @register_operation_rule("Flip")
    ... def flip(call, flow):
    ...     channels = flow.channels(call.inputs[0])
    ...     axis = call.operation.axis
    ...     if axis is None or axis % len(call.inputs[0].shape) == channels.axis:
    ...         raise Uncoupled(f"'{call.path}' turns the channels round")
    ...     return channels
    """
    if not isinstance(names, str):
        raise TypeError(
            "register_operation_rule: `names` must be the names of classes of Keras in one string, "
            f"as 'Flip Roll'. Received: {names!r}. For a layer of your own there is "
            "register_channel_rule."
        )

    def decorate(function):
        for name in names.split():
            OPERATION_RULES[name] = function
        return function

    return decorate


def rule_for(operation):
    """Returns the rule of a layer or raw operation, or None."""
    kind = type(operation)
    if isinstance(operation, keras.layers.Layer):
        for known in kind.__mro__:
            if known in LAYER_RULES:
                same = kind.call is known.call and kind.build is known.build
                return LAYER_RULES[known] if same else None
        if (name := keras.saving.get_registered_name(kind)) in NAMED_RULES:
            return NAMED_RULES[name]
    if kind.__module__.split(".")[0] == "keras":
        return OPERATION_RULES.get(kind.__name__)
    return None


def _no_rule(operation):
    """Returns why an operation has no rule, and what to do, in words that follow its name."""
    kind = type(operation)
    if not isinstance(operation, keras.layers.Layer):
        if kind.__module__.split(".")[0] == "keras":
            advice = f"register_operation_rule('{kind.__name__}') teaches it one"
        else:
            advice = "write it as a layer, for which there is register_channel_rule"
        return f"has no rule for channels: {advice}"
    why = ""
    known = next((known for known in kind.__mro__ if known in LAYER_RULES), None)
    if known is not None:
        own = "build" if kind.call is known.call else "call"
        why = f", for its `{own}` is not that of {known.__name__}"
    return f"has no rule for channels{why}: register_channel_rule({kind.__name__}) teaches it one"


class Keep:
    """Which labels are kept.

    Args:
        kept: Boolean array over all labels.
    """

    def __init__(self, kept):
        self._kept = kept

    def mask(self, ids):
        """Returns a boolean array: which of these labels are kept."""
        return self._kept[ids]

    def count(self, ids):
        """Returns how many of these labels are kept, as an integer."""
        return int(np.count_nonzero(self._kept[ids]))


@dataclasses.dataclass(eq=False)
class Binding:
    """The labels along one axis of one variable.

    Args:
        name: Path of the variable in the tree of layers.
        variable: The `keras.Variable`.
        axis: Axis of the variable, not negative.
        ids: Labels (size of the axis,).
        role: "producer", "consumer" or "carrier".
    """

    name: str
    variable: keras.Variable
    axis: int
    ids: np.ndarray
    role: str


class Flow:
    """The labels of all tensors and weights of a model; what rules ask and tell.

    Args:
        allow_inexact: Whether channels pass through normalisations that mix them.

    Attributes:
        path: Path of the call that is under way; names of weights begin with it.
    """

    def __init__(self, allow_inexact=False):
        self.allow_inexact = allow_inexact
        self.bindings = {}  # (id(variable), axis) -> Binding
        self.edits = {}  # id(operation) -> function (keep, config) -> changes
        self.inner_reads = {}  # id(operation) -> (layer inside it, Channels of what it reads)
        self.frozen = []  # (ids, reason)
        self.wide = []  # ids of channels that are many entries wide
        self.blocks = []  # (first label, number of labels, name)
        self.tensors = []  # (path, ids) of every tensor with channels
        self._merges = []
        self._states = {}
        self._fixed_ids = {}
        self._tied = {}
        self._untouchable = {}
        self._number = 0
        self._alive = []  # what is known by its id must not go away
        self.path = ""

    # What rules use.

    def channels(self, tensor):
        """Returns the `Channels` of a tensor with a non-negative axis, or None."""
        state = self._states[id(tensor)]
        return state if isinstance(state, Channels) else None

    def ids(self, tensor, axis):
        """Returns the labels along an axis; those of another axis are frozen."""
        axis = axis % len(tensor.shape)
        state = self._states[id(tensor)]
        if isinstance(state, Channels):
            if state.axis == axis:
                return state.ids
            self.freeze(state.ids, f"'{self.path}' works along another axis")
            state = _Fixed(f"'{self.path}' reads it along another axis", self.path)
        if (id(tensor), axis) not in self._fixed_ids:
            size = tensor.shape[axis]
            if size is None:
                raise Uncoupled(f"the number of channels that '{self.path}' reads is not known")
            ids = self._new(size, state.name)
            self.freeze(ids, state.origin)
            self._fixed_ids[id(tensor), axis] = ids
        return self._fixed_ids[id(tensor), axis]

    def produce(self, variable, axis, name=None):
        """Returns labels for an axis along which a weight writes channels; the same every time.

        Their space is called `name`; by default, as the layer.
        """
        axis = axis % len(variable.shape)
        known = self.bindings.get((id(variable), axis))
        if known is None:
            return self._bind(variable, axis, self._new(variable.shape[axis], name), "producer")
        return known.ids

    def consume(self, variable, axis, ids):
        """Says that an axis of a weight reads the channels `ids`."""
        self._bind(variable, axis, ids, "consumer")

    def carry(self, variable, axis, ids, role="carrier"):
        """Says that a weight, unless it is None, has an entry for each of the channels `ids`."""
        if variable is not None:
            self._bind(variable, axis, ids, role)

    def merge(self, ids, others):
        """Says that channels are cut together, one by one; the arrays are broadcast."""
        ids, others = np.broadcast_arrays(ids, others)
        differ = ids != others
        if differ.any():
            self._merges.append(np.stack([ids[differ], others[differ]]))

    def freeze(self, ids, reason):
        """Says that channels cannot be cut, and why."""
        if len(ids):
            self.frozen.append((np.unique(ids), reason))

    def mark_wide(self, ids):
        """Says that each of these channels is many entries wide along other axes."""
        self.wide.append(ids)

    def configure(self, call, function):
        """Says how the configuration follows: `function(keep, config)` returns the changes."""
        self.edits.setdefault(id(call.operation), function)

    @contextlib.contextmanager
    def inside(self, name):
        """Within it, weights are those of a layer inside the one that is called."""
        outer, self.path = self.path, f"{self.path}/{name}"
        try:
            yield
        finally:
            self.path = outer

    def read_inside(self, call, layer, ids, axis):
        """Says that a layer inside the one that is called reads channels that no tensor has."""
        self.inner_reads.setdefault(id(call.operation), (layer, Channels(ids, axis)))

    def tie(self, call, key, ids):
        """Says that every call of an operation has channels of the same place cut together."""
        self._unite((id(call.operation), key), ids)

    # What the engine uses.

    def source(self, tensor, origin, name):
        """Enters a tensor that comes from outside."""
        self._set(tensor, _Fixed(origin, name))

    def enter(self, tensor, channels):
        """Gives a tensor its labels."""
        axis = channels.axis % len(tensor.shape)
        if tensor.shape[axis] != len(channels.ids):
            raise Uncoupled(
                f"the rule of '{self.path}' gives {len(channels.ids)} labels for an axis of size "
                f"{tensor.shape[axis]}"
            )
        self._set(tensor, Channels(np.asarray(channels.ids), axis))
        self.tensors.append((self.path, channels.ids))

    def inherit(self, tensor, like):
        """Gives a tensor without channels the origin of another one."""
        self._set(tensor, self._states[id(like)])

    def is_fixed(self, tensor):
        """Whether a tensor has no axis that could be cut."""
        return isinstance(self._states[id(tensor)], _Fixed)

    def origin(self, tensor):
        """Returns whose a tensor without channels is, in words that follow a preposition."""
        state = self._states[id(tensor)]
        return state.origin.removeprefix("it is ")

    def apply(self, call):
        """Moves the labels through one call."""
        self.path = call.path
        masks = keras.tree.flatten(call.kwargs.get("mask"))
        for mask in masks:
            if isinstance(mask, keras.KerasTensor) and not self.is_fixed(mask):
                self.freeze(self.channels(mask).ids, f"'{call.path}' takes it as a mask")
        hidden = {id(mask) for mask in masks}
        call = dataclasses.replace(
            call, inputs=tuple(t for t in call.inputs if id(t) not in hidden)
        )
        before = self._number
        try:
            results = self._results(call)
        except Uncoupled as error:
            self._isolate(call, str(error), np.arange(before, self._number))
            self._leave_fixed(call, call.outputs, str(error))
            return
        if results is None:
            self._leave_fixed(call, call.outputs)

    def _results(self, call):
        results = self.follow(call)
        if results is None:
            for tensor in call.inputs:
                if not self.is_fixed(tensor):
                    described = f"'{call.path}' ({type(call.operation).__name__})"
                    self.freeze(self.channels(tensor).ids, f"it ends in {described}")
            return None
        results = results if isinstance(results, list) else [results] * len(call.outputs)
        for tensor, channels in zip(call.outputs, results, strict=True):
            if channels is None:
                self._leave_fixed(call, [tensor])
            else:
                self.enter(tensor, channels)
        return results

    def follow(self, call):
        """Returns what the rule of a call says; rules without weights only see channels."""
        operation = call.operation
        described = f"'{call.path}' ({type(operation).__name__})"
        rule = rule_for(operation)
        if rule is None:
            raise Uncoupled(f"{described} {_no_rule(operation)}")
        layers = operation._flatten_layers() if isinstance(operation, keras.layers.Layer) else ()
        for layer in layers:
            if getattr(layer, "quantization_mode", None) is not None:
                raise Uncoupled(f"{described} is quantized by Keras ({layer.quantization_mode})")
            if getattr(layer, "lora_enabled", False):
                raise Uncoupled(f"{described} has LoRA enabled")
        if all(map(self.is_fixed, call.inputs)) and not getattr(operation, "weights", ()):
            return None
        return rule(call, self)

    def _leave_fixed(self, call, outputs, reason=None):
        """Gives outputs no axis that could be cut; `reason` is why the call cannot be followed."""
        fixed = [tensor for tensor in call.inputs if self.is_fixed(tensor)]
        own_weights = isinstance(call.operation, keras.layers.Layer) and call.operation.weights
        if len(fixed) == len(call.inputs) == 1 and not own_weights:
            for tensor in outputs:
                self.inherit(tensor, fixed[0])
            return
        described = f"'{call.path}' ({type(call.operation).__name__})"
        if reason is None and len(fixed) == len(call.inputs) and not own_weights:
            why = ", of which no input can be cut"
        elif reason is None:
            why = ", which its rule leaves whole"
        else:
            why = _relative(reason, described, f"'{call.path}'")
        for tensor in outputs:
            self.source(tensor, f"it is an output of {described}{why}", call.path)

    def _isolate(self, call, reason, new):
        self.freeze(new, reason)
        for tensor in call.inputs:
            if not self.is_fixed(tensor):
                self.freeze(self.channels(tensor).ids, reason)
        for variable in getattr(call.operation, "variables", ()):
            self._untouchable[id(variable)] = reason

    def finish(self):
        """Returns for every label the smallest one that it is cut together with."""
        for binding in self.bindings.values():
            if id(binding.variable) in self._untouchable:
                self.freeze(binding.ids, self._untouchable[id(binding.variable)])
        return components(self._number, self._merges)

    def _set(self, tensor, state):
        self._states[id(tensor)] = state
        self._alive.append(tensor)

    def _new(self, size, name=None):
        ids = np.arange(self._number, self._number + size)
        self.blocks.append((self._number, size, name or self.path))
        self._number += size
        return ids

    def _bind(self, variable, axis, ids, role):
        axis = axis % len(variable.shape)
        if len(ids) != variable.shape[axis]:
            raise Uncoupled(
                f"'{self.path}/{variable.name}' has {variable.shape[axis]} entries along axis "
                f"{axis} for {len(ids)} channels"
            )
        key = (id(variable), axis)
        if key not in self.bindings:
            name = f"{self.path}/{variable.name}"
            self.bindings[key] = Binding(name, variable, axis, ids, role)
        return self._unite(key, ids)

    def _unite(self, key, ids):
        first = self._tied.setdefault(key, ids)
        if len(first) != len(ids):
            self.freeze(first, f"'{self.path}' is called on other numbers of channels as well")
            raise Uncoupled(f"'{self.path}' is called on other numbers of channels as well")
        self.merge(first, ids)
        return first


def _relative(reason, *names):
    """Returns a reason as a clause behind one of these names, with which it may begin."""
    for name in names:
        if reason.startswith(f"{name} "):
            return f", which {reason.removeprefix(name).lstrip()}"
    return f": {reason}"


def components(number, merges):
    """Returns for each of `number` labels the smallest one that it is connected with.

    Args:
        number: Integer.
        merges: List of integer arrays (2, n): pairs that are connected.
    """
    roots = np.arange(number)
    if not merges:
        return roots
    first, second = np.concatenate(merges, axis=1)
    while True:
        smaller = np.minimum(roots[first], roots[second])
        before = roots.copy()
        np.minimum.at(roots, before[first], smaller)
        np.minimum.at(roots, before[second], smaller)
        while not np.array_equal(roots, roots[roots]):
            roots = roots[roots]
        if np.array_equal(roots, before):
            return roots


def reshaped(flow, ids, axis, before, after):
    """Moves labels through a reshape; returns `(labels, axis)` of the result.

    Along the result's axis entries of one index are cut together, so labels are merged where
    several channels meet there; the axis with the most channels left is the one that counts.

    Args:
        flow: The `Flow`.
        ids: Labels along `axis`.
        axis: Axis of the shape before.
        before: Shape before, all sizes known.
        after: Shape after, all sizes known.

    Raises:
        Uncoupled: If all channels meet.
    """
    shape = [1] * len(before)
    shape[axis] = before[axis]
    names, local = np.unique(ids, return_inverse=True)
    table = np.broadcast_to(local.reshape(shape), before).reshape(after)
    best = None
    for place in reversed(range(len(after))):
        rows = np.moveaxis(table, place, 0).reshape(after[place], -1)
        pairs = _pairs(rows, len(names))
        number = len(np.unique(components(len(names), [pairs])))
        if best is None or number > best[0]:
            best = (number, place, rows[:, 0], pairs)
    number, place, labels, pairs = best
    if number == 1 and len(names) > 1:
        raise Uncoupled(f"'{flow.path}' puts all channels together")
    flow.merge(*names[pairs])
    return names[labels], place


def _pairs(rows, number):
    """Returns the different pairs (2, n) of what stands first in a row and what else is in it."""
    if (rows == rows[:, :1]).all():
        return np.empty((2, 0), int)
    codes = np.unique(rows[:, :1] * number + rows)
    return np.stack([codes // number, codes % number])


def size_of(shape):
    """Returns the number of entries of a shape, or None if a size is not known."""
    return None if None in shape else math.prod(shape)
