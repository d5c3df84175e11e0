"""A safetensors file with a JSON header and a digest over every byte of it.

The header is the only entry of the file's `__metadata__`. Its first field is the SHA-256 digest of
the file with 64 zeros in the digest's place, so nothing can be changed, cut off or added unseen.
"""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from keras_compaware.base import PACKAGE

DTYPES = {
    "BOOL": np.dtype(bool),
    **{
        f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}")
        for kind in "IU"
        for size in (2, 4, 8)
    },
    **{f"{kind}8": np.dtype(f"{kind.lower()}1") for kind in "IU"},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_MEND = "Copy the file again from where it was written, or write it anew with save_codes(...)."
_PLACEHOLDER = "0" * 64
# What a file begins with after the eight bytes of its header's size, up to the digest.
_BEGINNING = json.dumps({"__metadata__": {PACKAGE: '{"sha256":"'}}, separators=(",", ":"))
_BEGINNING = _BEGINNING.removesuffix('"}}').encode()
_DIGEST = slice(8 + len(_BEGINNING), 8 + len(_BEGINNING) + len(_PLACEHOLDER))


def dump(header: dict[str, Any], kind: str, version: int, tensors: dict[str, np.ndarray]) -> bytes:
    """Returns the bytes of a file.

    Args:
        header: what `json.dumps` accepts.
        kind: name of the format.
        version: number of the format's version.
        tensors: arrays by name, of the dtypes in `DTYPES`.
    """
    header = {"sha256": _PLACEHOLDER, "format": kind, "version": version, **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    data = bytearray(safetensors.numpy.save(tensors, {PACKAGE: text}))
    data[_DIGEST] = _digest(data).encode()
    return bytes(data)


def parse(
    data: bytes, kind: str, version: int, name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the header and the tensors of a file, or raises before it allocates anything.

    Args:
        data: content of the file.
        kind: name of the format that is expected.
        version: its version.
        name: what messages call the file.

    Raises:
        ValueError: the content is not of this format and version, or is not what was written.
    """
    header = _header(data, name)
    if header.get("format") != kind:
        raise ValueError(
            f"{name} is of the format {header.get('format')!r}, expected {kind!r}. {_MEND}"
        )
    if header.get("version") != version:
        raise ValueError(
            f"{name} is in version {header.get('version')!r} of its format; this release reads "
            f"version {version}. Use the release of {PACKAGE} that wrote it, or write it anew."
        )
    if not data.startswith(_BEGINNING, 8) or data[_DIGEST] != _digest(data).encode():
        raise ValueError(
            f"{name} is damaged: it is not the file that was written, for its SHA-256 digest is "
            f"another. {_MEND}"
        )
    try:
        tensors = {
            key: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], buffer=entry["data"])
            for key, entry in sorted(safetensors.deserialize(data), key=lambda item: item[0])
        }
    except (safetensors.SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise damaged(name, f"its table of tensors is wrong ({error})") from error
    return header, tensors


def damaged(name: str, what: str) -> ValueError:
    """Returns the error for a file whose content contradicts itself."""
    return ValueError(f"{name} is damaged: {what}. {_MEND}")


def _header(data: bytes, name: str) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError(
            f"{name} is cut off or no safetensors file: by its first bytes a header of {size} "
            f"bytes follows, but the whole file has {len(data)}. {_MEND}"
        )
    try:
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][PACKAGE])
        header.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name} was not written by save_codes, or its header is damaged. {_MEND}"
        ) from error
    return header


def _digest(data: bytes | bytearray) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[: _DIGEST.start])
    digest.update(_PLACEHOLDER.encode())
    digest.update(view[_DIGEST.stop :])
    return digest.hexdigest()
