"""Decoded data sets as `.npy` files that need nothing but NumPy to be read.

A folder of the store holds one data set: `dataset.json` (what it is, and the shape, dtype and size
of every file) and two arrays a split. The training examples are written in one fixed random order,
so that any fraction held out for validation is a slice of the file and costs no memory. Beside the
folders, `index/` has one small file for each request (name, data folder, image size) that was
answered before: it leads to the folder without TensorFlow Datasets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_compaware._files import write_json_atomic
from keras_compaware.data import folders
from keras_compaware.data.dataset import Dataset, Split

CACHE_VARIABLE = "KERAS_COMPAWARE_CACHE"

_FORMAT = 1
_DESCRIPTION = "dataset.json"
_ENTRY_KEYS = {"arrays", "fingerprint", "source", "signature"}
_ORDER_SEED = 0
_ABANDONED_AFTER = 24 * 3600.0  # seconds
_PROGRESS_AFTER = 1.0  # seconds

Chunk = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SplitSource:
    """A split that can be read once more: its length, and chunks of (images, labels)."""

    num_examples: int
    chunks: Callable[[], Iterator[Chunk]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set on its way into the store.

    `fingerprint` is a hexadecimal digest of the content; `folder` is the prepared folder that it is
    read from, None where there is none.
    """

    name: str
    version: str
    fingerprint: str
    num_classes: int
    label_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: SplitSource
    test: SplitSource
    test_split: str
    resized: bool = False
    folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What the caller of `load` asked for: the key of the index."""

    name: str
    data_dir: str
    image_size: tuple[int, int] | None

    @property
    def file_name(self) -> str:
        """The name of this request's file in the index."""
        key = json.dumps([self.name, self.data_dir, self.image_size])
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"{_plain(self.name)}-{digest[:16]}.json"


def default_cache_dir() -> Path:
    """Returns `$KERAS_COMPAWARE_CACHE`, or `~/.keras/keras_compaware/arrays` where it is unset."""
    folder = os.environ.get(CACHE_VARIABLE) or "~/.keras/keras_compaware/arrays"
    return Path(folder).expanduser()


def folder_name(name: str, version: str, fingerprint: str, size: tuple[int, int] | None) -> str:
    """Returns the name of the folder for a data set; `size` is (height, width) if resized."""
    suffix = f"-{size[0]}x{size[1]}" if size else ""
    return f"{_plain(name)}-{version}-{fingerprint[:16]}{suffix}"


class ArrayStore:
    """The folders of decoded data sets below one folder.

    Args:
        folder: where the arrays are kept; made when something is first written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()

    def find(self, request: Request) -> dict[str, Any] | None:
        """Returns the index entry of a request answered before, or None.

        Raises:
            ValueError: the entry cannot be read.
        """
        path = self.folder / "index" / request.file_name
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            entry = json.loads(text)
            if entry["format"] == _FORMAT and entry.keys() >= _ENTRY_KEYS:
                return entry
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(
            f"The index entry {path} is damaged or was written by another version. Delete it and "
            "load the data set again."
        )

    def remember(self, request: Request, arrays: str, fingerprint: str, folder: str | None) -> None:
        """Writes the index entry of a request, atomically.

        Args:
            request: what was asked for.
            arrays: name of the folder that answers it.
            fingerprint: the digest of its content.
            folder: the prepared folder that it was decoded from, or None.
        """
        entry = {
            "format": _FORMAT,
            **dataclasses.asdict(request),
            "arrays": arrays,
            "fingerprint": fingerprint,
            "source": folder,
            "signature": folders.signature(folder) if folder else None,
        }
        index = self.folder / "index"
        index.mkdir(parents=True, exist_ok=True)
        write_json_atomic(index / request.file_name, entry)

    def has(self, arrays: str) -> bool:
        """Says whether the folder of that name is there."""
        return (self.folder / arrays).is_dir()

    def requests(self) -> list[str]:
        """Returns the names asked for so far, sorted."""
        names = set()
        for path in (self.folder / "index").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                names.add(json.loads(path.read_text(encoding="utf-8"))["name"])
        return sorted(names)

    def write(self, source: Source) -> str:
        """Decodes a source into a folder, unless it is there, and returns the folder's name.

        The folder is built under another name and renamed when complete, so a reader never sees
        half of it; of several writers at the same time the first to finish wins.

        Raises:
            OSError: there is not enough room.
            ValueError: the source does not hold what it promises.
        """
        size = source.image_shape[:2] if source.resized else None
        arrays = folder_name(source.name, source.version, source.fingerprint, size)
        if self.has(arrays):
            return arrays
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned(arrays)
        self._check_room(source)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{arrays}-", suffix=".tmp"))
        try:
            self._fill(temporary, source)
            temporary.chmod(0o755)  # mkdtemp's own mode would hide a shared store from others
            try:
                os.rename(temporary, self.folder / arrays)
            except OSError:
                if not self.has(arrays):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return arrays

    def open(self, arrays: str, validation: float) -> Dataset:
        """Maps a folder into memory, read-only, and checks it against its description.

        Args:
            arrays: name of the folder.
            validation: fraction of the training examples to hold out, in [0, 1).

        Raises:
            ValueError: the folder is damaged, or the fraction leaves one part empty.
        """
        folder = self.folder / arrays
        try:
            description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            if description["format"] != _FORMAT:
                raise ValueError(f"its format is {description['format']!r}, not {_FORMAT}")
            maps = {
                name: _open_array(folder / name, expected)
                for name, expected in description["files"].items()
            }
            parts = [
                Split(maps[f"{part}_images.npy"], maps[f"{part}_labels.npy"])
                for part in ("train", "test")
            ]
            num_classes = description["num_classes"]
            for split in parts:
                _check_labels(split.labels, num_classes)
            described = {
                "name": description["name"],
                "version": description["version"],
                "num_classes": num_classes,
                "image_shape": tuple(description["image_shape"]),
                "label_names": tuple(description["label_names"]),
                "test_split": description["test_split"],
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            reason = f"{error}" if not isinstance(error, KeyError) else f"{error} is missing"
            raise ValueError(
                f"The cached arrays in {folder} are damaged: {reason}. Delete this folder and load "
                "the data set again."
            ) from error
        train, test = parts
        held_out = _num_held_out(len(train), validation)
        kept = len(train) - held_out
        return Dataset(
            train=Split(train.images[:kept], train.labels[:kept]),
            validation=Split(train.images[kept:], train.labels[kept:]),
            test=test,
            **described,
        )

    def _fill(self, folder: Path, source: Source) -> None:
        files = {}
        total = source.train.num_examples + source.test.num_examples
        with _Progress(f"Decoding {source.name}", total) as progress:
            for part, split in (("train", source.train), ("test", source.test)):
                count = split.num_examples
                order = np.arange(count)
                if part == "train":
                    order = np.random.default_rng(_ORDER_SEED).permutation(count)
                images_path = folder / f"{part}_images.npy"
                labels_path = folder / f"{part}_labels.npy"
                images = np.lib.format.open_memmap(
                    images_path, mode="w+", dtype=np.uint8, shape=(count, *source.image_shape)
                )
                labels = np.zeros(count, dtype=np.int32)
                done = 0
                for chunk_images, chunk_labels in split.chunks():
                    end = done + len(chunk_labels)
                    if end > count:
                        break
                    try:
                        _check_labels(chunk_labels, source.num_classes)
                    except ValueError as error:
                        raise ValueError(
                            f"The {part} split of {source.name!r} cannot be used: {error}."
                        ) from None
                    images[order[done:end]] = chunk_images
                    labels[order[done:end]] = chunk_labels
                    progress.advance(end - done)
                    done = end
                else:
                    end = done
                if end != count:
                    raise ValueError(
                        f"The {part} split of {source.name!r} should hold {count} examples and "
                        f"holds {'more' if end > count else end}. Prepare the data set again."
                    )
                images.flush()
                del images
                np.save(labels_path, labels)
                for path, shape, dtype in (
                    (images_path, [count, *source.image_shape], "uint8"),
                    (labels_path, [count], "int32"),
                ):
                    size = path.stat().st_size
                    files[path.name] = {"shape": shape, "dtype": dtype, "bytes": size}
        description = {
            "format": _FORMAT,
            "name": source.name,
            "version": source.version,
            "fingerprint": source.fingerprint,
            "num_classes": source.num_classes,
            "label_names": list(source.label_names),
            "image_shape": list(source.image_shape),
            "test_split": source.test_split,
            "files": files,
        }
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def _check_room(self, source: Source) -> None:
        # A full disk would end the process without a word: the arrays are written through a map.
        count = source.train.num_examples + source.test.num_examples
        needed = count * (int(np.prod(source.image_shape)) + 4) + 2**20
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"The decoded data set {source.name!r} takes {needed / 2**20:.0f} MiB and "
                f"{self.folder} has {free / 2**20:.0f} MiB left. Make room, or name another folder "
                f"by `cache_dir` or ${CACHE_VARIABLE}."
            )

    def _remove_abandoned(self, arrays: str) -> None:
        for path in self.folder.glob(f".{arrays}-*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(path, ignore_errors=True)


class _Progress:
    """A progress bar on the standard error that appears once a second has gone by."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._begin = time.monotonic()
        self._bar = None
        self._task = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is None and time.monotonic() - self._begin > _PROGRESS_AFTER:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)


def _open_array(path: Path, expected: Mapping[str, Any]) -> np.ndarray:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes instead of {expected['bytes']}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = tuple(expected["shape"])
    if array.shape != shape or array.dtype != np.dtype(expected["dtype"]):
        raise ValueError(
            f"{path.name} holds {array.dtype} {array.shape} instead of {expected['dtype']} {shape}"
        )
    return array


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels must lie between 0 and {num_classes - 1}, and some lie between "
            f"{labels.min()} and {labels.max()} (TensorFlow Datasets marks unlabelled examples -1)"
        )


def _num_held_out(count: int, fraction: float) -> int:
    held_out = round(count * fraction)
    if fraction and not 0 < held_out < count:
        raise ValueError(
            f"validation={fraction} of {count} training examples holds out {held_out}; both parts "
            "need at least one. Pass another fraction, or 0 to hold out none."
        )
    return held_out


def _plain(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-") or "dataset"
