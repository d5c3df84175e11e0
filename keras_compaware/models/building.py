"""From what a user writes to a model: a known name, a file, or a function of their own."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_compaware.models.cnn import small_cnn
from keras_compaware.models.lenet import lenet_5, lenet_300_100
from keras_compaware.models.mobilenet import mobilenet_v2_small
from keras_compaware.models.resnet import resnet_20, resnet_32, resnet_56

_MODELS: dict[str, Callable[..., keras.Model]] = {
    function.__name__: function
    for function in (
        lenet_300_100,
        lenet_5,
        small_cnn,
        resnet_20,
        resnet_32,
        resnet_56,
        mobilenet_v2_small,
    )
}


def names() -> tuple[str, ...]:
    """Returns the names that `build` knows: networks that give an image one class.

    Example:
        >>> names()
        ('lenet_300_100', 'lenet_5', 'small_cnn', 'resnet_20', 'resnet_32', 'resnet_56',
        'mobilenet_v2_small')
    """
    return tuple(_MODELS)


def build(
    spec: str | os.PathLike[str], input_shape: Sequence[int], num_classes: int, **kwargs: Any
) -> keras.Model:
    """Builds or loads a model that fits the data.

    Args:
        spec: a name of `names()`; or the path of a `.keras` file, which is loaded without running
            code that it may contain (`safe_mode`) and without its optimizer; or
            `"package.module:function"`, called as `function(input_shape, num_classes, **kwargs)`.
        input_shape: shape of one example, such as (height, width, channels).
        num_classes: number of classes, the length of the output.
        **kwargs: further arguments of the function; a file takes none.

    Returns:
        An uncompiled or compiled model with one input (batch, *input_shape) and one output
        (batch, num_classes).

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument has the wrong type, or the function returns no Keras model.
        ValueError: the name is unknown, the file cannot be loaded, or the model does not fit.

    Example:
        >>> build("lenet_300_100", (28, 28, 1), 10).output_shape
        (None, 10)
    """
    if not isinstance(spec, (str, os.PathLike)):
        raise TypeError(
            "`spec` must be the name of a model, the path of a .keras file or "
            f'"package.module:function". Received: {type(spec).__name__}'
        )
    text = os.fspath(spec)
    shape = _shape(input_shape)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"`num_classes` must be a positive integer. Received: {num_classes!r}")
    if text in _MODELS:
        return _MODELS[text](shape, num_classes, **kwargs)
    if text.endswith(".keras"):
        if kwargs:
            raise ValueError(
                f"A model file takes no further arguments. Received: {', '.join(sorted(kwargs))}"
            )
        model = _load(Path(text).expanduser())
    elif ":" in text:
        model = _function(text)(shape, num_classes, **kwargs)
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"{text} must return a keras.Model. It returned: {type(model).__name__}"
            )
    else:
        raise ValueError(
            f"There is no model {text!r}.{_close(text, _MODELS)} Known names: "
            f"{', '.join(_MODELS)}. "
            'Or pass the path of a file that ends in ".keras", or "package.module:function".'
        )
    _check_fit(model, text, shape, num_classes)
    return model


def _shape(value: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(int(side) for side in value)
    except TypeError as error:
        raise TypeError(
            f"`input_shape` must be integers, a side each. Received: {value!r}"
        ) from error
    if not shape or min(shape) < 1:
        raise ValueError(f"`input_shape` must be positive integers. Received: {value!r}")
    return shape


def _load(path: Path) -> keras.Model:
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {path} (from {Path.cwd()}).")
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"The model file {path} cannot be loaded ({type(error).__name__}: {reason.strip()}). "
            "Either it is damaged or was not written by `model.save`, or a class of its own has "
            "to be imported first."
        ) from error


def _function(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and needs one that is not
        raise ValueError(
            f"There is no module {error.name!r}, which {spec!r} asks for. It must be installed, or "
            "lie in a folder named by the environment variable PYTHONPATH."
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'`spec` must have the form "package.module:function". Received: {spec!r}'
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"The module {module_name!r} has no function {function_name!r}."
            f"{_close(function_name, functions)}"
        )
    if not callable(function):
        raise TypeError(f"{spec!r} must name a function. It names a {type(function).__name__}.")
    return function


def _check_fit(model: keras.Model, spec: str, shape: tuple[int, ...], num_classes: int) -> None:
    try:
        inputs, outputs = model.input_shape, model.output_shape
    except (AttributeError, ValueError):
        inputs = outputs = None
    if not (_is_shape(inputs) and _is_shape(outputs)):
        raise ValueError(
            f"The model {spec} must have one input and one output of known shapes: a functional "
            "model, or a Sequential one that begins with keras.Input."
        )
    given = (None, *shape)
    fits = len(inputs) == len(given) and all(
        side in (None, wanted) for side, wanted in zip(inputs[1:], shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"The model {spec} does not fit the data: it takes inputs of the shape {inputs[1:]}, "
            f"and the data has {shape}."
        )
    if len(outputs) != 2 or outputs[1] != num_classes:
        raise ValueError(
            f"The model {spec} does not fit the data: its output has the shape {outputs[1:]}, and "
            f"{num_classes} classes need ({num_classes},)."
        )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(side is None or isinstance(side, int) for side in value)


def _close(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
