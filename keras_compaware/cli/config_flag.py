"""The flag `--config`: a Python file, and single values that `--config.key=value` overrides."""

import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from keras_compaware.cli.config import DEFAULTS, DURATIONS, resolve, unknown
from keras_compaware.cli.files import first_line
from keras_compaware.cli.program import UserError

Resolve = Callable[[Any], dict[str, Any]]


def define(name: str, help_string: str, resolve: Resolve = resolve) -> None:
    """Defines a flag whose value is the complete configuration of a file, or None.

    Args:
        name: The flag's name.
        help_string: What `--help` says of it.
        resolve: What completes and checks a configuration. Default: that of an experiment.
    """
    config_flags.DEFINE_config_file(name, None, help_string)
    flags.FLAGS[name].parser = _Parser(name, resolve)


class _Parser(flags.ArgumentParser):
    """Loads a file so that whatever is wrong with it, or with an override, is one message."""

    def __init__(self, name: str, resolve: Resolve) -> None:
        super().__init__()
        self.name = name
        self.resolve = resolve

    def flag_type(self) -> str:
        return "Python file"

    def parse(self, path: str) -> ConfigDict:
        """Returns a locked `ConfigDict` with all keys, of which any can be overridden."""
        try:
            config = _overridable(self.resolve(load(path)))
            for key in _overridden(self.name):
                _check_key(config, key)
        except UserError as error:
            raise UserError(f"--{self.name}={path}: {error}") from error
        config.lock()
        return config


def _overridable(config: Mapping[str, Any]) -> ConfigDict:
    """Returns a `ConfigDict` that takes overrides of any type where another one may make sense.

    That is so for durations ("2 epochs" instead of 20), None, lists and the model's arguments;
    elsewhere the type of the value in the file decides how the command line is read.
    """

    def free(values: Mapping[str, Any], names: tuple[str, ...] = ()) -> ConfigDict:
        result = ConfigDict(sort_keys=False)
        for key, value in values.items():
            if isinstance(value, Mapping):
                result[key] = free(value, (*names, key))
            elif (
                value is None
                or (not names and DEFAULTS.get(key, key) is None)
                or isinstance(value, list)
                or names[:1] == ("model_args",)
                or (names[:1] == ("rules",) and key in DURATIONS)
            ):
                result[key] = FieldReference(value, field_type=object)
            else:
                result[key] = value
        return result

    return free(config)


def _overridden(name: str) -> list[list[str]]:
    """Returns the keys that the command line overrides, such as ["optimizer", "name"]."""
    found = (re.match(rf"--?(?:no)?{name}\.([^=]+)", argument) for argument in sys.argv[1:])
    return [match[1].split(".") for match in found if match]


def _check_key(config: ConfigDict, names: list[str]) -> None:
    prefix = "config."
    for name in names:
        name = name.split("[")[0]  # an element of a list
        if not isinstance(config, ConfigDict) or name not in config:
            known = list(config) if isinstance(config, ConfigDict) else []
            raise UserError(unknown("key", prefix + name, known, prefix))
        config, prefix = config[name], f"{prefix}{name}."


def load(path: str) -> Any:
    """Returns what `get_config()` of a file returns; `FILE:TEXT` calls `get_config(TEXT)`.

    Raises:
        UserError: If the file is missing, cannot be run, or has no such function.
    """
    name, *argument = path.split(":", 1)
    file = pathlib.Path(name).expanduser()
    if not os.path.isfile(file):
        raise UserError("there is no such file")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise UserError("expected a Python file, which ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError("the file has no function get_config()")
        return get_config(*argument)
    except UserError:
        raise
    except Exception as error:  # the file is a program and may raise anything
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(frame.filename) == file
        ]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"{type(error).__name__}{place}: {first_line(error)}") from error
