"""Reading models from files and writing them."""

import contextlib
import json
import math
import os
import pathlib
import stat
import warnings
import zipfile
from collections.abc import Iterator

import h5py
import keras

from keras_compaware._files import atomic_path
from keras_compaware.cli.program import UserError

PathLike = str | os.PathLike[str]

MOST_EXPANSION, EXPANSION_FREE = 20, 2**26
"""A file may unpack to so many times its size, and to so many bytes in any case."""

_SHOWN = 300  # characters of an error's message
_SLACK = 2**20  # bytes of weights that no file holds, such as states of random layers
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}


def load_model(path: str) -> keras.Model:
    """Loads the `.keras` file that `--model` names.

    Raises:
        UserError: If it is missing or damaged.
    """
    if not path.endswith(".keras"):
        raise UserError(f"--model must be a .keras file. Received: {path}")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--model: there is no file {path}")
    try:
        return read_model(path)
    except Exception as error:
        raise UserError(
            f"--model: {path} cannot be loaded ({type(error).__name__}: {first_line(error)}). "
            "Either it is damaged, or it was not written by `model.save`, or it needs a class of "
            "its own."
        ) from error


def read_model(path: PathLike, **arguments: bool) -> keras.Model:
    """As `keras.models.load_model`, for a `.keras` file of any origin.

    What would take more memory than the file suggests is refused before any of it is taken: an
    archive that unpacks to far more than its size, and arrays and layers of more weights than it
    holds. So are links, and names that lead out of the archive.

    Args:
        path: The file.
        **arguments: Of `keras.models.load_model`.

    Raises:
        ValueError: If it is refused; any other error if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _refuse_place(member)
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_EXPANSION * os.path.getsize(path) + EXPANSION_FREE:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        config = json.loads(archive.read("config.json"))
        stored = _stored_bytes(archive)
    described = _weight_bytes(config)
    if max(stored, described) > unpacked + _SLACK:
        raise ValueError(
            f"it holds {unpacked:,} bytes, which stand for {stored:,} bytes of weights, and its "
            f"layers have {described:,}"
        )
    with warnings.catch_warnings():
        # What is missing would be left at random.
        warnings.filterwarnings("error", "Skipping nested container")
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        return keras.models.load_model(path, **arguments)


def _refuse_place(member: zipfile.ZipInfo) -> None:
    path = pathlib.PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"it holds a link or leads out of its folder: {member.filename!r}")


def _stored_bytes(archive: zipfile.ZipFile) -> int:
    """The size of the arrays that an archive says it has."""
    sizes = []
    with archive.open("model.weights.h5") as file, h5py.File(file, "r") as weights:
        weights.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
    return sum(sizes)


def _weight_bytes(config: dict) -> int:
    """The size of the weights that a configuration describes, none of which is made."""
    layers = {key: value for key, value in config.items() if key != "compile_config"}
    with keras.StatelessScope(initialize_variables=False):
        model = keras.saving.deserialize_keras_object(layers)
    return sum(math.prod(v.shape) * _BYTES.get(v.dtype, 1) for v in model.variables)


def save_model(model: keras.Model, path: PathLike) -> None:
    """Saves a model atomically: what was at `path` before stays if anything fails.

    Raises:
        UserError: If it cannot be written, for instance because the disk is full.
    """
    with writing(path), atomic_path(path) as temporary:
        model.save(temporary)


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Turns an error of the operating system into a message that names the file.

    Raises:
        UserError: If the block raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{os.fspath(path)} cannot be written: {reason}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
