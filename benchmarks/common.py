"""What the benchmarks share: the machine, its memory, fresh processes, tables, files of results."""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

import keras_compaware as kc
from keras_compaware import data

_PACKAGES = ("keras", "numpy", "tensorflow", "jax", "torch", "ai-edge-litert")


def environment() -> dict:
    """Returns versions and hardware, without anything that names the machine or its user."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "keras_compaware": kc.__version__,
        "python": platform.python_version(),
        "backend": keras.backend.backend(),
        "versions": versions,
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Steps(keras.utils.PyDataset):
    """Exactly so many batches, pass after pass over a split, each in an order of its own.

    They are one epoch of `fit` with shuffle=False. With `steps_per_epoch`, an epoch of `fit` would
    end early wherever a pass ends within it.

    Args:
        batches: The batches of a split, at the epoch of the first pass.
        steps: Number of batches.
    """

    def __init__(self, batches: data.Batches, steps: int) -> None:
        super().__init__()
        self._batches, self._steps, self._first = batches, steps, batches.epoch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple:
        passed, within = divmod(index, len(self._batches))
        if self._batches.epoch != self._first + passed:
            self._batches.epoch = self._first + passed
        return self._batches[within]


def peak_of(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """Returns what a function returns, and how far it raised the peak of resident memory, in bytes.

    The rise is None where the system does not tell it (it is Linux that does).
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free would be used again, unseen
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _resident("VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = pathlib.Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{status} has no line {field!r}")


def in_fresh_process(module: str, arguments: list[str], what: str) -> dict:
    """Runs `python -m module` and returns its last line of output, which is JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compressed(model: keras.Model, compressor: kc.Compressor) -> keras.Model:
    """Returns a model with every kernel compressed, without training."""
    recipe = kc.Recipe([kc.Rule(lambda target: True, kc.AtEnd(compressor))])
    return kc.compress(model, recipe)


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Returns latencies over those of a reference: the median of the passes' ratios."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def spread(values: Sequence[float]) -> str:
    """Returns mean and standard deviation; of one value, the value."""
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(path: pathlib.Path, results: dict) -> None:
    """Writes results as JSON: all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_results(path: pathlib.Path, settings: Mapping) -> dict:
    """Returns the results of a file, or results without an arm if there is none.

    Raises:
        ValueError: If the file was measured with other settings.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        return {"settings": settings, "arms": {}}
    results = json.loads(path.read_text("utf-8"))
    found = results["settings"]
    if found != settings:
        other = [key for key in {*found, *settings} if found.get(key) != settings.get(key)]
        raise ValueError(
            f"{path} was measured with other settings: {', '.join(sorted(other))}. Give another "
            "--out, or the flags of that run."
        )
    return results


def run_arms(
    path: pathlib.Path,
    settings: Mapping,
    arms: Mapping[str, Callable[[], dict]],
    only: str = "",
) -> dict:
    """Runs the arms that a file of results lacks, and writes the file after each of them.

    Args:
        path: The file, results.json.
        settings: What the results of all arms depend on, as JSON values.
        arms: By name, what runs an arm and returns what was measured.
        only: Regular expression: arms without a match in their name are left out.

    Returns:
        The results: the settings, the environment of the last arm that was run, and the arms.
    """
    results = read_results(path, settings)
    todo = [name for name in arms if re.search(only, name) and name not in results["arms"]]
    for number, name in enumerate(todo, start=1):
        keras.utils.clear_session()
        started = time.perf_counter()
        found = arms[name]()
        seconds = time.perf_counter() - started
        results["environment"] = environment()
        results["arms"][name] = found | {"seconds": seconds}
        write_results(path, results)
        print(f"{number} of {len(todo)}: {name}, {seconds:.0f} s: {found}", flush=True)
    return results


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds a flag for every field of a dataclass, on which the results of all arms depend."""
    for field in dataclasses.fields(settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)


def settings_of(flags: argparse.Namespace, settings: type) -> Any:
    """Returns the settings that the flags of `add_settings` say."""
    return settings(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(settings)})


def kept(path: pathlib.Path, build: Callable[[], keras.Model]) -> keras.Model:
    """Returns the model of a file, which is made, without its optimizer, if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        model = build()
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        keras.Model(model.inputs, model.outputs, name=model.name).save(temporary)
        os.replace(temporary, path)
        print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    return keras.models.load_model(path, compile=False)
