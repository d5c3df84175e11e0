"""Export of Keras models to ONNX files that have been run and compared."""

import collections
import dataclasses
import importlib.util
import os
import pathlib
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph, measure
from keras_compaware._files import atomic_path
from keras_compaware.export._compare import (
    ExportError,
    ExportResult,
    Limits,
    check_arguments,
    compared,
    with_expected,
)
from keras_compaware.export._elsewhere import convert_elsewhere
from keras_compaware.export._onnx import convert, operators
from keras_compaware.export._places import half_precision, layers_at, listed
from keras_compaware.export._plan import ConversionError, Plan
from keras_compaware.export._quiet import quiet

PathLike = str | os.PathLike[str]

_PAIR = 2
# What Keras exports with, by backend, in the order in which they are tried.
_NEEDS = {"tensorflow": ("tensorflow", "tf2onnx"), "torch": ("torch",)}


def to_onnx(
    model: keras.Model,
    path: PathLike,
    *,
    inputs: Any = None,
    tolerance: float | None = None,
) -> ExportResult:
    """Writes a model as an .onnx file that computes what the model computes.

    The file is converted by Keras' own `model.export`, run in ONNX Runtime and compared with the
    model on a few examples; only then does it take its place. On any failure the file that was at
    `path` before stays as it was.

    Keras converts on TensorFlow (by tf2onnx) and on PyTorch. The model's own backend is tried
    first, then the other one in a process of its own, if it is installed; from JAX it is always
    another one. Custom layers must then be registered with Keras and live in an importable module.
    The batch size stays open where the model leaves it open and a converter can do it; otherwise
    it becomes 1, as the result's shapes show.

    Weights are of float32: `to_litert` writes quantized files.

    Args:
        model: a built model. Subclassed models need `inputs` and the TensorFlow or torch backend.
        path: the file to write, ending in ".onnx". Its folder must exist.
        inputs: examples to compare on: an array of shape (num_examples, ...), or a list or dict
            of them for several inputs. By default three random ones of the model's input shapes,
            the same every time. Needed where an input's shape is not fully defined.
        tolerance: largest relative error that is accepted, > 0. Default: 1e-4. For float32 models
            about 1e-6 is common; mixed precision and accelerators that round products need more.

    Returns:
        What was written; without latencies and quantization.

    Raises:
        ExportError: a step failed.
        FileNotFoundError: the folder of `path` does not exist.
        ImportError: ONNX, ONNX Runtime, or every converter to ONNX is missing.
        TypeError: `model` is not a Keras model.
        ValueError: an argument does not fit.

    Example:
    >>> import keras, pathlib, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="logits")])
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.onnx"
    >>> result = to_onnx(model, path)
    >>> result.inputs, result.outputs
    ({'input': (None, 4)}, {'logits': (None, 2)})
    """
    check_arguments(model, path, ".onnx", tolerance)
    backends = _backends(model)
    plan, expected = with_expected(model, Plan.of(model, inputs, None))
    taken = {spec.name for spec in plan.specs}  # inputs and outputs of a graph share their names
    names = [f"{name}_output" if name in taken else name for name in plan.outputs]
    plan = dataclasses.replace(plan, outputs=names)
    limits = Limits.of(None, tolerance, 0.0)
    failures: dict[str, Exception] = {}
    with atomic_path(path) as temporary:
        for attempt in plan.attempts():
            for backend in backends:
                try:
                    session, max_error, agreement = _written(
                        model, attempt, backend, temporary, expected, limits
                    )
                except (ConversionError, ExportError) as error:
                    failures.setdefault(backend, error)
                    continue
                return _result(path, temporary, session, plan, max_error, agreement)
        raise _failed(model, failures) from next(iter(failures.values()))


def _result(
    path: PathLike,
    temporary: pathlib.Path,
    session: Any,
    plan: Plan,
    max_error: float,
    agreement: float | None,
) -> ExportResult:
    import onnx

    shapes = {
        value.name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for value in (*session.get_inputs(), *session.get_outputs())
    }
    counts = collections.Counter(operators(onnx.load(temporary).graph))
    return ExportResult(
        path=pathlib.Path(path),
        bytes=measure.file_bytes(temporary),
        gzip_bytes=measure.gzip_bytes(temporary),
        max_error=max_error,
        ops=dict(counts.most_common()),
        inputs={spec.name: shapes[spec.name] for spec in plan.specs if spec.name in shapes},
        outputs={name: shapes[name] for name in plan.outputs},
        agreement=agreement,
    )


def _backends(model: keras.Model) -> list[str]:
    """The backends that can convert the model here, its own first."""
    missing = [name for name in ("onnx", "onnxruntime") if not _installed(name)]
    if missing:
        raise ImportError(
            f"to_onnx needs {' and '.join(missing)}, not installed here. Install what it needs "
            "with `pip install 'keras-compaware[onnx]'`."
        )
    own = keras.backend.backend()
    able = [backend for backend, needs in _NEEDS.items() if all(map(_installed, needs))]
    if not _graph.has_graph(model):
        if own not in _NEEDS:
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'convert': a subclassed model "
                f"({type(model).__name__}) can only be exported to ONNX on the TensorFlow or "
                f"PyTorch backend, this one is on {own!r}. Set KERAS_BACKEND, or write it as "
                "keras.Model(inputs, outputs)."
            )
        able = [backend for backend in able if backend == own]
    if not able:
        raise ImportError(
            "to_onnx needs a converter: TensorFlow with tf2onnx (`pip install "
            "'keras-compaware[onnx,tensorflow]'`), or PyTorch (`pip install "
            "'keras-compaware[onnx,torch]'`)."
        )
    return sorted(able, key=lambda backend: backend != own)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _written(
    model: keras.Model,
    plan: Plan,
    backend: str,
    path: pathlib.Path,
    expected: list[np.ndarray],
    limits: Limits,
) -> tuple[Any, float, float | None]:
    """Converts, writes, runs and compares.

    Returns:
        The file, loaded; the largest error and the least agreement.
    """
    if keras.backend.backend() == backend:
        with quiet():
            content, _ = convert(model, plan.structure, plan.specs, plan.outputs)
    else:
        content, _ = convert_elsewhere(model, plan, converter="_onnx", backend=backend, options={})
    path.write_bytes(content)
    try:
        session = _session(path)
        received = _received(session, plan)
    except Exception as error:  # ONNX Runtime has classes of its own, without a common one
        raise ExportError(
            f"Exporting {model.name!r} failed at the step 'run': the file was converted, but ONNX "
            f"Runtime does not run it on inputs of the shapes "
            f"{[value.shape for value in plan.values]}. ONNX Runtime says: {error}"
        ) from error
    return session, *compared(model, plan.outputs, received, expected, limits)


def _session(path: pathlib.Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with quiet():
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )


def _received(session: Any, plan: Plan) -> list[np.ndarray]:
    """The file's outputs, in the model's order; an open batch is run in two sizes."""
    inside = {value.name for value in session.get_inputs()}
    size = next((spec.shape[0] for spec in plan.specs if spec.shape), None) or _PAIR
    pieces = []
    for start in range(0, len(plan.values[0]), size):
        batch = {
            spec.name: value[start : start + size]
            for spec, value in zip(plan.specs, plan.values, strict=True)
            if spec.name in inside
        }
        pieces.append(session.run(plan.outputs, batch))
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def _failed(model: keras.Model, failures: dict[str, Exception]) -> ExportError:
    refusals = [error for error in failures.values() if isinstance(error, ConversionError)]
    step = "load" if refusals and all(e.reason == "load" for e in refusals) else "convert"
    told = [f"Exporting {model.name!r} failed at the step {step!r}."] if refusals else []
    for backend, error in failures.items():
        refused = isinstance(error, ConversionError)
        told.append(f"On {backend}, {_told(model, error)}" if refused else str(error))
    if half := half_precision(model):
        dtype, layers = half
        told.append(
            f"The model computes in {dtype} (in {listed(layers)}): build the same one under "
            "keras.config.set_dtype_policy('float32'), give it this model's weights (set_weights) "
            "and export that one."
        )
    return ExportError(" ".join(told))


def _told(model: keras.Model, error: ConversionError) -> str:
    if error.reason == "load":
        return (
            "the model could not be loaded. Register custom layers with "
            "keras.saving.register_keras_serializable in an importable module, write them with "
            f"keras.ops, or replace them by plain Keras layers. The cause: {error.message}"
        )
    if error.reason == "custom":
        where = f" (in {listed(layers_at(model, error.places))})" if error.places else ""
        return f"ONNX has no operation for {', '.join(error.operations)}{where}. Replace it."
    if error.reason == "crash":
        said = f" Its last words: {error.message}" if error.message else ""
        return f"the converter crashed.{said}"
    return f"the converter refused. It says: {error.message}"
