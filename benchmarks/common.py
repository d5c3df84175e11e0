"""What the benchmarks share: a description of the machine, tables, files of results."""

import importlib.metadata
import json
import os
import pathlib
import platform

import keras

import keras_compaware as kc

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
