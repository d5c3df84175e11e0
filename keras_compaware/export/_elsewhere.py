"""Conversion in a process of its own, on another backend of Keras."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph
from keras_compaware.export._compare import ExportError
from keras_compaware.export._plan import ConversionError, Plan

_NAMES = {"tensorflow": "TensorFlow", "torch": "PyTorch"}
# Lines in which absl ("I0000 00:00:17.5 1 stub.cc:31] ...") and TensorFlow ("2026-01-01 00:00:00.1:
# W ...") inform or warn; warnings of Python ("module.py:457: UserWarning: ...").
_LOG = re.compile(r"WARNING: |[IW]\d{4} \d\d:|\d{4}-\d\d-\d\d [\d:.]+: [IW] ")
_WARNING = re.compile(r"\S.*:\d+: \w*Warning: ")


def convert_elsewhere(
    model: keras.Model,
    plan: Plan,
    *,
    converter: str,
    backend: str,
    options: Mapping[str, Any],
    calibration: list[list[np.ndarray]] | None = None,
) -> tuple[bytes, dict[str, str]]:
    """Converts in a process of its own.

    Args:
        model: a functional or Sequential model, on any backend.
        plan: what it is converted with.
        converter: module of this package that has the function `convert`.
        backend: the backend that it runs on.
        options: keyword arguments for it that JSON can express.
        calibration: examples, passed to it under this name: batches with an array for every
            input, all batches of one shape. None passes nothing.

    Returns:
        What `convert` returns.

    Raises:
        ConversionError: the converter refused, or crashed.
        ExportError: the model could not be handed over, or the process failed.
    """
    if not _graph.has_graph(model):
        raise ExportError(
            f"Exporting {model.name!r} failed at the step 'convert': a subclassed model "
            f"({type(model).__name__}) can only be exported on the {_NAMES[backend]} backend, "
            f"this one is on {keras.backend.backend()!r}. Set "
            f"KERAS_BACKEND={backend}, or write it as keras.Model(inputs, outputs)."
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
                f"backend {backend!r} could not be saved. The cause: {error}"
            ) from error
        job = {
            "converter": converter,
            "model": str(folder / "model.keras"),
            "modules": sorted(_custom_modules(folder / "model.keras")),
            "inputs": [dataclasses.asdict(spec) for spec in plan.specs],
            "outputs": plan.outputs,
            "options": dict(options),
            "calibration": _saved(calibration, folder / "calibration.npz"),
            "result": str(folder / "result"),
            "outcome": str(folder / "outcome.json"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
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
            raise ConversionError("crash", _last_words(process.stderr))
        if process.returncode != 0 or not outcome_path.is_file():
            raise ExportError(
                f"Exporting {model.name!r} failed at the step 'convert': the process that "
                f"converts on the backend {backend!r} ended with code {process.returncode}. Its "
                f"last words: {_last_words(process.stderr) or 'none'}"
            )
        outcome = json.loads(outcome_path.read_text(encoding="utf-8"))
        if not outcome["ok"]:
            raise ConversionError(
                outcome["reason"], outcome["message"], outcome["operations"], outcome["places"]
            )
        return (folder / "result").read_bytes(), outcome["notes"]


def _last_words(text: str, limit: int = 600) -> str:
    """The end of what a process wrote, without what libraries log that is no error."""
    kept, in_warning = [], False
    for line in text.splitlines():
        # The lines of a warning that follow its first are indented.
        in_warning = bool(_WARNING.match(line)) or (in_warning and line[:1].strip() == "")
        if not (in_warning or _LOG.match(line)):
            kept.append(line)
    return "\n".join(kept).strip()[-limit:].strip()


def _saved(examples: list[list[np.ndarray]] | None, path: pathlib.Path) -> str | None:
    if examples is None:
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
