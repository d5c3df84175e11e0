"""Export of Keras models to LiteRT (.tflite) files that have been run and compared."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph, measure
from keras_compaware._batches import batches
from keras_compaware._files import atomic_path
from keras_compaware.base import check_choice
from keras_compaware.export import interpreter
from keras_compaware.export._convert import ConversionError, Spec, call_model, convert
from keras_compaware.export._quantization import MODES, REWRITTEN
from keras_compaware.export._quiet import quiet

PathLike = str | os.PathLike[str]

_NUM_EXAMPLES = 3  # odd, so that running them in pairs leaves a smaller last batch
_NUM_QUANTIZED = 32
_PAIR = 2
_MOST_CALIBRATED = 256
_TIMED = 10


class ExportError(RuntimeError):
    """A model could not be exported; the message says at which step, where and what to do."""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A .tflite file that was written, run and compared with the model.

    Attributes:
        path: the file.
        bytes: its size.
        gzip_bytes: its size after `gzip -9`.
        max_error: largest relative error of the file's outputs against the model's: per output
            max |a - b| / max |b|, then the largest of them. None if the file could not be run
            here because it needs the Flex delegate (`allow_select_ops=True`).
        agreement: share of the vectors along the last axis of an output whose largest entry is at
            the same place as in the model's output; the least of all outputs. None where no output
            has two entries or more there, and where the file could not be run.
        latency_ms: number of threads (1, 2) to milliseconds of one inference of one example on
            this machine, the median of a few; empty where the file could not be run.
        quantization: the mode, or None.
        grids: name of each kernel that lies on a uniform grid of at most 8 bits to how the file
            holds it: "int8" or "int4", with the very codes of that grid; "float32" or "float16",
            not quantized; "rounded" to another grid; "not found" among the file's tensors.
        ops: operator name to count, most frequent first.
        inputs: name of each input in the file's signature to its shape, None where it may be
            resized. In the order of the model's inputs, which is not that of the file's tensors.
        outputs: the same for the outputs.
    """

    path: pathlib.Path
    bytes: int
    gzip_bytes: int
    max_error: float | None
    ops: Mapping[str, int]
    inputs: Mapping[str, tuple[int | None, ...]]
    outputs: Mapping[str, tuple[int | None, ...]]
    agreement: float | None = None
    latency_ms: Mapping[int, float] = dataclasses.field(default_factory=dict)
    quantization: str | None = None
    grids: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        error = (
            "not compared (needs the Flex delegate)"
            if self.max_error is None
            else f"max relative error {self.max_error:.1e}"
        )
        if self.quantization is not None and self.agreement is not None:
            error += f", predictions agree to {self.agreement:.1%}"
        more = []
        if self.latency_ms:
            times = (f"{ms:.3g} ms with {n}" for n, ms in self.latency_ms.items())
            more.append(f"  latency: {', '.join(times)} threads")
        if self.grids:
            held = (f"{name} {fate}" for name, fate in self.grids.items())
            more.append(f"  grids:   {', '.join(held)}")
        return "\n".join(
            [
                f"{self.path}: {self.bytes:,} bytes, {self.gzip_bytes:,} gzipped, {error}",
                f"  inputs:  {', '.join(f'{n} {s}' for n, s in self.inputs.items())}",
                f"  outputs: {', '.join(f'{n} {s}' for n, s in self.outputs.items())}",
                f"  ops:     {', '.join(f'{count} {name}' for name, count in self.ops.items())}",
                *more,
            ]
        )


def to_litert(
    model: keras.Model,
    path: PathLike,
    *,
    inputs: Any = None,
    quantization: str | None = None,
    calibration: Any = None,
    tolerance: float | None = None,
    min_agreement: float = 0.9,
    allow_select_ops: bool = False,
) -> ExportResult:
    """Writes a model as a .tflite file that computes what the model computes.

    The file is converted, run and compared with the model on a few examples; only then does it
    take its place. On any failure the file that was at `path` before stays as it was.

    The batch size stays open where the model leaves it open and LiteRT can run it so; otherwise
    (recurrent layers, for instance) it becomes 1, as the result's shapes show. On the JAX and
    torch backends the conversion happens in a process of its own on TensorFlow; custom layers
    must then be registered with Keras and live in an importable module.

    Quantization, all per output channel and symmetric for weights:

        "float16":      weights of 16 bits, computed with in float32.
        "dynamic_int8": weights of 8 bits, activations rounded to 8 bits as they come. Kernels of
                        less than 1,024 entries stay float32.
        "int8":         all of 8 bits but inputs and outputs, on ranges found by `calibration`.
        "weight_int8", "weight_int4": weights of 8 or 4 bits, computed with in float32; by
                        ai-edge-quantizer (`pip install 'keras-compaware[quantization]'`). Of 4
                        bits are the kernels of dense layers and convolutions that are not
                        depthwise.

    A kernel that lies on a symmetric uniform grid already, as `UniformQuantization(bits,
    axis="outputs")` leaves it, is stored with the codes of that very grid: its scales are the
    grid's, times |gamma| / sigma where batch normalisation is folded in, and the sign of the
    codes is that of gamma.

    Zeros make no .tflite file faster, and smaller only once it is compressed (`gzip_bytes`).

    Args:
        model: a built model. Subclassed models need `inputs` and the TensorFlow backend.
        path: the file to write, ending in ".tflite". Its folder must exist.
        inputs: examples to compare on: an array of shape (num_examples, ...), or a list or dict
            of them for several inputs. By default three random ones of the model's input shapes
            (32 if it is quantized), the same every time. Needed where an input's shape is not
            fully defined.
        quantization: None (default: float32), "float16", "dynamic_int8", "int8", "weight_int8" or
            "weight_int4".
        calibration: for "int8": what the ranges of activations are measured on: an array or a dict
            of typical examples, or an iterable of batches x or (x, y, ...). Of more than 256
            examples the first are taken.
        tolerance: largest relative error that is accepted, > 0. Default: 1e-4, and for "float16"
            1e-2; with integers it is checked only if given, or if no output is a prediction
            (then 0.25). For float32 models about 1e-6 is common; mixed precision and
            accelerators that round products need more.
        min_agreement: with integers, the least share of predictions (places of the largest entry
            along the last axis of an output) that have to agree, in [0, 1].
        allow_select_ops: accepts operations without a LiteRT kernel. The file then needs the Flex
            delegate on the device and, as the Python interpreter lacks that, is written without
            having been run.

    Returns:
        What was written.

    Raises:
        ExportError: a step failed.
        FileNotFoundError: the folder of `path` does not exist.
        ImportError: LiteRT is not installed, or ai-edge-quantizer where it is needed.
        TypeError: `model` is not a Keras model.
        ValueError: an argument does not fit.
    """
    _check_arguments(model, path, tolerance, min_agreement)
    _check_quantization(quantization, calibration)
    plan = _Plan.of(model, inputs, quantization)
    plan = plan.with_calibration(model, calibration)
    limits = _Limits.of(quantization, tolerance, min_agreement)
    expected = _expected(model, plan)
    plan = dataclasses.replace(plan, outputs=_output_names(model, len(expected)))
    for name, value in zip(plan.outputs, expected, strict=True):
        if not np.isfinite(value.astype(np.float64)).all():
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'compare': the model's own output "
                f"{name!r} is not finite on the examples, so there is nothing to compare with. "
                "Pass realistic ones as `inputs=`, or check the model's weights."
            )
    attempts = [plan]
    if any(spec.shape and spec.shape[0] is None for spec in plan.specs):
        attempts.append(plan.with_batch_of_one())
    with atomic_path(path) as temporary:
        for attempt in attempts:
            last = attempt is attempts[-1]
            try:
                content, grids = _converted(model, attempt, allow_select_ops)
            except ConversionError as error:
                if not last and error.reason in ("batch", "crash", "other"):
                    continue
                raise _conversion_failed(model, error, quantization) from error
            temporary.write_bytes(content)
            ops = interpreter.operators(temporary)
            try:
                received = _received(temporary, attempt)
                break
            except RuntimeError as error:
                select = [name for name in ops if name.startswith("Flex")]
                if select:  # only if allowed: the converter refuses them otherwise
                    received = None
                    break
                if last:
                    raise ExportError(
                        f"Exporting {model.name!r} failed at the step 'run': the file was "
                        f"converted, but LiteRT does not run it on inputs of the shapes "
                        f"{[value.shape for value in attempt.values]}. If the model's input shape "
                        "is not fully defined, rebuild it with a full one; otherwise replace the "
                        f"layer that the operator belongs to. LiteRT says: {error}"
                    ) from error
        max_error, agreement, latency_ms = None, None, {}
        if received is not None:
            max_error, agreement = _compared(model, plan.outputs, received, expected, limits)
            latency_ms = _latency(temporary)
        program = interpreter.Program(temporary)
        shapes = {info.name: info.shape for info in (*program.inputs, *program.outputs)}
        result = ExportResult(
            path=pathlib.Path(path),
            bytes=measure.file_bytes(temporary),
            gzip_bytes=measure.gzip_bytes(temporary),
            max_error=max_error,
            ops=ops,
            inputs={spec.name: shapes[spec.name] for spec in plan.specs},
            outputs={name: shapes[name] for name in plan.outputs},
            agreement=agreement,
            latency_ms=latency_ms,
            quantization=quantization,
            grids=grids,
        )
        del program  # closes the file before it is renamed
    return result


@dataclasses.dataclass(frozen=True)
class _Plan:
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
    def of(cls, model: keras.Model, inputs: Any, quantization: str | None) -> "_Plan":
        return dataclasses.replace(cls._of(model, inputs, quantization), quantization=quantization)

    @classmethod
    def _of(cls, model: keras.Model, inputs: Any, quantization: str | None) -> "_Plan":
        if not _graph.has_graph(model):
            return cls._of_subclassed(model, inputs)
        tensors = model.inputs
        names = _input_names(tensors)
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
        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        return cls(structure, specs, values, batch_size, [])

    @classmethod
    def _of_subclassed(cls, model: keras.Model, inputs: Any) -> "_Plan":
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

    def with_calibration(self, model: keras.Model, calibration: Any) -> "_Plan":
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

    def with_batch_of_one(self) -> "_Plan":
        specs = [dataclasses.replace(s, shape=(1, *s.shape[1:])) for s in self.specs]
        return dataclasses.replace(self, specs=specs)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What is asked of a file's outputs.

    Attributes:
        error: largest relative error, or None.
        error_without_classes: the same for an output without predictions.
        agreement: least share of predictions that agree, or None.
    """

    error: float | None
    error_without_classes: float
    agreement: float | None

    @classmethod
    def of(cls, quantization: str | None, tolerance: float | None, agreement: float) -> "_Limits":
        if quantization in (None, "float16"):
            error = tolerance or (1e-4 if quantization is None else 1e-2)
            return cls(error, error, None)
        return cls(tolerance, tolerance or 0.25, agreement)


def _check_quantization(quantization: Any, calibration: Any) -> None:
    if quantization is not None:
        check_choice("to_litert", "quantization", quantization, (None, *MODES))
    if (quantization == "int8") != (calibration is not None):
        raise ValueError(
            "to_litert: `calibration`, some typical examples, goes with quantization='int8', which "
            f"needs it. Received: quantization={quantization!r}, calibration "
            f"{'missing' if calibration is None else 'given'}."
        )
    if quantization in REWRITTEN and importlib.util.find_spec("ai_edge_quantizer") is None:
        raise ImportError(
            f"to_litert: quantization={quantization!r} needs ai-edge-quantizer, which is not "
            "installed. Install it with `pip install 'keras-compaware[quantization]'`."
        )


def _check_arguments(model: Any, path: PathLike, tolerance: Any, agreement: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model, received {type(model).__name__}.")
    if pathlib.Path(path).suffix != ".tflite":
        raise ValueError(f"Expected a path ending in '.tflite', received {os.fspath(path)!r}.")
    is_number = isinstance(tolerance, int | float) and 0 < tolerance < math.inf
    if not (tolerance is None or is_number):
        raise ValueError(f"tolerance must be a positive number, received {tolerance!r}.")
    if not isinstance(agreement, int | float) or not 0 <= agreement <= 1:
        raise ValueError(f"min_agreement must be in [0, 1], received {agreement!r}.")
    if importlib.util.find_spec("tensorflow") is None:
        raise ExportError(
            "Exporting to LiteRT failed at the step 'import': the converter is part of TensorFlow, "
            "which is not installed. Install it (pip install tensorflow); the Keras backend may "
            "stay as it is."
        )


# Inputs


def _input_names(tensors: list[keras.KerasTensor]) -> list[str]:
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


# Outputs


def _output_names(model: keras.Model, num_outputs: int) -> list[str]:
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


def _expected(model: keras.Model, plan: _Plan) -> list[np.ndarray]:
    """The model's own outputs, flattened."""
    num_examples = len(plan.values[0])
    size = plan.batch_size or min(num_examples, 32)
    pieces = []
    for start in range(0, num_examples, size):
        batch = [value[start : start + size] for value in plan.values]
        outputs = call_model(model, keras.tree.pack_sequence_as(plan.structure, batch))
        pieces.append([keras.ops.convert_to_numpy(t) for t in keras.tree.flatten(outputs)])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _received(path: pathlib.Path, plan: _Plan) -> list[np.ndarray]:
    """The file's outputs, in the model's order."""
    values = {spec.name: value for spec, value in zip(plan.specs, plan.values, strict=True)}
    outputs = interpreter.predict(path, values, batch_size=_PAIR)
    if not isinstance(outputs, dict):
        outputs = dict.fromkeys(plan.outputs, outputs)
    return [outputs[name] for name in plan.outputs]


def _compared(
    model: keras.Model,
    names: list[str],
    received: list[np.ndarray],
    expected: list[np.ndarray],
    limits: _Limits,
) -> tuple[float, float | None]:
    """Returns the largest relative error and the least agreement, or raises if they are bad."""
    failed = f"Exporting {model.name!r} failed at the step 'compare': "
    largest, least = 0.0, None
    for name, ours, theirs in zip(names, received, expected, strict=True):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        if ours.shape != theirs.shape:
            raise ExportError(
                f"{failed}the file's output {name!r} has the shape {ours.shape}, the model's "
                f"{theirs.shape}."
            )
        error, agreement = _relative_error(ours, theirs), _agreement(ours, theirs)
        limit = limits.error_without_classes if agreement is None else limits.error
        if not np.isfinite(error) or (limit is not None and error > limit):
            raise ExportError(
                f"{failed}the relative error of the output {name!r} is {error:.2g}, above the "
                f"tolerance {limit or math.inf:.2g}. If the model rounds (mixed precision, an "
                "accelerator with reduced products) or the examples are unlike real data, raise "
                "`tolerance` or pass `inputs=`; otherwise a layer is converted wrongly."
            )
        if limits.agreement is not None and agreement is not None and agreement < limits.agreement:
            raise ExportError(
                f"{failed}the predictions of the output {name!r} agree on {agreement:.1%} of the "
                f"examples, below min_agreement={limits.agreement:g}. Pass real examples as "
                "`inputs=` (and as `calibration=`), train with `UniformQuantization`, or use more "
                "bits."
            )
        largest = max(largest, error)
        if agreement is not None:
            least = agreement if least is None else min(least, agreement)
    return largest, least


def _relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = np.abs(ours - theirs).max(initial=0.0)
    scale = np.abs(theirs).max(initial=0.0)
    return 0.0 if difference == 0 else math.inf if scale == 0 else float(difference / scale)


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    if theirs.ndim < 2 or theirs.shape[-1] < 2:
        return None
    return float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))


def _latency(path: pathlib.Path) -> dict[int, float]:
    try:
        return {
            threads: interpreter.latency([path], num_threads=threads, repeats=_TIMED, warmup=1)[
                path
            ].median_ms
            for threads in (1, 2)
        }
    except ValueError:  # shapes that are not defined, or a batch size that is fixed
        return {}


# Conversion


def _converted(
    model: keras.Model, plan: _Plan, allow_select_ops: bool
) -> tuple[bytes, dict[str, str]]:
    # Calibrating may end the process: of loops (recurrent layers) it reads memory that is not its.
    apart = plan.quantization == "int8" and _graph.has_graph(model)
    if keras.backend.backend() == "tensorflow" and not apart:
        with quiet():
            return convert(
                model,
                plan.structure,
                plan.specs,
                plan.outputs,
                allow_select_ops=allow_select_ops,
                quantization=plan.quantization,
                calibration=plan.calibrated_on(),
            )
    return _converted_elsewhere(model, plan, allow_select_ops)


def _converted_elsewhere(
    model: keras.Model, plan: _Plan, allow_select_ops: bool
) -> tuple[bytes, dict[str, str]]:
    """Converts in a process of its own on the TensorFlow backend."""
    if not _graph.has_graph(model):
        raise ExportError(
            f"Exporting {model.name!r} failed at the step 'convert': a subclassed model "
            f"({type(model).__name__}) can only be exported on the TensorFlow backend, this one "
            f"is on {keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow, or write it as "
            "keras.Model(inputs, outputs)."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # A plain copy over the same layers: without the optimizer and the model's own class.
        plain = keras.Model(list(model.inputs), list(model.outputs), name=model.name)
        try:
            plain.save(folder / "model.keras")
        except Exception as error:
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'save': a copy of the model for the "
                f"TensorFlow backend could not be saved. The cause: {error}"
            ) from error
        job = {
            "model": str(folder / "model.keras"),
            "modules": sorted(_custom_modules(folder / "model.keras")),
            "inputs": [dataclasses.asdict(spec) for spec in plan.specs],
            "outputs": plan.outputs,
            "allow_select_ops": allow_select_ops,
            "quantization": plan.quantization,
            "calibration": _saved(plan.calibrated_on(), folder / "calibration.npz"),
            "result": str(folder / "model.tflite"),
            "outcome": str(folder / "outcome.json"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            "CUDA_VISIBLE_DEVICES": "-1",  # converting needs no accelerator, and may not take one
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        process = subprocess.run(
            [sys.executable, "-m", "keras_compaware.export._worker", str(folder / "job.json")],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        outcome_path = folder / "outcome.json"
        if process.returncode < 0:
            raise ConversionError("crash", process.stderr.strip()[-600:])
        if process.returncode != 0 or not outcome_path.is_file():
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'convert': the process that "
                f"converts on TensorFlow ended with code {process.returncode}. Its last words: "
                f"{process.stderr.strip()[-600:]}"
            )
        outcome = json.loads(outcome_path.read_text(encoding="utf-8"))
        if not outcome["ok"]:
            raise ConversionError(
                outcome["reason"], outcome["message"], outcome["operations"], outcome["places"]
            )
        return (folder / "model.tflite").read_bytes(), outcome["grids"]


def _saved(examples: list[list[np.ndarray]], path: pathlib.Path) -> str | None:
    if not examples:
        return None
    arrays = {str(n): np.stack(values) for n, values in enumerate(zip(*examples, strict=True))}
    np.savez(path, **arrays)
    return str(path)


def _custom_modules(path: pathlib.Path) -> set[str]:
    """Modules of the custom classes in a saved model: importing them registers the classes."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    found = set()
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            module = value.get("module")
            if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins"):
                found.add(module)
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return found - {"__main__"}


def _conversion_failed(
    model: keras.Model, error: ConversionError, quantization: str | None
) -> ExportError:
    what = ", ".join(error.operations) or "an operation"
    where = f" (in {', '.join(error.places)})" if error.places else ""
    if error.reason == "load":
        text = (
            "the model could not be loaded on the TensorFlow backend. Register custom layers with "
            "keras.saving.register_keras_serializable in an importable module, write them with "
            "keras.ops, or replace them by plain Keras layers before exporting."
        )
    elif half := _half_precision(model):
        text = (
            f"the model computes in {half}, for which LiteRT lacks most kernels. Build the same "
            "model under keras.config.set_dtype_policy('float32'), give it this model's weights "
            "(set_weights) and export that one."
        )
    elif error.reason == "select":
        text = (
            f"LiteRT has no kernel for {what}{where}. Replace the layer, or pass "
            "allow_select_ops=True and link the Flex delegate on the device."
        )
    elif error.reason == "custom":
        text = f"neither LiteRT nor its Flex delegate has a kernel for {what}{where}. Replace it."
    elif error.reason == "batch":
        text = (
            f"{what}{where} needs shapes that are fixed, also beyond the batch size. Give the "
            "model a full input shape (sequence length included)."
        )
    elif error.reason == "crash":
        text = (
            "the converter crashed, in a process of its own. Recurrent layers and other loops "
            f"cannot be quantized with {quantization!r}: use 'dynamic_int8' or 'weight_int8'."
        )
    else:
        text = f"the converter refused {what}{where}."
        if quantization is not None:
            text += (
                f" It was to quantize ({quantization!r}): try without it, and if that goes, "
                "another `quantization`."
            )
    step = "load" if error.reason == "load" else "convert"
    return ExportError(
        f"Exporting {model.name!r} failed at the step {step!r}: {text} The converter says: "
        f"{error.message}"
    )


def _half_precision(model: keras.Model) -> str | None:
    """Names the half precision that some of a model's layers compute in, if any does."""
    if not _graph.has_graph(model):
        return model.compute_dtype if model.compute_dtype.endswith("float16") else None
    operations = {call.operation for call in _graph.calls(model)}
    dtypes = {op.compute_dtype for op in operations if isinstance(op, keras.layers.Layer)}
    return next((dtype for dtype in sorted(dtypes) if dtype.endswith("float16")), None)
