"""The static graph of a Sequential or functional model: every call, in execution order.

Keras keeps the connections between layers in private nodes. What it offers publicly is a replay:
`keras.models.clone_model` walks the graph and shows each operation with its arguments. Here the
replay runs over stand-ins that only compute shapes, so it creates no weights and leaves the model
and its layers as they were.
"""

import collections
import contextlib
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of one operation on symbolic tensors.

    Attributes:
        operation: the layer or raw operation itself (not a copy).
        inputs: the tensors among the arguments, flattened, positional ones first. A mask that
            Keras passes on by itself (as of `Embedding(mask_zero=True)`) is one of them, as the
            keyword argument `mask`; computing it is a call as well.
        outputs: the tensors returned, flattened.
        path: names of the enclosing nested models and of the operation, joined by "/"; the
            outermost model is left out. A layer called twice has two calls with one path.
        args: positional arguments, tensors included.
        kwargs: keyword arguments, tensors included.

    A tensor returned by one call and read by another is the same object in both, also across the
    borders of nested models.
    """

    operation: keras.Operation
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]
    path: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


HUB_BLOCKS = ("keras_hub>TransformerEncoder", "keras_hub>TransformerDecoder")
"""Registered names of layers of KerasHub whose inner layers are known; it is never imported."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The calls of a model and the tensors at its ends.

    Attributes:
        calls: every call of every layer and raw operation, in execution order. A nested
            Sequential or functional model is replaced by the calls inside it.
        inputs: the model's input tensors, flattened.
        outputs: the model's output tensors, flattened.
    """

    calls: tuple[Call, ...]
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]


def trace(
    model: keras.Model,
    *,
    input_shapes: Sequence[tuple[int | None, ...]] | None = None,
    batch_size: int | None = None,
) -> Graph:
    """Replays a Sequential or functional model symbolically.

    Args:
        model: a built Sequential or functional model. It is not changed.
        input_shapes: one shape per input, batch dimension included; by default as declared.
        batch_size: takes the place of an undefined batch dimension of the inputs. None leaves it
            undefined. A batch size that the model itself declares is kept.

    Returns:
        The model's graph. Its tensors belong to the replay, not to the model.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has no static graph (subclassed, or not built), or the output shape
            of a layer cannot be inferred.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model, received {type(model).__name__}.")
    if not has_graph(model):
        raise ValueError(_why_no_graph(model))
    replay = _Replay()
    shapes = [tensor.shape for tensor in model.inputs] if input_shapes is None else input_shapes
    inputs = []
    for i, (shape, tensor) in enumerate(zip(shapes, model.inputs, strict=True)):
        if shape and shape[0] is None and batch_size is not None:
            shape = (batch_size, *shape[1:])
        inputs.append(_input(i, shape, tensor))
    outputs = replay.run(model, inputs, prefix="")
    return Graph(tuple(replay.calls), tuple(inputs), tuple(outputs))


class Run:
    """Carries out the calls of a graph one by one, on one batch, in inference mode.

    Nothing is updated, no gradients are kept, and a tensor is forgotten after its last reader.

    Args:
        graph: the graph of a model.
        inputs: a tensor or array for each of the graph's inputs, or None for an optional one.

    Attributes:
        place: the number of the call that `step` carries out next.
        values: the tensors that are needed further on, by the ids of their stand-ins.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Any]) -> None:
        self.graph, self.place = graph, 0
        self._detached = _Detached()
        self._waiting = collections.Counter(id(t) for call in graph.calls for t in call.inputs)
        self.values = {
            id(tensor): value if value is None else ops.convert_to_tensor(value, tensor.dtype)
            for tensor, value in zip(graph.inputs, inputs, strict=True)
        }

    @property
    def call(self) -> Call | None:
        """The call that `step` carries out next, or None at the end."""
        return self.graph.calls[self.place] if self.place < len(self.graph.calls) else None

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """Returns the positional and keyword arguments of that call."""
        call = self.call
        args, kwargs = keras.tree.map_structure(
            lambda item: self.values[id(item)] if _is_tensor(item) else item,
            (call.args, dict(call.kwargs)),
        )
        if _takes_training(call.operation):
            kwargs = {"training": False, **kwargs}
        return args, kwargs

    def step(self) -> None:
        """Carries out one call."""
        call = self.call
        args, kwargs = self.arguments()
        # In a StatelessScope whatever a layer would update stays as it is.
        with keras.StatelessScope():
            results = keras.tree.flatten(call.operation(*args, **kwargs))
        for tensor, result in zip(call.outputs, results, strict=True):
            self.values[id(tensor)] = self._detached(result)
        for tensor in call.inputs:
            self._waiting[id(tensor)] -= 1
            if not self._waiting[id(tensor)]:
                self.values.pop(id(tensor), None)
        self.place += 1


class _Detached(keras.layers.Layer):
    """Passes tensors on with their masks, without a graph of gradients on PyTorch."""

    def __init__(self) -> None:
        super().__init__(name="detached", autocast=False)
        self.supports_masking = True

    def call(self, x: Any) -> Any:
        return ops.stop_gradient(x)


def _takes_training(operation: keras.Operation) -> bool:
    if not isinstance(operation, keras.layers.Layer):
        return False
    return "training" in inspect.signature(operation.call).parameters


def calls(model: keras.Model) -> list[Call]:
    """Lists every call of every layer and raw operation of a model, in execution order.

    Nested Sequential and functional models are entered; a shared layer appears once per call;
    a composite layer (attention, `Bidirectional`, `TimeDistributed`) is one call.

    Args:
        model: a built Sequential or functional model. It is not changed.

    Returns:
        The calls. Follow connections by the identity of their tensors.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has no static graph, or a shape cannot be inferred.

    Example:
    >>> import keras
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="dense")])
    >>> [(call.path, call.outputs[0].shape) for call in calls(model)]
    [('dense', (None, 4))]
    """
    return list(trace(model).calls)


def head_layers(model: keras.Model) -> set[keras.layers.Layer]:
    """Finds the layers whose output is the model's output up to parameter-free steps.

    These are the classifiers (or regressors, or decoders) at the ends of the model: layers with
    weights of which every output leads, by every way, to a model output through nothing but
    operations that own no weights and read a single tensor (activations, softmax, dropout,
    reshape, flatten, pooling, rescaling). A layer that also feeds anything else, or that is
    called in another place too, is no head.

    Args:
        model: any Keras model. It is not changed.

    Returns:
        The head layers; an empty set if the model has no static graph.

    Raises:
        TypeError: `model` is not a Keras model.

    Example:
    >>> import keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8,)),
    ...         keras.layers.Dense(4, name="hidden"),
    ...         keras.layers.Dense(2, name="logits"),
    ...         keras.layers.Softmax(),
    ...     ]
    ... )
    >>> [layer.name for layer in head_layers(model)]
    ['logits']
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model, received {type(model).__name__}.")
    if not has_graph(model):
        return set()
    graph = trace(model)
    consumers: dict[int, list[Call]] = {}
    for call in graph.calls:
        for tensor in {id(t): t for t in call.inputs}.values():
            consumers.setdefault(id(tensor), []).append(call)
    is_output = {id(t) for t in graph.outputs}

    # From the last call to the first, so that whatever reads a tensor is decided before it.
    only_to_outputs: dict[int, bool] = {}  # id(tensor) -> does every way from it end an output?
    heads: set[keras.layers.Layer] = set()
    others: set[keras.layers.Layer] = set()
    for call in reversed(graph.calls):
        for tensor in call.outputs:
            readers = consumers.get(id(tensor), [])
            only_to_outputs[id(tensor)] = (bool(readers) or id(tensor) in is_output) and all(
                _is_transparent(reader) and all(only_to_outputs[id(t)] for t in reader.outputs)
                for reader in readers
            )
        if _owns_weights(call.operation):
            leads_out = all(only_to_outputs[id(t)] for t in call.outputs)
            (heads if leads_out else others).add(call.operation)
    return heads - others


def has_graph(operation: Any) -> bool:
    """Says whether `operation` is a model whose calls are known without running it.

    Args:
        operation: anything.

    Returns:
        True for a built Sequential or functional model whose `call` is Keras's own; False for
        subclassed models, plain layers and everything else.
    """
    if isinstance(operation, keras.Sequential):
        own_call = type(operation).call is keras.Sequential.call
        return own_call and hasattr(operation, "outputs")
    if isinstance(operation, keras.Function) and isinstance(operation, keras.Model):
        return type(operation).call is _functional_class().call
    return False


def output_spec(operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
    """Computes an operation's symbolic outputs without recording the call.

    Args:
        operation: a built layer or raw operation. It is not changed.
        *args: its positional arguments, tensors as `KerasTensor`.
        **kwargs: its keyword arguments.

    Returns:
        Fresh `KerasTensor`s in the structure that the operation returns.
    """
    spec = operation.compute_output_spec(*args, **kwargs)
    inputs = [t for t in keras.tree.flatten((args, kwargs)) if _is_tensor(t)]
    if any(None in t.shape for t in keras.tree.flatten(spec) if _is_tensor(t)) and not any(
        None in t.shape for t in inputs
    ):
        # Some layers (EinsumDense with None in its output_shape) leave open what their inputs
        # settle. Running `call` on the shapes finds it, where that is possible.
        with contextlib.suppress(Exception):
            spec = keras.Operation.compute_output_spec(operation, *args, **kwargs)
    return keras.tree.map_structure(
        lambda t: keras.KerasTensor(t.shape, t.dtype, sparse=t.sparse) if _is_tensor(t) else t,
        spec,
    )


def flat_inputs(model: keras.Model, args: tuple, kwargs: Mapping[str, Any]) -> list[Any]:
    """Lists what a call of a model gives for each of `model.inputs`, in their order.

    Args:
        model: a built Sequential or functional model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        One entry per input: a tensor, or None for an optional input that is not given.
    """
    given = args[0] if args else kwargs["inputs"]
    names = [t.name for t in model.inputs]
    if (
        isinstance(given, dict)
        and not isinstance(model, keras.Sequential)
        and not isinstance(model.input, dict)
        and set(names) <= set(given)
    ):
        return [given[name] for name in names]  # a dict for inputs declared as a list: by name
    return keras.tree.flatten(given)


def input_layers(model: keras.Model) -> list[keras.layers.InputLayer | None]:
    """Lists the layer behind each of `model.inputs`, in their order.

    Args:
        model: a built Sequential or functional model.

    Returns:
        One entry per input; None for an input that is the output of another layer.
    """
    layers = {
        id(layer.output): layer
        for layer in model._flatten_layers(include_self=False, recursive=False)
        if isinstance(layer, keras.layers.InputLayer)
    }
    return [layers.get(id(tensor)) for tensor in model.inputs]


class _Probe(keras.Operation):
    """Stands for one operation in a replay: has its name and shapes and nothing else."""

    def __init__(self, target: keras.Operation) -> None:
        super().__init__(name=target.name)
        self.target = target
        self.spec: Any = None

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self.spec


class _Replay:
    """Collects the calls of a model and of the models nested in it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._same: dict[int, keras.KerasTensor] = {}  # id(tensor) -> the tensor it stands for
        self._kept: list[keras.KerasTensor] = []  # alive, or their ids could be given out again

    def run(
        self, model: keras.Model, inputs: list[keras.KerasTensor], prefix: str
    ) -> list[keras.KerasTensor]:
        # A plain functional model over the same tensors: one case for Sequential, functional and
        # subclasses with constructors of their own, and a clone of it does not compile anything.
        plain = keras.Model(list(model.inputs), list(model.outputs), name=model.name)
        clone = keras.models.clone_model(
            plain,
            input_tensors=inputs,
            clone_function=_Probe,
            call_function=lambda probe, *args, **kwargs: self._call(probe, args, kwargs, prefix),
        )
        return [self._canonical(t) for t in clone.outputs]

    def _call(self, probe: _Probe, args: tuple, kwargs: dict[str, Any], prefix: str) -> Any:
        operation = probe.target
        path = f"{prefix}{operation.name}"
        if has_graph(operation):
            given = flat_inputs(operation, args, kwargs)
            inner = []
            for i, (tensor, declared) in enumerate(zip(given, operation.inputs, strict=True)):
                like = tensor if _is_tensor(tensor) else declared  # an optional input may be None
                inner.append(self._keep(_input(i, like.shape, declared)))
                if _is_tensor(tensor):
                    self._same[id(inner[-1])] = self._canonical(tensor)
            results = self.run(operation, inner, prefix=f"{path}/")
            probe.spec = [keras.KerasTensor(t.shape, t.dtype, sparse=t.sparse) for t in results]
            outputs = keras.tree.flatten(probe(*args, **kwargs))
            for tensor, result in zip(outputs, results, strict=True):
                self._same[id(self._keep(tensor))] = result
            return outputs
        try:
            probe.spec = output_spec(operation, *args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"The output shape of {path!r} ({type(operation).__name__}) cannot be inferred, so "
                "the model's graph cannot be followed. Give the layer a `compute_output_shape` "
                f"method. The cause: {error}"
            ) from error
        outputs = probe(*args, **kwargs)
        tensors = tuple(self._keep(t) for t in keras.tree.flatten(outputs) if _is_tensor(t))
        args, kwargs = keras.tree.map_structure(
            lambda t: self._canonical(t) if _is_tensor(t) else t, (args, kwargs)
        )
        inputs = tuple(t for t in keras.tree.flatten((args, kwargs)) if _is_tensor(t))
        self.calls.append(Call(operation, inputs, tensors, path, tuple(args), kwargs))
        return outputs

    def _canonical(self, tensor: keras.KerasTensor) -> keras.KerasTensor:
        return self._same.get(id(tensor), tensor)

    def _keep(self, tensor: keras.KerasTensor) -> keras.KerasTensor:
        self._kept.append(tensor)
        return tensor


def _input(index: int, shape: tuple, like: keras.KerasTensor) -> keras.KerasTensor:
    # Names are given so that Keras's counters of automatic names do not move.
    return keras.Input(
        batch_shape=shape, dtype=like.dtype, sparse=like.sparse, name=f"replay_input_{index}"
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _owns_weights(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.layers.Layer) and bool(operation.weights)


def _is_transparent(call: Call) -> bool:
    data = keras.tree.flatten((call.args, {k: v for k, v in call.kwargs.items() if k != "mask"}))
    return not _owns_weights(call.operation) and len({id(t) for t in data if _is_tensor(t)}) == 1


_FUNCTIONAL: list[type] = []


def _functional_class() -> type:
    """Returns the class of functional models, which Keras does not export by name."""
    if not _FUNCTIONAL:
        tensor = keras.Input((1,), name="probe")
        outputs = keras.ops.negative(tensor)  # in Keras 3.12 an input is no output
        _FUNCTIONAL.append(type(keras.Model(tensor, outputs, name="probe")))
    return _FUNCTIONAL[0]


def _why_no_graph(model: keras.Model) -> str:
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return (
            f"The Sequential model {model.name!r} has no graph yet, because its input shape is "
            "unknown or one of its layers infers no shape. Begin it with keras.Input(shape), or "
            "call it once on data."
        )
    return (
        f"The model {model.name!r} ({type(model).__name__}) has no static graph: which layers it "
        "calls, and in which order, is only known while it runs. Expected a Sequential or "
        "functional model; rewrite a subclassed one as keras.Model(inputs, outputs)."
    )
