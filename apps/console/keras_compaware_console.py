"""The console command `keras-compaware`: all programs of `apps` under one name.

It lies outside the package, which imports Keras: only what a program needs is imported, and only
once TensorFlow has been told to be quiet.
"""

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

PROGRAMS = {
    "train": "trains a network by a configuration, compacts and exports it, and reports",
    "compact": "turns a model into a smaller one, with a budget if one is given",
    "export": "writes a model as a LiteRT file, run and compared",
    "evaluate": "measures a .keras or .tflite file on a data set",
    "sweep": "trains a network many times: how often it is compressed, by what, how much",
    "report": "shows what a run has found, or several side by side",
}
"""The programs, each a module of `keras_compaware.cli`, with what it does."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program that the first argument names; `python -m apps.NAME` does the same.

    Args:
        arguments: The command line after the command itself. Default: that of the process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print(f"keras-compaware {importlib.metadata.version('keras-compaware')}")
    elif name in PROGRAMS:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a config may import its neighbours
        sys.argv = [f"keras-compaware {name}", *arguments[1:]]
        sys.modules["__main__"].__doc__ = f"keras-compaware {name} {PROGRAMS[name]}.\n"  # --help
        importlib.import_module(f"keras_compaware.cli.{name}").run()
    else:
        near = difflib.get_close_matches(name, PROGRAMS, 1)
        advice = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PROGRAMS)}."
        print(f"error: there is no program {name!r}; {advice}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:<{width}}  {text}" for name, text in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: keras-compaware PROGRAM [--flag=value ...]",
            "",
            *lines,
            "",
            "keras-compaware PROGRAM --help lists the flags of a program; --version prints the",
            "version. KERAS_BACKEND chooses the backend: tensorflow, jax or torch.",
        ]
    )
