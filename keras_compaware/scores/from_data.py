"""Scores that need data: gradients of the loss, activations."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

from keras_compaware._batches import batches, inputs_of
from keras_compaware._graph import Run
from keras_compaware.base import check_integer, register
from keras_compaware.compaction.rebuild import clone, made_anew
from keras_compaware.coupling import analyse
from keras_compaware.scores.score import (
    ChannelScore,
    array,
    kernels,
    label_table,
    leave_out,
    per_channel,
    sum_over_slices,
)

_FLOAT16_LOSS_SCALE = 1024.0


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Taylor(ChannelScore):
    """The squared first-order change of the loss when a channel goes (Molchanov et al., 2019).

        score_c = mean over batches of (sum over the weights w of c of dL/dw * w)^2

    The paper takes the square of the sum over a set of weights that go together, and there the set
    is one filter. Taking all kernel slices that are cut together (as of `L1`), over all layers that
    write and read the channel, is our reading for coupled channels. Where a batch normalisation
    follows, the loss does not change with the scale of a filter, so what counts there are the
    slices that read the channel.

    The loss is the one the model was compiled with, penalties of layers included, in training mode
    (batch statistics, dropout). It is computed on a copy; the model itself is not touched.

    Args:
        data: Iterable of batches (x, y) or (x, y, sample_weight); a generator serves once.
        num_batches: Integer of at least 1: how many batches are taken. Default: all.
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, use_bias=False, name="hidden"),
    ...         keras.layers.Dense(1, use_bias=False, name="head"),
    ...     ]
    ... )
    >>> model.set_weights([np.array([[1.0, 2.0]]), np.array([[1.0], [0.0]])])
    >>> model.compile(loss="mse")
    >>> Taylor([(np.ones((1, 1)), np.zeros((1, 1)))], normalize=None)(model)  # (2 + 2)^2
    {'hidden': array([16.,  0.])}
    """

    data: Iterable = dataclasses.field(repr=False)
    num_batches: int | None = None
    normalize: str | None = "mean"

    def __post_init__(self):
        super().__post_init__()
        check_integer("Taylor", "num_batches", self.num_batches, 1, optional=True)

    def raw(self, model, spaces):
        if not model.compiled:
            raise ValueError(
                f"Taylor: the model '{model.name}' is not compiled, so there is no loss. Compile "
                "it: `model.compile(loss=...)`."
            )
        members = {space.name: kernels(self, space) for space in spaces}
        variables = {id(m.variable): m.variable for found in members.values() for m in found}
        values = {key: array(variable) for key, variable in variables.items()}
        totals = {space.name: np.zeros(space.size) for space in spaces}
        number = 0
        for gradients in self._gradients(model, variables):
            number += 1

            def product(variable, gradients=gradients):
                return values[id(variable)] * gradients[id(variable)]

            for space in spaces:
                change = sum_over_slices(members[space.name], space.size, product)
                totals[space.name] += change**2
        if not number:
            raise ValueError("Taylor: `data` yields no batch.")
        return {name: total / number for name, total in totals.items()}

    def _gradients(self, model, variables):
        """Yields for each batch the gradients, float64 arrays by the id of the model's variable."""
        copy, successors = _trainable_copy(model)
        missing = [v.path for key, v in variables.items() if key not in successors]
        if missing:
            raise ValueError(
                f"Taylor: the weight '{missing[0]}' of `spaces` is not one of the model "
                f"'{model.name}'. Pass the channel spaces of this model."
            )
        is_half = any(layer.compute_dtype == "float16" for layer in copy._flatten_layers())
        scale = _FLOAT16_LOSS_SCALE if is_half else None
        recorder = _GradientRecorder([successors[key] for key in variables], scale)
        copy.compile(
            recorder,
            loss=model.loss,
            loss_weights=_loss_weights(model),
            run_eagerly=model.run_eagerly,
            jit_compile=model.jit_compile,
            auto_scale_loss=False,
        )
        for batch in itertools.islice(batches("Taylor", self.data), self.num_batches):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
            if y is None and model.loss is not None:
                raise ValueError(
                    "Taylor: `data` must yield (x, y) or (x, y, sample_weight), for the loss needs "
                    f"targets. Received: a {type(batch).__name__} without targets."
                )
            copy.train_on_batch(x, y, weight)
            found = recorder.recorded()
            yield {key: found[id(successors[key])] / (scale or 1.0) for key in variables}


def _loss_weights(model):
    """Returns the `loss_weights` that a model was compiled with, which only its config tells."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of losses that are lambdas
            config = model.get_compile_config() or {}
    except TypeError as error:
        raise ValueError(
            f"Taylor: what the model '{model.name}' was compiled with cannot be written down by "
            "Keras, so its loss weights are not known. Compile it with a loss that is a function "
            f"or a keras.losses.Loss. The cause: {error}"
        ) from error
    return keras.saving.deserialize_keras_object(config.get("loss_weights"))


def _trainable_copy(model):
    """Returns a copy in which every layer trains, and its variables by the ids of the model's.

    A frozen batch normalisation stays frozen, for it computes something else then.
    """
    pairs = []

    def change(layer):
        new = made_anew(layer, layer.get_config())
        pairs.append((layer, new))
        return new, new

    if isinstance(model, keras.Sequential):
        (inputs,), (outputs,) = model.inputs, model.outputs
    else:
        inputs, outputs = model.input, model.output
    # A plain functional model over the same tensors is not compiled, so neither is its clone.
    copy = clone(keras.Model(inputs, outputs, name=model.name), change)
    successors = {}
    for old, new in pairs:
        successors |= {id(a): b for a, b in zip(old.variables, new.variables, strict=True)}
    for layer in copy._flatten_layers():
        layer.trainable = True
    for old, new in pairs:
        for a, b in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
            if isinstance(a, keras.layers.BatchNormalization) and not a.trainable:
                b.trainable = False
    return copy, successors


class _GradientRecorder(keras.optimizers.Optimizer):
    """Keeps the gradients of some variables in its slots and leaves the variables alone."""

    def __init__(self, variables, loss_scale_factor):
        super().__init__(0.0, name="gradients", loss_scale_factor=loss_scale_factor)
        self._wanted = {id(variable) for variable in variables}
        self._slots = {}

    def build(self, variables):
        super().build(variables)
        for place, variable in enumerate(variables):
            if id(variable) in self._wanted:
                slot = self.add_variable_from_reference(variable, "gradient")
                self._slots[place] = (id(variable), slot)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(list(trainable_variables))
        for place, (_, slot) in self._slots.items():
            self.assign(slot, ops.zeros(slot.shape, slot.dtype))
            if grads[place] is not None:
                self.assign_add(slot, grads[place])
        self.iterations.assign_add(1)

    def recorded(self):
        """Returns the last gradients by the ids of their variables."""
        return {key: array(slot) for key, slot in self._slots.values()}


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Activation(ChannelScore):
    """The mean absolute value of what is read of a channel.

    After ReLU it is the mean activation of Molchanov et al. (2017), related to the average
    percentage of zeros (APoZ; Hu et al., 2016). The mean is taken over examples, positions and the
    entries that a channel has in a tensor (after a flattening, or in a head of attention), then
    over all layers that read the channel. What reads the heads of attention is its last
    projection. Layers run in inference mode, without updates.

    Args:
        data: Iterable of batches: x, or (x, y, ...), of which x is used; a generator serves once.
        num_batches: Integer of at least 1: how many batches are taken. Default: all.
        normalize: As of `L1`.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((1,)),
    ...         keras.layers.Dense(2, activation="relu", name="hidden"),
    ...         keras.layers.Dense(1, name="head"),
    ...     ]
    ... )
    >>> _ = model.get_layer("hidden").kernel.assign(np.array([[2.0, -1.0]]))
    >>> Activation([np.array([[1.0], [3.0]])], normalize=None)(model)
    {'hidden': array([4., 0.])}
    """

    data: Iterable = dataclasses.field(repr=False)
    num_batches: int | None = None
    normalize: str | None = "mean"

    def __post_init__(self):
        super().__post_init__()
        check_integer("Activation", "num_batches", self.num_batches, 1, optional=True)

    def raw(self, model, spaces):
        analysis = _analysis_of(model, spaces)
        reads = _reads(analysis, spaces)
        means = self._means(model, analysis.graph, reads)
        space_of, channel_of = label_table(analysis, spaces)
        scores = {}
        for place, space in enumerate(spaces):
            total, number = np.zeros(space.size), np.zeros(space.size)
            for key, _, channels in reads:
                own = np.where(space_of[channels.ids] == place, channel_of[channels.ids], -1)
                entries = per_channel(np.ones(len(own)), own, space.size)
                read = entries > 0
                total[read] += per_channel(means[key], own, space.size)[read] / entries[read]
                number += read
            if not number.all():
                raise ValueError(
                    f"Activation: no layer reads {np.sum(number == 0)} of the {space.size} "
                    f"channels of the space '{space.name}', so they have no score. "
                    f"{leave_out(space)}."
                )
            scores[space.name] = total / number
        return scores

    def _means(self, model, graph, reads):
        """Returns for each read the mean absolute value along its channel axis."""
        totals, examples = collections.defaultdict(float), collections.Counter()
        wanted = collections.defaultdict(list)
        for key, layer, channels in reads:
            wanted[key[0]].append((key, layer, channels.axis))
        last = max(wanted, default=-1)

        def add(key, value, axis):
            value = ops.cast(value, "float32")
            axes = [i for i in range(len(value.shape)) if i != axis % len(value.shape)]
            totals[key] += array(ops.mean(ops.abs(value), axes)) * value.shape[0]
            examples[key] += value.shape[0]

        @contextlib.contextmanager
        def visit(place, values):
            with contextlib.ExitStack() as stack:
                for key, layer, axis in wanted.get(place, ()):
                    if layer is None:
                        add(key, values[key[1]], axis)
                    else:
                        hear = functools.partial(add, key, axis=axis)
                        stack.enter_context(_listening(layer, hear))
                yield

        number = 0
        for batch in itertools.islice(batches("Activation", self.data), self.num_batches):
            number += 1
            run = Run(graph, inputs_of("Activation", model, batch))
            while run.place <= last:
                with visit(run.place, run.values):
                    run.step()
        if not number:
            raise ValueError("Activation: `data` yields no batch.")
        return {key: total / examples[key] for key, total in totals.items()}


def _analysis_of(model, spaces):
    """Returns the analysis in which these spaces were found."""
    for allow_inexact in (False, True):
        analysis = analyse(model, allow_inexact)
        known = {space.name: _signature(space) for space in analysis.spaces}
        if all(known.get(space.name) == _signature(space) for space in spaces):
            return analysis
    raise ValueError(
        f"Activation: `spaces` are not channel spaces of the model '{model.name}' as it is now. "
        "Pass `channel_spaces(model)`."
    )


def _signature(space):
    members = [(id(m.variable), m.axis, m.role, m.index_map.tobytes()) for m in space.members]
    return space.size, members


def _reads(analysis, spaces):
    """Returns `(key, layer, Channels)` for whatever reads channels.

    Keys are the place of a call and the id of the tensor that it reads, the layer is None then; or
    the id of a layer inside, what it is called on is meant.
    """
    consumers = {
        id(member.variable)
        for space in spaces
        for member in space.members
        if member.role == "consumer"
    }
    reads = {}
    inside = analysis.flow.inner_reads
    for place, call in enumerate(analysis.graph.calls):
        if not consumers.isdisjoint(map(id, getattr(call.operation, "weights", ()))):
            found = {(place, id(t)): (None, analysis.flow.channels(t)) for t in call.inputs}
            if id(call.operation) in inside:
                layer, channels = inside[id(call.operation)]
                found[place, id(layer)] = layer, channels
            reads |= {key: read for key, read in found.items() if read[1] is not None}
    return [(key, layer, channels) for key, (layer, channels) in reads.items()]


@contextlib.contextmanager
def _listening(layer, hear):
    """Within it, `hear(inputs)` is called with whatever a layer is called on."""
    before = vars(layer).get("call")
    call = layer.call

    def heard(inputs, *args, **kwargs):
        hear(inputs)
        return call(inputs, *args, **kwargs)

    layer.call = heard
    try:
        yield
    finally:
        del layer.call
        if before is not None:
            layer.call = before
