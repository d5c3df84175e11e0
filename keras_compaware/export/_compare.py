"""Files that were written, run and compared with the model."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_compaware.export._plan import Plan, call_model, output_names

PathLike = str | os.PathLike[str]


class ExportError(RuntimeError):
    """A model could not be exported; the message says at which step, where and what to do."""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A file that was written, run and compared with the model.

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
            this machine, the median of a few; empty where the file could not be run, and of ONNX
            files.
        quantization: the mode, or None.
        grids: name of each kernel that lies on a uniform grid of at most 8 bits to how the file
            holds it: "int8" or "int4", with the very codes of that grid; "float32" or "float16",
            not quantized; "rounded" to another grid; "not found" among the file's tensors.
        sparse: number of tensors of a .tflite file of which only what is not zero is stored.
        ops: operator name to count, most frequent first.
        inputs: name of each input in the file's signature to its shape, None where it may be
            resized. In the order of the model's inputs, which need not be that of the file.
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
    sparse: int = 0

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
        if self.sparse:
            more.append(f"  sparse:  {self.sparse} tensors")
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


@dataclasses.dataclass(frozen=True)
class Limits:
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
    def of(cls, quantization: str | None, tolerance: float | None, agreement: float) -> "Limits":
        if quantization in (None, "float16"):
            error = tolerance or (1e-4 if quantization is None else 1e-2)
            return cls(error, error, None)
        return cls(tolerance, tolerance or 0.25, agreement)


def with_expected(model: keras.Model, plan: Plan) -> tuple[Plan, list[np.ndarray]]:
    """Returns the plan with the names of the outputs, and the model's own outputs, flattened.

    Raises:
        ExportError: an output is not finite.
    """
    expected = _expected(model, plan)
    plan = dataclasses.replace(plan, outputs=output_names(model, len(expected)))
    for name, value in zip(plan.outputs, expected, strict=True):
        if not np.isfinite(value.astype(np.float64)).all():
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'compare': the model's own output "
                f"{name!r} is not finite on the examples, so there is nothing to compare with. "
                "Pass realistic ones as `inputs=`, or check the model's weights."
            )
    return plan, expected


def _expected(model: keras.Model, plan: Plan) -> list[np.ndarray]:
    num_examples = len(plan.values[0])
    size = plan.batch_size or min(num_examples, 32)
    pieces = []
    for start in range(0, num_examples, size):
        batch = [value[start : start + size] for value in plan.values]
        outputs = call_model(model, keras.tree.pack_sequence_as(plan.structure, batch))
        pieces.append([keras.ops.convert_to_numpy(t) for t in keras.tree.flatten(outputs)])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def compared(
    model: keras.Model,
    names: list[str],
    received: list[np.ndarray],
    expected: list[np.ndarray],
    limits: Limits,
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


def check_arguments(model: Any, path: PathLike, suffix: str, tolerance: Any) -> None:
    """Checks what all exports have in common.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: the path has another suffix, or the tolerance is no positive number.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model, received {type(model).__name__}.")
    if pathlib.Path(path).suffix != suffix:
        raise ValueError(f"Expected a path ending in '{suffix}', received {os.fspath(path)!r}.")
    is_number = isinstance(tolerance, int | float) and 0 < tolerance < math.inf
    if not (tolerance is None or is_number):
        raise ValueError(f"tolerance must be a positive number, received {tolerance!r}.")


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    if theirs.ndim < 2 or theirs.shape[-1] < 2:
        return None
    return float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
