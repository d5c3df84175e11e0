"""Archives of weights: what compressors store of a model, bit-packed, in one file.

The file is in the safetensors format. Of a kernel under a compressor it holds the parts of its
`Code`, each a tensor named `KERNEL:PART` (`KERNEL:PART:PART` where a part is itself a code):

*   integers and booleans of less bits than their dtype has, packed, as bytes;
*   all other parts in their dtype;
*   of parts that hold something of every weight, only the entries that the code's mask keeps.

Every other weight is a tensor of its own name, shape and dtype. What is not an array (shapes, axes,
bits, the compressors' arguments) is in the file's header.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_compaware._files import atomic_path
from keras_compaware._math.backend import float32_products
from keras_compaware.base import Code, Compressor
from keras_compaware.export import _archive
from keras_compaware.export._entries import (
    as_array,
    dump_code,
    dump_compressor,
    load_code,
    load_compressor,
)
from keras_compaware.kernels import find_targets, walk
from keras_compaware.layers.compressed import compressed_layers

PathLike = str | os.PathLike[str]

_FORMAT, _VERSION = "codes", 1


@dataclasses.dataclass(frozen=True)
class CodesResult:
    """An archive that was written, read again and compared with the model.

    Attributes:
        path: the file.
        bytes: its size.
        max_error: largest relative difference between the kernels that the file restores and those
            of the model: per kernel max |a - b| / max |b|, then the largest of them. Of a model
            that was trained with the recipe it is rounding; of another, what compression costs.
    """

    path: pathlib.Path
    bytes: int
    max_error: float


@dataclasses.dataclass(frozen=True, eq=False)
class SavedCodes:
    """Content of an archive.

    Attributes:
        codes: the `Code` of every compressed kernel by the kernel's name, with tensors as parts.
        compressors: the `Compressor` that decodes it, by the same names.
        weights: every other weight by its name, a NumPy array.
    """

    codes: Mapping[str, Code]
    compressors: Mapping[str, Compressor]
    weights: Mapping[str, np.ndarray]

    def kernel(self, name: str) -> np.ndarray:
        """Returns the decoded kernel of that name, in its own shape and dtype.

        Raises:
            ValueError: there is no such kernel, or its code is not one of its compressor.
        """
        if name not in self.codes:
            raise ValueError(
                f"There is no compressed kernel '{name}'. Known: {_listed(self.codes)}. Weights "
                "that are not compressed are in `weights`."
            )
        compressor, code = self.compressors[name], self.codes[name]
        try:
            kernel = _decoded(compressor, code)
        except Exception as error:  # whatever a compressor does with parts that it did not make
            raise ValueError(f"{compressor} cannot decode the code of '{name}': {error}") from error
        if kernel.shape != code.shape:
            raise ValueError(
                f"{compressor} decodes the code of '{name}' to a kernel of the shape "
                f"{kernel.shape}, not {code.shape}."
            )
        return kernel


def save_codes(
    model: keras.Model,
    recipe: Any,
    path: PathLike,
    codes: Mapping[str, Code] | None = None,
) -> CodesResult:
    """Writes all weights of a model into one file, those under a compressor as bit-packed codes.

    The file is what the compressed model takes on a disk or on its way to a device: a kernel of
    4-bit weights takes 4 bits of each, a pruned one a mask and the values that are kept. Layers
    are not stored; `load_codes(path, model)` restores the weights of a model of this architecture.
    What straight-through wrappers need in training only is left out.

    The file is written atomically and holds the same bytes for the same weights.

    Args:
        model: a built Keras model of any kind, wrapped by `recipe.wrap` or not.
        recipe: the `Recipe` that the model was trained with; or the compressors by target name;
            or None: no weight is compressed.
        path: the file to write, by custom `*.safetensors`. Its folder must exist.
        codes: `Code`s by target name that are stored in place of new ones: those that a
            `CompressionCallback` leaves in `codes`. Encoding a kernel again would not find factors
            that were quantized.

    Returns:
        A `CodesResult`.

    Raises:
        ValueError: the model is not built, the recipe does not fit it, a code does not belong to
            its kernel, or a compressor is not registered under this package.
        FileNotFoundError: the folder does not exist.

    Example:
    >>> import tempfile
    >>> from keras_compaware import Recipe, Rule, AtEnd, UniformQuantization, compress
    >>> recipe = Recipe([Rule(".*", AtEnd(UniformQuantization(4)))])
    >>> layers = [keras.Input((64,)), keras.layers.Dense(32, name="dense")]
    >>> small = compress(keras.Sequential(layers), recipe)
    >>> path = f"{tempfile.mkdtemp()}/codes.safetensors"
    >>> result = save_codes(small, recipe, path)
    >>> 64 * 32 * 4 // 8 + 32 * 4 < result.bytes < 2000  # codes, biases, and a header
    True
    >>> load_codes(path).codes["dense/kernel"].bits["codes"]
    4
    """
    variables = _variables_by_name(model, "save_codes")
    targets = {target.name: target for target in find_targets(model)[0]}
    compressors = _compressors_of(recipe, model, targets)
    codes = dict(codes or {})
    _refuse_unknown("codes", codes, "compressed kernels", compressors)
    tensors: dict[str, np.ndarray] = {}
    entries = {}
    for name, given in compressors.items():
        compressor, code = _encode(targets[name], given, codes.get(name))
        entries[name] = {
            "compressor": dump_compressor(compressor),
            **dump_code(code, compressor, name, tensors),
        }
    for name, variable in variables.items():
        if name in tensors:
            raise ValueError(f"save_codes: two arrays have the name '{name}'. Rename a layer.")
        if name not in entries:
            tensors[name] = as_array(variable)
    data = _archive.dump({"codes": entries}, _FORMAT, _VERSION, tensors)
    saved = _parse(data, "what was just written")
    errors = [_error(saved.kernel(name), as_array(targets[name].read())) for name in entries]
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return CodesResult(pathlib.Path(path), len(data), max(errors, default=0.0))


def load_codes(path: PathLike, model: keras.Model | None = None) -> SavedCodes:
    """Reads a file of `save_codes`; with a model, writes all weights into it.

    A file that was changed or cut off is refused, by its digest. That is no signature, so nothing
    in a file is trusted for it: sizes must agree with the bytes that are there before an array is
    made, and of classes only compressors that this package has registered are made.

    Args:
        path: the file.
        model: a built model of the architecture that was saved, or None. All weights are checked
            before the first of them is overwritten. Straight-through wrappers drop their bases, as
            at the end of training.

    Returns:
        The `SavedCodes`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another format or version, or does not fit the model.

    Example:
    >>> import tempfile
    >>> def build():
    ...     return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="dense")])
    >>> model, other = build(), build()
    >>> path = f"{tempfile.mkdtemp()}/codes.safetensors"
    >>> _ = save_codes(model, None, path)
    >>> saved = load_codes(path, other)
    >>> sorted(saved.weights)
    ['dense/bias', 'dense/kernel']
    >>> bool(np.all(model.get_weights()[0] == other.get_weights()[0]))
    True
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {os.fspath(path)!r}. Expected: a file that save_codes wrote."
        )
    saved = _parse(path.read_bytes(), os.fspath(path))
    if model is not None:
        _write_into(model, saved, os.fspath(path))
    return saved


# ---- weights and their names ------------------------------------------------------------------


def _variables_by_name(model, owner):
    """Returns all weights but what serves training only, by name: targets, others by their path.

    The path is that of the layers, then the attribute of the layer or the weight's position in it:
    names that do not depend on what else was built in the process.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"{owner}: `model` must be a Keras model. Received: {model!r}.")
    if not model.built:
        raise ValueError(
            f"{owner}: the model '{model.name}' is not built, so it has no weights yet. Call it on "
            "data, or give its first layer an input shape."
        )
    named = {target.name: target.variables[0] for target in find_targets(model)[0]}
    seen = {id(variable) for variable in named.values()}
    seen |= {id(v) for layer in compressed_layers(model) for v in layer.auxiliary}
    for path, layer in walk(model):
        for attribute, variable in _own_weights(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                named[_unique(f"{path}/{attribute}".lstrip("/"), named)] = variable
    return named


def _children(layer):
    return layer._flatten_layers(include_self=False, recursive=False)


def _own_weights(layer):
    inside = {id(weight) for child in _children(layer) for weight in child.weights}
    attributes = {id(value): name.lstrip("_") for name, value in vars(layer).items()}
    own = [weight for weight in layer.weights if id(weight) not in inside]
    return [(attributes.get(id(w), f"weight_{number}"), w) for number, w in enumerate(own)]


def _unique(name, taken):
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _write_into(model, saved, file):
    variables = _variables_by_name(model, "load_codes")
    shapes = {name: weight.shape for name, weight in saved.weights.items()}
    shapes |= {name: code.shape for name, code in saved.codes.items()}
    problems = [
        f"'{name}' has the shape {tuple(variable.shape)} in the model and {tuple(shapes[name])} in "
        "the file"
        for name, variable in variables.items()
        if name in shapes and tuple(variable.shape) != tuple(shapes[name])
    ]
    problems += [f"'{name}' is not in the file" for name in variables if name not in shapes]
    problems += [f"'{name}' is not in the model" for name in shapes if name not in variables]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"load_codes: {file} does not fit the model '{model.name}', which is left as it was: "
            f"{'; '.join(problems[:8])}{more}. Expected: a model of the architecture, with the "
            "names of layers, that was saved."
        )
    values = {name: saved.weights[name] for name in variables if name in saved.weights}
    values |= {name: saved.kernel(name) for name in saved.codes}
    for name, variable in variables.items():
        variable.assign(ops.cast(ops.convert_to_tensor(values[name]), variable.dtype))
    for layer in compressed_layers(model):
        layer.release()


# ---- codes of a model -------------------------------------------------------------------------


def _compressors_of(recipe, model, targets):
    if recipe is None:
        return {}
    if hasattr(recipe, "final_compressors"):
        return recipe.final_compressors(model)
    if not isinstance(recipe, Mapping):
        raise TypeError(
            "save_codes: `recipe` must be a Recipe, a mapping from target names to Compressors, or "
            f"None. Received: {recipe!r}."
        )
    _refuse_unknown("compressors", recipe, "kernels", targets)
    for name, compressor in recipe.items():
        if not isinstance(compressor, Compressor):
            raise TypeError(f"save_codes: '{name}' needs a Compressor. Received: {compressor!r}.")
    return dict(recipe)


def _refuse_unknown(what, given, whose, known):
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"save_codes: received {what} for {_listed(unknown)}. Expected: names among the "
            f"{whose}, which are {_listed(known)}."
        )


def _encode(target, compressor, given):
    """Returns `(compressor that decodes, code)` of a target."""
    w = ops.stop_gradient(target.read())
    if given is None:
        if not np.isfinite(as_array(w).astype("float64")).all():
            raise ValueError(
                f"save_codes: expected finite weights, and '{target.name}' holds NaN or infinity."
            )
        with float32_products():
            settled = compressor.settle(w, target.axes)
            return settled, settled.encode(w, axes=target.axes)
    if not isinstance(given, Code):
        raise TypeError(f"save_codes: '{target.name}' needs a Code. Received: {given!r}.")
    if _restores(compressor, given, as_array(w)):
        return compressor, given
    raise ValueError(
        f"save_codes: the code of '{target.name}' does not restore its kernel. Expected: the codes "
        "of the callback that ended the last training of this very model, `callback.codes`; "
        "without codes, the kernels are encoded anew."
    )


def _restores(compressor, code, kernel):
    try:
        decoded = _decoded(compressor, code)
    except Exception:  # whatever a compressor does with parts that it did not make
        return False
    tolerance = 1e-3 + 4 * float(ml_dtypes.finfo(kernel.dtype).eps)
    return decoded.shape == kernel.shape and _error(decoded, kernel) <= tolerance


def _decoded(compressor, code):
    with float32_products():
        return as_array(compressor.decode(_as_tensors(code)))


def _as_tensors(code):
    """The code with tensors of the backend in its parts, as compressors expect them."""
    return code.with_arrays(keras.tree.map_structure(ops.convert_to_tensor, code.arrays()))


def _error(actual, expected):
    if expected.size == 0:
        return 0.0
    actual, expected = actual.astype("float64"), expected.astype("float64")
    size = np.max(np.abs(expected))
    return float(np.max(np.abs(actual - expected)) / (size if size > 0 else 1.0))


# ---- the file ---------------------------------------------------------------------------------


def _parse(data, file):
    header, tensors = _archive.parse(data, _FORMAT, _VERSION, file)
    try:
        codes, compressors = {}, {}
        for name, fields in header["codes"].items():
            compressors[name] = load_compressor(fields["compressor"])
            codes[name] = _as_tensors(load_code(fields, compressors[name], name, tensors))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _archive.damaged(file, f"its header is wrong ({error})") from error
    return SavedCodes(codes, compressors, tensors)


def _listed(names):
    return ", ".join(names) or "none"
