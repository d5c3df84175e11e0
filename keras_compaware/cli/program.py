"""What all programs share: flags, output, and one clear message for a user's mistake."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import rich.console
from absl import app, flags, logging

# Wide enough for the tables where there is no terminal: in a log, a pipe, a CI run.
console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 110)

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError)


class UserError(Exception):
    """A mistake that the user can mend; its message is all that is shown."""


def run(
    main: Callable[[], None], define_flags: Callable[[], None], positional: Sequence[str] = ()
) -> None:
    """Runs a program: parses the command line, calls `main`, exits non-zero after an error.

    Errors (a wrong value, a missing file, a full disk) end in one message on standard error;
    `--debug` shows the traceback.

    Args:
        main: The program; it reads its flags from `flags.FLAGS`.
        define_flags: Defines the program's flags. They are defined when a program runs, not when
            its module is imported, for several programs have a flag of the same name.
        positional: Names of flags that may be given without their names, in this order.
    """
    known = set(flags.FLAGS)
    define_flags()
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error, not just its message.")
    for name in set(flags.FLAGS) - known:  # those that --help shows
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:  # not chosen on the command line
            logging.set_verbosity(logging.WARNING)
        try:
            _take(positional, argv[1:])
            main()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:  # a file of any origin may cause any error
            fail(error)

    app.run(guarded, flags_parser=_parse)


def _take(names: Sequence[str], values: Sequence[str]) -> None:
    """Sets flags to what was given without their names."""
    if len(values) > len(names):
        rule = "every argument is a flag"
        if names:
            takes = " ".join(map(str.upper, names))
            rule = f"without a name, this program takes {takes}; all else is a flag"
        raise UserError(
            f"unexpected argument {values[len(names)]!r}: {rule}, --name=value. See --help."
        )
    for name, value in zip(names, values, strict=False):
        flag = flags.FLAGS[name]
        if flag.present:
            raise UserError(f"--{name} is given twice: as {value!r} and as {flag.value!r}.")
        flag.value = value


def say(text: object = "") -> None:
    """Prints text as it is: lines are not broken, brackets have no meaning."""
    console.out(text, highlight=False)


def fail(error: Exception, status: int = 1) -> None:
    """Prints an error, with its traceback after `--debug`, and exits."""
    sys.stdout.flush()
    if "--debug" in sys.argv[1:]:  # flags may not be parsed yet
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.strerror}: {os.fspath(error.filename)}"
    if not isinstance(error, (UserError, flags.Error, *USER_ERRORS)):
        message = f"{type(error).__name__}: {message}"
    if not isinstance(error, UserError | flags.Error):
        message += "\n(--debug shows where this comes from)"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; whatever is wrong with them is a message as well."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError, *USER_ERRORS) as error:
        fail(error, status=2)


def required(name: str) -> str:
    """Returns the value of a flag that must be given."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing. See --help.")
    return value


def output_path(name: str, *suffixes: str) -> str:
    """Returns a flag's path to write to, of which the folder exists."""
    path = os.path.expanduser(required(name))
    if not path.endswith(suffixes):
        raise UserError(f"--{name} must end in {' or '.join(suffixes)}. Received: {path}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(f"--{name}: there is no folder {folder}. Create it first.")
    if os.path.isdir(path):
        raise UserError(f"--{name} must name a file, and {path} is a folder")
    return path
