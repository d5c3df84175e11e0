"""Codes and compressors as JSON values and flat arrays, and back from a file of any origin.

What is read back is checked first: every size against the bytes that are there, every class against
the compressors that this package has registered.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_compaware.base import PACKAGE, Chain, Code, Compressor, KernelAxes
from keras_compaware.export import _archive, _packing

_MOST_PER_WEIGHT = 64  # bytes that a part may hold of one weight: the planes of a binary code
_DTYPES = {dtype.name: dtype for dtype in _archive.DTYPES.values()}


def as_array(tensor):
    """Returns a tensor as a NumPy array of its own dtype, on whatever backend."""
    return np.asarray(ops.convert_to_numpy(tensor)).astype(
        _dtype(keras.backend.standardize_dtype(tensor.dtype)), copy=False
    )


# ---- codes ------------------------------------------------------------------------------------


def dump_code(code, compressor, name, tensors, outside=None):
    """Adds the arrays of a code to `tensors`; returns all else of it as JSON values.

    Args:
        code: The code.
        compressor: What decodes it, or None if that is not known.
        name: Name of its tensors: `NAME:PART`.
        tensors: Arrays by name.
        outside: Which entries of the tensor an outer code keeps, a flat mask, or None: all.
    """
    arrays = {key: as_array(p) for key, p in code.parts.items() if not isinstance(p, Code)}
    kept = _kept(code, arrays.get(code.mask), outside)
    parts = {}
    for key, part in code.parts.items():
        place = f"{name}:{key}"
        if isinstance(part, Code):
            same = tuple(part.shape) == tuple(code.shape)
            inside = _stored_entries(code, key, kept, outside) if same else None
            parts[key] = dump_code(part, part.compressor, place, tensors, inside)
            if part.compressor != _rest(compressor):
                known = part.compressor is not None
                parts[key]["compressor"] = dump_compressor(part.compressor) if known else None
            continue
        stored = _stored_entries(code, key, kept, outside) if key in code.entrywise else None
        if place in tensors:
            raise ValueError(f"Two arrays have the name '{place}'. Rename a layer.")
        parts[key], tensors[place] = _dump_array(code, key, arrays[key], stored, place)
    fields = {
        "shape": list(code.shape),
        "dtype": code.dtype,
        "axes": _dump_axes(code.axes),
        "parts": parts,
        "bits": {key: _plain(bits) for key, bits in code.bits.items()},
        "payload": {key: _dump_axes(axes) for key, axes in code.payload.items()},
        "counts": {key: int(count) for key, count in code.counts.items()},
        "mask": code.mask,
        "entrywise": list(code.entrywise),
        "split": code.split,
    }
    return {key: value for key, value in fields.items() if value not in ({}, [], None)}


def load_code(fields, compressor, name, tensors, outside=None):
    """Returns the code that `dump_code` has taken apart; takes its arrays out of `tensors`.

    Entries that are not stored come back as zeros.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The values are not those of a code, or do
            not fit the arrays.
    """
    counts = fields.get("counts", {})
    code = Code(
        parts={},
        bits={key: _bits(value) for key, value in fields["bits"].items()},
        payload={key: _load_axes(axes) for key, axes in fields.get("payload", {}).items()},
        shape=_sizes(fields.get("shape", [])),
        dtype=_dtype(fields["dtype"]).name,
        axes=_load_axes(fields["axes"]),
        counts=dict(zip(counts, _sizes(list(counts.values())), strict=True)),
        mask=_text(fields.get("mask")),
        entrywise=tuple(_text(key) for key in fields.get("entrywise", ())),
        split=_text(fields.get("split")),
    )
    code.axes.batch(len(code.shape))
    parts, kept, nbytes = {}, None, sum(tensor.nbytes for tensor in tensors.values())
    # The mask comes first, for it says which entries the others hold.
    for key in sorted(fields["parts"], key=lambda key: key != code.mask):
        part, place = fields["parts"][key], f"{name}:{key}"
        if isinstance(part, Mapping):
            same = _sizes(part.get("shape", [])) == code.shape
            inside = _stored_entries(code, key, kept, outside) if same else None
            inner = _rest(compressor)
            if "compressor" in part:
                inner = load_compressor(part["compressor"]) if part["compressor"] else None
            loaded = load_code(part, inner, place, tensors, inside)
            parts[key] = dataclasses.replace(loaded, compressor=inner)
            continue
        stored = _stored_entries(code, key, kept, outside) if key in code.entrywise else None
        parts[key] = _load_array(code, key, part, stored, tensors.pop(place))
        if key == code.mask:
            kept = _kept(code, parts[key], outside)
    nbytes -= sum(tensor.nbytes for tensor in tensors.values())
    # Products of factors are larger than their parts, but not beyond all measure.
    if outside is None and math.prod(code.shape) > (8 * nbytes) ** 2:
        raise ValueError(f"'{name}' is said to have the shape {code.shape}, but {nbytes} bytes")
    return dataclasses.replace(code, parts={key: parts[key] for key in fields["parts"]})


def _rest(compressor):
    """What decodes the parts of a code that are codes, where nothing else is said of them."""
    rest = compressor.compressors[1:] if isinstance(compressor, Chain) else ()
    return Chain(rest) if len(rest) > 1 else next(iter(rest), None)


def _kept(code, mask, outside):
    """Flat mask of the entries whose payload is stored, or None where the code has none."""
    if mask is None or mask.dtype != bool or mask.shape != tuple(code.shape):
        return None
    return mask.reshape(-1) if outside is None else mask.reshape(-1) & outside


def _stored_entries(code, key, kept, outside):
    """Flat mask of the entries that are stored of an entrywise part, or None: all of them."""
    return kept if kept is not None and key in code.counts else outside


def _planes(code, key, shape, dtype):
    """How many numbers an entrywise part of shape (..., *code.shape) holds of every entry."""
    leading = len(shape) - len(code.shape)
    planes = math.prod(shape[: max(0, leading)])
    too_many = planes * dtype.itemsize > _MOST_PER_WEIGHT
    if leading < 0 or shape[leading:] != tuple(code.shape) or too_many:
        raise ValueError(
            f"the part '{key}' of a code holds something of every entry, so its shape must be "
            f"(..., {', '.join(map(str, code.shape))}), with at most {_MOST_PER_WEIGHT} bytes of "
            f"each. Received: {shape}, {dtype.name}."
        )
    return planes


def _dump_array(code, key, array, stored, place):
    """Returns `(JSON values, array that is stored)`: no values of an array that is as it was."""
    bits = _width(code.bits[key])
    values = [array.dtype.name, list(array.shape)]
    if stored is not None:
        array = array.reshape(_planes(code, key, array.shape, array.dtype), stored.size)[:, stored]
    if _is_packed(array.dtype, bits):
        values.append("signed" if _is_signed(array, bits, place) else "unsigned")
        return values, _packing.pack(array, bits)
    return (values if stored is not None else []), array


def _load_array(code, key, values, stored, tensor):
    name, shape, *sign = values or (tensor.dtype.name, tensor.shape)
    dtype, shape = _dtype(name), _sizes(shape)
    bits = _width(code.bits[key])
    planes = 1 if stored is None else _planes(code, key, shape, dtype)
    count = math.prod(shape) if stored is None else planes * int(np.count_nonzero(stored))
    if _is_packed(dtype, bits):
        expected, size = np.dtype(np.uint8), _packing.num_bytes(count, bits)
    else:
        expected, size = dtype, count
    if tensor.dtype != expected or tensor.size != size:
        raise ValueError(
            f"the part '{key}' of a code should be {size} numbers of dtype {expected.name}, there "
            f"are {tensor.size} of {tensor.dtype.name}"
        )
    if _is_packed(dtype, bits):
        signed = {"signed": True, "unsigned": False}[sign[0]]
        tensor = _packing.unpack(tensor.reshape(-1), count, bits, signed=signed)
    if stored is not None:
        dense = np.zeros((planes, stored.size), dtype)
        dense[:, stored] = tensor.reshape(planes, -1) if count else 0
        tensor = dense
    return tensor.astype(dtype, copy=False).reshape(shape)


def _is_packed(dtype, bits):
    return dtype.kind in "biu" and bits < 8 * dtype.itemsize


def _is_signed(array, bits, place):
    """Whether integers are written with a sign; those of a codebook fill all bits without one."""
    signed = array.dtype.kind == "i" and _packing.fits(array, bits, signed=True)
    if not signed and not _packing.fits(array.astype("int64"), bits, signed=False):
        raise ValueError(
            f"'{place}' has values in [{array.min()}, {array.max()}], which do not fit into the "
            f"{bits} bits that its code states."
        )
    return signed


def _width(bits):
    return math.ceil(bits)


def _plain(number):
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _bits(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 64:
        raise ValueError(f"bits must be in (0, 64]. Received: {value!r}")
    return value


def _sizes(values):
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"sizes must be integers of at least 0. Received: {value!r}")
    return tuple(values)


def _text(value):
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected a name. Received: {value!r}")
    return value


def _dtype(name):
    if name not in _DTYPES:
        raise ValueError(
            f"arrays of dtype {name!r} cannot be stored. Expected one of {', '.join(_DTYPES)}."
        )
    return _DTYPES[name]


def _dump_axes(axes):
    return [list(axes.inputs), list(axes.outputs), list(axes.spatial), axes.groups]


def _load_axes(values):
    inputs, outputs, spatial, groups = values
    return KernelAxes(_sizes(inputs), _sizes(outputs), _sizes(spatial), *_sizes([groups]))


# ---- compressors ------------------------------------------------------------------------------


def dump_compressor(compressor):
    """Returns a compressor's registered name and arguments as JSON values.

    Raises:
        ValueError: It could not be made from them again.
    """
    values = _brief(keras.saving.serialize_keras_object(compressor))
    try:
        same = load_compressor(values) == compressor
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{compressor!r} cannot be stored: {error}.") from error
    if not same:
        raise ValueError(f"{compressor!r} cannot be stored: its configuration is that of another.")
    return values


def load_compressor(values):
    """Makes a compressor of this package from its registered name and arguments.

    Unlike in `keras.saving`, neither modules nor functions can be named: a class is looked up among
    those that the package has registered, and must be a compressor.

    Raises:
        ValueError: It is anything else.
    """
    name = values["class_name"]
    found = None
    if isinstance(name, str) and name.startswith(f"{PACKAGE}>"):
        found = keras.saving.get_registered_object(name)
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise ValueError(
            f"{name!r} is not a compressor of {PACKAGE}. Expected: a class that keras_compaware "
            "has registered, such as 'keras_compaware>LowRank'; classes of one's own are "
            "registered by `keras_compaware.base.register`, before the file is loaded"
        )
    return found.from_config({key: _argument(value) for key, value in values["config"].items()})


def _argument(value):
    if isinstance(value, Mapping):
        return load_compressor(value)
    if isinstance(value, (list, tuple)):
        return tuple(_argument(item) for item in value)
    return value


def _brief(value):
    """What `serialize_keras_object` returns, without the modules."""
    if isinstance(value, Mapping):
        if "class_name" in value:
            name = value.get("registered_name") or value["class_name"]
            return {"class_name": name, "config": _brief(value["config"])}
        return {key: _brief(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_brief(item) for item in value]
    return value
