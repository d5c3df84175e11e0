"""Export of Keras models to LiteRT (.tflite) files that have been run and compared."""

import importlib.util
import os
import pathlib
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph, measure
from keras_compaware._files import atomic_path
from keras_compaware.base import check_choice
from keras_compaware.export import interpreter
from keras_compaware.export._compare import (
    ExportError,
    ExportResult,
    Limits,
    check_arguments,
    compared,
    with_expected,
)
from keras_compaware.export._convert import convert
from keras_compaware.export._elsewhere import convert_elsewhere
from keras_compaware.export._places import blamed, half_precision, layers_at, listed, recurrent
from keras_compaware.export._plan import ConversionError, Plan
from keras_compaware.export._quantization import MODES, REWRITTEN
from keras_compaware.export._quiet import quiet

PathLike = str | os.PathLike[str]

_PAIR = 2
_TIMED = 10


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
    sparse: bool = False,
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

    Scattered zeros make no .tflite file faster. With `sparse=True` they make it smaller: tensors
    with many of them are stored without, and LiteRT fills them in when it loads the file. Only
    zeros in 4 x 4 tiles of dense layers are skipped when it runs.

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
        sparse: stores the kernels that the converter finds sparse enough without their zeros. Only
            for `quantization` None and "float16": LiteRT does not run sparse integers. Of float16
            it reads kernels that were pruned in 4 x 4 tiles wrongly, which is refused.

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
    _check_quantization(quantization, calibration, sparse)
    plan = Plan.of(model, inputs, quantization)
    plan = plan.with_calibration(model, calibration)
    limits = Limits.of(quantization, tolerance, min_agreement)
    plan, expected = with_expected(model, plan)
    attempts = plan.attempts()
    with atomic_path(path) as temporary:
        for attempt in attempts:
            last = attempt is attempts[-1]
            try:
                content, grids = _converted(model, attempt, allow_select_ops, sparse)
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
                    layers = blamed(model, content, str(error))
                    whose = f", here {listed(layers)}" if layers else ""
                    raise ExportError(
                        f"Exporting {model.name!r} failed at the step 'run': the file was "
                        f"converted, but LiteRT does not run it on inputs of the shapes "
                        f"{[value.shape for value in attempt.values]}. If the model's input shape "
                        "is not fully defined, rebuild it with a full one; otherwise replace the "
                        f"layer that the operator belongs to{whose}. LiteRT says: {error}"
                    ) from error
        max_error, agreement, latency_ms = None, None, {}
        if received is not None:
            try:
                max_error, agreement = compared(model, plan.outputs, received, expected, limits)
            except ExportError as error:
                if sparse and quantization == "float16":
                    raise ExportError(
                        f"{error} LiteRT reads sparse float16 kernels that were pruned in tiles "
                        "wrongly: leave out one of sparse=True and quantization='float16'."
                    ) from error
                raise
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
            sparse=_num_sparse(content) if sparse else 0,
        )
        del program  # closes the file before it is renamed
    return result


def _check_quantization(quantization: Any, calibration: Any, sparse: Any) -> None:
    if quantization is not None:
        check_choice("to_litert", "quantization", quantization, (None, *MODES))
    if (quantization == "int8") != (calibration is not None):
        raise ValueError(
            "to_litert: `calibration`, some typical examples, goes with quantization='int8', which "
            f"needs it. Received: quantization={quantization!r}, calibration "
            f"{'missing' if calibration is None else 'given'}."
        )
    if not isinstance(sparse, bool):
        raise ValueError(f"to_litert: `sparse` must be True or False. Received: {sparse!r}.")
    if sparse and quantization not in (None, "float16"):
        raise ValueError(
            f"to_litert: sparse=True does not go with quantization={quantization!r}: LiteRT does "
            'not run kernels that are both sparse and of integers. Choose one of them; "float16" '
            "goes with both. Compressed (gzip), the integers alone are the smaller file."
        )
    if quantization in REWRITTEN and importlib.util.find_spec("ai_edge_quantizer") is None:
        raise ImportError(
            f"to_litert: quantization={quantization!r} needs ai-edge-quantizer, which is not "
            "installed. Install it with `pip install 'keras-compaware[quantization]'`."
        )


def _check_arguments(model: Any, path: PathLike, tolerance: Any, agreement: Any) -> None:
    check_arguments(model, path, ".tflite", tolerance)
    if not isinstance(agreement, int | float) or not 0 <= agreement <= 1:
        raise ValueError(f"min_agreement must be in [0, 1], received {agreement!r}.")
    if importlib.util.find_spec("tensorflow") is None:
        raise ExportError(
            "Exporting to LiteRT failed at the step 'import': the converter is part of TensorFlow, "
            "which is not installed. Install it (pip install tensorflow); the Keras backend may "
            "stay as it is."
        )


def _received(path: pathlib.Path, plan: Plan) -> list[np.ndarray]:
    """The file's outputs, in the model's order."""
    values = {spec.name: value for spec, value in zip(plan.specs, plan.values, strict=True)}
    outputs = interpreter.predict(path, values, batch_size=_PAIR)
    if not isinstance(outputs, dict):
        outputs = dict.fromkeys(plan.outputs, outputs)
    return [outputs[name] for name in plan.outputs]


def _num_sparse(content: bytes) -> int:
    model = interpreter.schema().Model.GetRootAs(content)
    graphs = map(model.Subgraphs, range(model.SubgraphsLength()))
    return sum(
        graph.Tensors(i).Sparsity() is not None
        for graph in graphs
        for i in range(graph.TensorsLength())
    )


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
    model: keras.Model, plan: Plan, allow_select_ops: bool, sparse: bool
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
                sparse=sparse,
            )
    return convert_elsewhere(
        model,
        plan,
        converter="_convert",
        backend="tensorflow",
        options={
            "allow_select_ops": allow_select_ops,
            "quantization": plan.quantization,
            "sparse": sparse,
        },
        calibration=plan.calibrated_on() or None,
    )


def _conversion_failed(
    model: keras.Model, error: ConversionError, quantization: str | None
) -> ExportError:
    what = ", ".join(error.operations) or "an operation"
    where = f" (in {listed(layers_at(model, error.places))})" if error.places else ""
    if error.reason == "load":
        text = (
            "the model could not be loaded on the TensorFlow backend. Register custom layers with "
            "keras.saving.register_keras_serializable in an importable module, write them with "
            "keras.ops, or replace them by plain Keras layers before exporting."
        )
    elif half := half_precision(model):
        dtype, layers = half
        text = (
            f"the model computes in {dtype} (in {listed(layers)}), for which LiteRT lacks most "
            "kernels. Build the same model under keras.config.set_dtype_policy('float32'), give it "
            "this model's weights (set_weights) and export that one."
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
        text = "the converter crashed, in a process of its own."
        if quantization == "int8":
            layers = recurrent(model)
            here = f" (here {listed(layers)})" if layers else ""
            text += (
                f" Recurrent layers{here} and other loops cannot be quantized with "
                f"{quantization!r}: use 'dynamic_int8' or 'weight_int8'."
            )
    else:
        text = f"the converter refused {what}{where}."
        if quantization is not None:
            text += (
                f" It was to quantize ({quantization!r}): try without it, and if that goes, "
                "another `quantization`."
            )
    step = "load" if error.reason == "load" else "convert"
    if error.message:
        text += f" The converter says: {error.message}"
    return ExportError(f"Exporting {model.name!r} failed at the step {step!r}: {text}")
