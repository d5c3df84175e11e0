"""Removing channels: a model in narrower layers."""

import keras
import numpy as np

from keras_compaware._graph import flat_inputs, has_graph, input_layers, trace
from keras_compaware.compaction.rebuild import copy_adapted, made_anew, zeros_at_first
from keras_compaware.compaction.strip import compile_plainly, plain_config
from keras_compaware.coupling import analyse
from keras_compaware.coupling.flow import rule_for

_EXAMPLE_SIZES = (32, 96, 256)  # tried for axes that the model leaves open
_REPORT = (
    "Please report the model's architecture; a rule registered for one of its layers can be the "
    "reason."
)


def shrink(model, keep, optimizer=False, allow_inexact=False):
    """Returns a new model in which channels are removed, in plain Keras layers.

    What remains computes exactly what it computed when nothing was read from the removed channels:
    the outputs are those of the model with the removed channels' slices of all consumers' kernels
    set to zero. Layers keep their names; widths and shapes in their configurations follow.
    Regularizers, constraints and the optimizer wrapper of this package are taken off. States that
    stateful recurrent layers hold belong to a batch, not to the model: they begin with zeros again.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed, and the
            new model shares no memory with it.
        keep: Mapping from names of `channel_spaces(model)` to what is kept of them: increasing
            indices of channels, or a boolean mask. Spaces that are not named stay whole.
        optimizer: Whether a compiled model's optimizer goes on with its state, cut like the
            weights. Default False: a fresh optimizer of the same configuration.
        allow_inexact: As of `channel_spaces`. Default False.

    Returns:
        The new model, compiled if the model is.

    Raises:
        TypeError: If `keep` is not a mapping.
        ValueError: If a space is unknown or frozen, indices do not fit, nothing would be left of
            it or of a tensor, the model is subclassed, or the optimizer's state cannot be cut.
        RuntimeError: If the new model does not have the shapes that were computed for it, or does
            not run with layers or rules of the user's own.

    Example:
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, name="hidden"),
    ...         keras.layers.Dense(2, name="head"),
    ...     ]
    ... )
    >>> [tuple(w.shape) for w in shrink(model, {"hidden": [0, 3]}).weights]
    [(8, 2), (2,), (2, 2), (2,)]
    """
    if not has_graph(model):
        name = getattr(model, "name", type(model).__name__)
        raise ValueError(
            f"shrink: the model '{name}' ({type(model).__name__}) has no static graph (subclassed, "
            "or not built), so it is not known which layers read which channels. Build it as a "
            "functional or Sequential model that begins with keras.Input(shape)."
        )
    analysis = analyse(model, allow_inexact)
    kept = analysis.keep(_masks(analysis.spaces, keep))
    _check_something_is_left(analysis, kept)
    slots = _slots(model) if optimizer else []
    rebuilder = _Rebuilder(analysis, kept)
    small = rebuilder.model(model, [tensor.shape for tensor in model.inputs])
    whole = _whole_trace(model)
    _check_shapes(analysis, kept, whole, small)
    rebuilder.copy_weights()
    if not all(_shapes_are_certain(call.operation) for call in analysis.graph.calls):
        _check_runs(model, small, whole)
    if model.compiled:
        compile_plainly(small, like=model)
        if slots:
            rebuilder.copy_slots(model, small, slots)
    return small


def _masks(spaces, keep):
    """Returns the boolean mask of every named space."""
    if not hasattr(keep, "items"):
        raise TypeError(
            "shrink: `keep` must be a mapping from names of channel spaces to indices or masks. "
            f"Received: a {type(keep).__name__}."
        )
    known = {space.name: space for space in spaces}
    masks = {}
    for name, chosen in keep.items():
        if name not in known:
            raise ValueError(
                f"shrink: the model has no channel space '{name}'. Those that can be cut: "
                f"{', '.join(space.name for space in spaces.free) or 'none'}."
            )
        masks[name] = _mask(known[name], chosen)
    return masks


def _mask(space, chosen):
    chosen = np.asarray(chosen)
    subject = f"shrink: `keep['{space.name}']`"
    if chosen.ndim != 1:
        raise ValueError(f"{subject} must be one list of indices. Received shape: {chosen.shape}.")
    if chosen.dtype == bool:
        if len(chosen) != space.size:
            raise ValueError(
                f"{subject} is a mask of {len(chosen)} entries for {space.size} channels."
            )
        mask = chosen
    else:
        if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(f"{subject} must hold integers. Received dtype: {chosen.dtype}.")
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < space.size):
            raise ValueError(
                f"{subject} must lie in [0, {space.size}). Received indices from {chosen.min()} "
                f"to {chosen.max()}."
            )
        if (np.diff(chosen) <= 0).any():
            raise ValueError(
                f"{subject} must increase, without repetitions: channels keep their order. "
                f"Received: {chosen.tolist()[:10]}."
            )
        mask = np.zeros(space.size, bool)
        mask[chosen.astype(int)] = True
    if not mask.any():
        raise ValueError(f"{subject} is empty; at least one channel must be kept.")
    if space.frozen is not None and not mask.all():
        raise ValueError(f"shrink: the channel space '{space.name}' is frozen: {space.frozen}.")
    return mask


def _check_something_is_left(analysis, keep):
    flow = analysis.flow
    bound = [(binding.name, binding.ids) for binding in flow.bindings.values()]
    for name, ids in (*bound, *flow.tensors):
        if not keep.mask(ids).any():
            raise ValueError(
                f"shrink: `keep` leaves no channel of '{name}'; keep at least one of the channels "
                "that stand there."
            )


class _Rebuilder:
    """Makes every operation anew in its cut size, once, wherever it is called."""

    def __init__(self, analysis, keep):
        self._flow = analysis.flow
        self._keep = keep
        self._new = {}  # id(operation) -> its successor
        self._pairs = []  # (layer, its successor), without nested models
        self._models = []  # (nested or outer model, its successor)
        self._cuts = {}  # id(variable) -> [(axis, labels)]
        for binding in self._flow.bindings.values():
            cuts = self._cuts.setdefault(id(binding.variable), [])
            cuts.append((binding.axis, binding.ids))

    def model(self, model, shapes):
        """Returns the successor of a model for inputs of these shapes."""
        inputs = [
            keras.Input(
                batch_shape=shape,
                dtype=tensor.dtype,
                sparse=tensor.sparse,
                name=tensor.name if layer is None else layer.name,
                optional=layer is not None and layer.optional,
            )
            for shape, tensor, layer in zip(shapes, model.inputs, input_layers(model), strict=True)
        ]
        if isinstance(model, keras.Sequential):
            new = self._sequential(model, inputs[0])
        else:
            # A plain functional model over the same tensors, which has no constructor of its own.
            plain = keras.Model(model.input, model.output, name=model.name)
            new = keras.models.clone_model(
                plain,
                input_tensors=keras.tree.pack_sequence_as(model.input, inputs),
                clone_function=lambda operation: operation,
                call_function=self._call,
            )
        self._models.append((model, new))
        return new

    def _sequential(self, model, tensor):
        layers, value = [tensor], tensor
        for layer in model.layers:
            value = self._call(layer, value)
            layers.append(self._new[id(layer)])
        return keras.Sequential(layers, name=model.name)

    def _call(self, operation, *args, **kwargs):
        new = self._successor(operation, args, kwargs)
        if not isinstance(new, keras.layers.Layer) or new.built:
            return new(*args, **kwargs)
        with zeros_at_first(new):
            return new(*args, **kwargs)

    def _successor(self, operation, args, kwargs):
        if id(operation) not in self._new:
            if has_graph(operation):
                given = flat_inputs(operation, args, kwargs)
                shapes = [
                    _input_shape(tensor, declared)
                    for tensor, declared in zip(given, operation.inputs, strict=True)
                ]
                new = self.model(operation, shapes)
            else:
                new = self._operation(operation)
            self._new[id(operation)] = new
        return self._new[id(operation)]

    def _operation(self, operation):
        is_layer = isinstance(operation, keras.layers.Layer)
        config = plain_config(operation) if is_layer else operation.get_config()
        edit = self._flow.edits.get(id(operation))
        if edit is not None:
            config = {**config, **edit(self._keep, config)}
        new = made_anew(operation, config)
        if is_layer:
            self._pairs.append((operation, new))
        return new

    def copy_weights(self):
        """Fills the new layers with slices, in memory of their own."""
        for old, new in self._pairs:
            for source, destination in zip(old.variables, new.variables, strict=True):
                destination.assign(self.cut(source, source))
            copy_adapted(old, new)
        for old, new in reversed(self._models):
            if new.trainable != old.trainable:
                new.trainable = old.trainable
        for old, new in self._pairs:
            if new.trainable != old.trainable:
                new.trainable = old.trainable

    def cut(self, values, variable):
        """Returns what is kept of an array that has the shape of a weight, as a new array."""
        array = keras.ops.convert_to_numpy(values)
        cuts = self._cuts.get(id(variable))
        if not cuts:
            return np.array(array)
        for axis, ids in cuts:
            array = np.compress(self._keep.mask(ids), array, axis=axis)
        return array

    def copy_slots(self, model, small, slots):
        """Fills the new model's optimizer with slices of the old one's state."""
        successors = {
            id(source): destination
            for old, new in self._pairs
            for source, destination in zip(old.variables, new.variables, strict=True)
        }
        if not small.optimizer.built:
            small.optimizer.build(small.trainable_variables)
        places = {}
        for slot, variable in _slots(small):
            places.setdefault(id(variable), []).append(slot)
        for slot, variable in slots:
            if variable is None:
                value, receiver = np.array(keras.ops.convert_to_numpy(slot)), None
            else:
                value, receiver = self.cut(slot, variable), successors[id(variable)]
            places[id(receiver)].pop(0).assign(value)


def _input_shape(tensor, declared):
    """Returns the shape of a nested model's input: what it leaves open stays open."""
    if tensor is None or len(tensor.shape) != len(declared.shape):
        return declared.shape if tensor is None else tensor.shape
    pairs = zip(tensor.shape, declared.shape, strict=True)
    return tuple(size if expected is not None else None for size, expected in pairs)


def _slots(model):
    """Returns `(variable of the optimizer, weight that it has the shape of, or None)`."""
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "shrink: `optimizer=True` goes on with the state of a compiled model's optimizer, and "
            f"the model '{model.name}' is not compiled."
        )
    if not model.optimizer.built:
        return []
    weights, seen, slots = {}, {}, []
    for weight in model.trainable_variables:
        weights.setdefault((weight.path.replace("/", "_"), tuple(weight.shape)), []).append(weight)
    for slot in _variables(model.optimizer):
        name = slot.path.split("/")[-1]
        fitting = [
            key for key in weights if name.startswith(f"{key[0]}_") and key[1] == tuple(slot.shape)
        ]
        if not fitting:
            if len(slot.shape):
                raise ValueError(
                    f"shrink: the optimizer's variable '{slot.path}' of shape {tuple(slot.shape)} "
                    "does not have an entry for every entry of a weight (as the factored "
                    "statistics of Adafactor), so it cannot be cut. Leave out `optimizer=True` "
                    "to begin with a fresh optimizer."
                )
            slots.append((slot, None))
            continue
        key = max(fitting, key=lambda key: len(key[0]))
        # Weights of one path, as in nested models, have their slots in the same order.
        place = seen.get((slot.path, key), 0)
        seen[slot.path, key] = place + 1
        slots.append((slot, weights[key][place % len(weights[key])]))
    return slots


def _variables(optimizer):
    """Returns the optimizer's variables without those of the wrapper that shrinking takes off."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is None:
        return list(optimizer.variables)
    if keras.saving.get_registered_name(type(optimizer)).endswith(">CompressionOptimizer"):
        return _variables(inner)
    of_inner = {id(variable) for variable in inner.variables}
    return [v for v in optimizer.variables if id(v) not in of_inner] + _variables(inner)


def _check_shapes(analysis, keep, whole, small):
    """Compares every tensor's shape with what the analysis says it must have become.

    All sizes are known, so that an operation with a wrong size in its configuration cannot hide it
    behind a -1.
    """
    shapes = [tensor.shape for tensor in whole.inputs]
    try:
        cut = trace(small, input_shapes=shapes)
    except ValueError as error:
        raise RuntimeError(
            f"shrink: the new model does not take inputs of the shapes {shapes}, which the model "
            f"takes. {_REPORT} The cause: {error}"
        ) from error
    for known, before, after in zip(analysis.graph.calls, whole.calls, cut.calls, strict=True):
        for tensor, old, new in zip(known.outputs, before.outputs, after.outputs, strict=True):
            shape = list(old.shape)
            channels = analysis.flow.channels(tensor)
            if channels is not None:
                shape[channels.axis] = keep.count(channels.ids)
            if before.path != after.path or tuple(shape) != tuple(new.shape):
                raise RuntimeError(
                    f"shrink: '{after.path}' returns the shape {tuple(new.shape)}, where "
                    f"'{before.path}' should return {tuple(shape)}. {_REPORT}"
                )


def _shapes_are_certain(operation):
    """Whether an operation returns the shapes that it infers, as Keras's own do."""
    parts = [operation]
    if isinstance(operation, keras.layers.Layer):
        parts = operation._flatten_layers()
    rules = [(part, rule_for(part)) for part in parts]
    return all(
        rule is None  # nothing around it is cut
        or (_is_from(type(part), keras.__name__) and _is_from(rule, __name__))
        for part, rule in rules
    )


def _is_from(thing, module):
    return getattr(thing, "__module__", "").split(".")[0] == module.split(".")[0]


def _check_runs(model, small, whole):
    """Runs the new model once: layers and rules of others may infer shapes that are not so."""
    examples = [
        np.full(tensor.shape, "")
        if tensor.dtype == "string"
        else keras.ops.zeros(tensor.shape, tensor.dtype)
        for tensor in whole.inputs
    ]
    if isinstance(model, keras.Sequential):
        (inputs,) = examples
    else:
        inputs = keras.tree.pack_sequence_as(small.input, examples)
    try:
        outputs = keras.tree.flatten(small(inputs, training=False))
    except Exception as error:
        raise RuntimeError(
            f"shrink: the new model does not run. {_REPORT} The cause: {error}"
        ) from error
    for declared, output in zip(whole.outputs, outputs, strict=True):
        pairs = zip(declared.shape, output.shape, strict=False)
        if len(declared.shape) != len(output.shape) or any(
            size not in (None, received) for size, received in pairs
        ):
            raise RuntimeError(
                f"shrink: the new model returns the shape {tuple(output.shape)} where "
                f"{tuple(declared.shape)} is expected. {_REPORT}"
            )


def _whole_trace(model):
    """Returns the graph of a model with all sizes known, on inputs that are large enough for it."""
    for size in _EXAMPLE_SIZES:
        shapes = [
            tuple(
                (1 if axis == 0 else size) if length is None else length
                for axis, length in enumerate(tensor.shape)
            )
            for tensor in model.inputs
        ]
        try:
            return trace(model, input_shapes=shapes)
        except ValueError as error:
            last = error
    raise last
