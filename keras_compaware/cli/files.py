"""Reading models from files and writing them."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import keras

from keras_compaware._files import atomic_path
from keras_compaware.cli.program import UserError

PathLike = str | os.PathLike[str]


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
        return keras.models.load_model(path)
    except Exception as error:
        raise UserError(
            f"--model: {path} cannot be loaded ({type(error).__name__}: {first_line(error)}). "
            "Either it is damaged, or it was not written by `model.save`, or it needs a class of "
            "its own."
        ) from error


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
    return lines[0] if lines else type(error).__name__
