"""Atomic files: a reader sees the old content or the new one, never half of either."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path that replaces `path` when the block ends without an error.

    The temporary file lies in the same folder and its name ends in the name of `path`, so that
    writers which look at the suffix (".keras", ".weights.h5", ".tflite") accept it. On success it
    is flushed to the disk and renamed over `path` in one step; on any failure it is removed and
    the old file, if there was one, stays as it was. A symbolic link is followed: what it points
    to is replaced, not the link.

    Args:
        path: the file to write. Its folder must exist.

    Yields:
        The path to write to. No file exists there yet.

    Raises:
        FileNotFoundError: the folder does not exist, or the block wrote nothing.
        IsADirectoryError: `path` is a folder.

    Example:
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("new")
    >>> (folder / "a.txt").read_text()
    'new'
    """
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {os.fspath(path)!r}: the folder {str(target.parent)!r} does not exist. "
            "Create it first."
        )
    if target.is_dir():
        raise IsADirectoryError(f"Expected the path of a file, received a folder: {str(target)!r}.")
    temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(
                f"Nothing was written to {str(temporary)!r}, so {str(target)!r} is left as it was."
            )
        if target.exists():
            shutil.copymode(target, temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(target.parent)


def write_text_atomic(path: PathLike, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically and without translating line ends.

    Args:
        path: the file to write. Its folder must exist.
        text: the new content.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json_atomic(path: PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Writes `value` to `path` as JSON, atomically.

    Args:
        path: the file to write. Its folder must exist.
        value: what `json.dumps` accepts. NaN and the infinities are refused, since they are not
            JSON and other readers reject them.
        indent: spaces per level, or None for one line.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: `value` holds something that JSON cannot express.
        ValueError: `value` holds NaN or an infinity.
    """
    write_text_atomic(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename durable where the system can (folders cannot be opened everywhere)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
