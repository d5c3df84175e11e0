"""What a model is exported with: names, shapes and dtypes of its inputs, examples of them."""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph
from keras_compaware._batches import batches

_NUM_EXAMPLES = 3  # odd, so that running them in pairs leaves a smaller last batch
_NUM_QUANTIZED = 32
_MOST_CALIBRATED = 256


@dataclasses.dataclass(frozen=True)
class Spec:
    """Name, shape (batch dimension included, None where undefined) and dtype of an input."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class ConversionError(Exception):
    """The converter refused a model.

    Attributes:
        reason: "select" (needs TensorFlow's own kernels), "custom" (needs kernels that nobody
            has), "batch" (needs a fixed batch size), "load" (a saved model could not be loaded),
            "crash" (the process ended) or "other".
        operations: the TensorFlow operations at fault, such as "MatrixInverse".
        places: where they stand in the model, such as "functional/block/inverse".
        message: what the converter said, shortened.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        operations: tuple[str, ...] = (),
        places: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.operations = tuple(operations)
        self.places = tuple(places)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model is converted with and compared on.

    Attributes:
        structure: nested structure with one leaf per input, as the model is called.
        specs: one per input.
        values: the examples, one array per input.
        batch_size: the batch size that the model fixes, or None.
        outputs: names of the outputs.
        quantization: the mode, or None.
        calibration: one array of examples per input, or none.
    """

    structure: Any
    specs: list[Spec]
    values: list[np.ndarray]
    batch_size: int | None
    outputs: list[str]
    quantization: str | None = None
    calibration: Sequence[np.ndarray] = ()

    @classmethod
    def of(cls, model: keras.Model, inputs: Any, quantization: str | None) -> "Plan":
        return dataclasses.replace(cls._of(model, inputs, quantization), quantization=quantization)

    @classmethod
    def _of(cls, model: keras.Model, inputs: Any, quantization: str | None) -> "Plan":
        if not _graph.has_graph(model):
            return cls._of_subclassed(model, inputs)
        tensors = model.inputs
        names = input_names(tensors)
        sizes = {t.shape[0] for t in tensors if t.shape} - {None}
        batch_size = max(sizes) if sizes else None
        if inputs is None:
            number = _NUM_EXAMPLES if quantization is None else _NUM_QUANTIZED
            if batch_size:
                number = batch_size * -(-number // batch_size)
            values = _random_inputs(model, number)
        else:
            values = _given_inputs(model, names, inputs)
        specs = [
            Spec(name, tuple(t.shape), t.dtype) for name, t in zip(names, tensors, strict=True)
        ]
        values = [_checked_examples(value, spec) for value, spec in zip(values, specs, strict=True)]
        lengths = {len(value) for value in values}
        if len(lengths) != 1 or 0 in lengths or (batch_size and lengths.pop() % batch_size):
            raise ValueError(
                "Expected the same number of examples >= 1 for every input, a multiple of the "
                f"model's batch size if it fixes one ({batch_size}); received the shapes "
                f"{[value.shape for value in values]}."
            )
        return cls(structure_of(model), specs, values, batch_size, [])

    @classmethod
    def _of_subclassed(cls, model: keras.Model, inputs: Any) -> "Plan":
        if not model.built:
            raise ValueError(
                f"{model.name!r} is not built. Call it once on data, or begin it with "
                "keras.Input(shape)."
            )
        if inputs is None:
            raise ValueError(
                f"The input shapes of {model.name!r} ({type(model).__name__}) are not known, "
                "because it is no Sequential or functional model. Pass `inputs=`, a few examples "
                "as the model is called with them."
            )
        values = [np.asarray(value) for value in keras.tree.flatten(inputs)]
        if isinstance(inputs, Mapping):
            names = [_clean(str(name)) for name in keras.tree.flatten({k: k for k in inputs})]
        else:
            names = ["input"] if len(values) == 1 else [f"input_{i}" for i in range(len(values))]
        for value in values:
            if value.ndim == 0 or len(value) == 0 or len(value) != len(values[0]):
                raise ValueError(
                    "Expected arrays with the same number >= 1 of examples, received the shapes "
                    f"{[v.shape for v in values]}."
                )
        specs = [
            Spec(name, (None, *value.shape[1:]), str(value.dtype))
            for name, value in zip(names, values, strict=True)
        ]
        return cls(inputs, specs, values, None, [])

    def with_calibration(self, model: keras.Model, calibration: Any) -> "Plan":
        """Returns the plan with what it is calibrated on, checked like the examples."""
        if calibration is None:
            return self
        is_one = hasattr(calibration, "shape") or isinstance(calibration, Mapping)
        names = [spec.name for spec in self.specs]
        pieces: list[list[np.ndarray]] = [[] for _ in self.specs]
        number = 0
        for batch in [calibration] if is_one else batches("to_litert", calibration):
            x = batch[0] if isinstance(batch, list | tuple) and not is_one else batch
            if _graph.has_graph(model):
                arrays = _given_inputs(model, names, x)
            else:
                arrays = keras.tree.flatten(x)
            for piece, array, spec in zip(pieces, arrays, self.specs, strict=True):
                piece.append(_checked_examples(array, spec))
            number += len(pieces[0][-1])
            if number >= _MOST_CALIBRATED:
                break
        if not number:
            raise ValueError("to_litert: `calibration` yields no batch.")
        arrays = [np.concatenate(piece)[:_MOST_CALIBRATED] for piece in pieces]
        return dataclasses.replace(self, calibration=arrays)

    def calibrated_on(self) -> list[list[np.ndarray]]:
        """Returns batches of the size that the model has: one array for every input."""
        size = next((spec.shape[0] for spec in self.specs if spec.shape), None) or 1
        number = len(self.calibration[0]) if self.calibration else 0
        return [
            [array[start : start + size] for array in self.calibration]
            for start in range(0, number - size + 1, size)
        ]

    def attempts(self) -> list["Plan"]:
        """Returns the plans to try in turn: this one and, if its batch is open, a batch of one."""
        if not any(spec.shape and spec.shape[0] is None for spec in self.specs):
            return [self]
        specs = [dataclasses.replace(s, shape=(1, *s.shape[1:])) for s in self.specs]
        return [self, dataclasses.replace(self, specs=specs)]


def structure_of(model: keras.Model) -> Any:
    """Returns what a functional or Sequential model is called with, as it nests its inputs."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def call_model(model: keras.Model, inputs: Any) -> Any:
    """Calls a model in inference mode.

    Args:
        model: any built model.
        inputs: its inputs, in the structure that it expects.

    Returns:
        Its outputs.
    """
    parameters = inspect.signature(model.call).parameters.values()
    if any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters):
        return model(inputs, training=False)
    return model(inputs)


def output_names(model: keras.Model, num_outputs: int) -> list[str]:
    if isinstance(model, keras.Sequential) and _graph.has_graph(model) and num_outputs == 1:
        return [_clean(model.layers[-1].name)]
    if _graph.has_graph(model) and not isinstance(model, keras.Sequential):
        structure = model.output
        if isinstance(structure, Mapping) and len(structure) == num_outputs:
            names = keras.tree.flatten({key: str(key) for key in structure})
        else:
            names = model.output_names
        return _unique([_clean(name) for name in names])
    return ["output"] if num_outputs == 1 else [f"output_{i}" for i in range(num_outputs)]


def input_names(tensors: list[keras.KerasTensor]) -> list[str]:
    """Names of the signature: the model's own ones, but none that Keras made up by counting."""
    names = []
    for i, tensor in enumerate(tensors):
        if re.fullmatch(r"(keras_tensor|input_layer)(_\d+)?", tensor.name):
            names.append("input" if len(tensors) == 1 else f"input_{i}")
        else:
            names.append(_clean(tensor.name))
    return _unique(names)


def _clean(name: str) -> str:
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return name if re.match(r"[A-Za-z]", name) else f"x{name}"


def _unique(names: list[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for name in names:
        candidate, i = name, 1
        while candidate in taken:
            candidate, i = f"{name}_{i}", i + 1
        taken.add(candidate)
        result.append(candidate)
    return result


def _random_inputs(model: keras.Model, num_examples: int) -> list[np.ndarray]:
    graph = _graph.trace(model)
    table_sizes: dict[int, int] = {}  # id(input) -> smallest table that is indexed with it
    for call in graph.calls:
        if isinstance(call.operation, keras.layers.Embedding) and call.inputs:
            key = id(call.inputs[0])
            size = call.operation.input_dim
            table_sizes[key] = min(size, table_sizes.get(key, size))
    random = np.random.default_rng(0)
    values = []
    for declared, tensor in zip(model.inputs, graph.inputs, strict=True):
        if None in tensor.shape[1:]:
            raise ValueError(
                f"The input {declared.name!r} of {model.name!r} has the shape {tensor.shape}. Pass "
                "examples as `inputs=`, or rebuild the model with a full input shape, which also "
                "makes a faster file."
            )
        shape = (num_examples, *tensor.shape[1:])
        if id(tensor) in table_sizes:
            values.append(random.integers(0, table_sizes[id(tensor)], shape))
        elif "float" in tensor.dtype:
            values.append(random.standard_normal(shape))
        elif "int" in tensor.dtype or tensor.dtype == "bool":
            values.append(random.integers(0, 2, shape))
        else:
            raise ValueError(
                f"Cannot make random examples of the dtype {tensor.dtype!r} for the input "
                f"{declared.name!r}. Pass some as `inputs=`."
            )
    return values


def _given_inputs(model: keras.Model, names: list[str], inputs: Any) -> list[Any]:
    declared = [t.name for t in model.inputs]
    if isinstance(inputs, Mapping):
        structure = None if isinstance(model, keras.Sequential) else model.input
        if isinstance(structure, Mapping) and set(inputs) == set(structure):
            return keras.tree.flatten(dict(inputs))
        for known in (declared, names):
            if set(inputs) == set(known):
                return [inputs[name] for name in known]
        raise ValueError(
            f"Expected examples for the inputs {declared} of {model.name!r}, received "
            f"{sorted(inputs)}."
        )
    if len(declared) == 1 and not isinstance(inputs, list | tuple):
        return [inputs]
    if isinstance(inputs, list | tuple) and len(inputs) == len(declared):
        return list(inputs)
    raise ValueError(
        f"Expected a list of {len(declared)} arrays for the inputs {declared} of {model.name!r}, "
        f"received {type(inputs).__name__}"
        + (f" of length {len(inputs)}." if hasattr(inputs, "__len__") else ".")
    )


def _checked_examples(value: Any, spec: Spec) -> np.ndarray:
    value = np.asarray(value)
    fits = value.ndim == len(spec.shape) and all(
        want is None or have == want
        for have, want in zip(value.shape[1:], spec.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"Expected examples of the shape {('num_examples', *spec.shape[1:])} for the input "
            f"{spec.name!r}, received {value.shape}."
        )
    return value.astype(spec.dtype)


def shortened(message: str, limit: int = 600) -> str:
    """Returns what a converter says as one line, the lines with errors if there are such."""
    lines = [line.strip() for line in message.splitlines()]
    wanted = [line for line in lines if "error:" in line] or [line for line in lines if line]
    text = "; ".join(dict.fromkeys(wanted))
    return text if len(text) <= limit else text[: limit - 3] + "..."
