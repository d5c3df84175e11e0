"""A prepared TFDS folder, looked at without TensorFlow: where it is and whether it changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK = 2**20  # bytes


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> str:
    """Returns the absolute data folder: the one given, or the one TFDS uses by default.

    Raises:
        TypeError: `data_dir` is not a path.
        ValueError: it is not on this machine.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    elif not isinstance(data_dir, (str, os.PathLike)):
        raise TypeError(f"`data_dir` must be a path. Received: {type(data_dir).__name__}")
    text = os.fspath(data_dir)
    if "://" in text:
        raise ValueError(
            f"`data_dir` must be a folder of this machine. Received: {text!r}. Copy the prepared "
            "data set to a local folder first."
        )
    return os.path.abspath(os.path.expanduser(text))


def signature(folder: str | os.PathLike[str]) -> str | None:
    """Returns a quick digest (names, sizes, times) of a folder's files; None if it is gone."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in _files(folder):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Returns a digest of what a prepared folder holds: the TFDS info, the features, the records.

    Two folders have the same one only if they hold the same data, wherever they lie.
    """
    digest = hashlib.sha256()
    for path in _files(Path(folder)):
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def prepared_versions(data_dir: str, name: str) -> list[str]:
    """Returns the versions of a data set that lie prepared in a data folder, sorted."""
    found = Path(data_dir, name.partition(":")[0]).glob("*/dataset_info.json")
    return sorted(path.parent.name for path in found)


def prepared_names(data_dir: str) -> list[str]:
    """Returns the data sets that lie prepared in a data folder, without configs, sorted."""
    names = set()
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for path in Path(data_dir).glob(pattern):
            names.add(path.relative_to(data_dir).parts[0])
    return sorted(names)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
