"""The console command, and what it adds: files without the names of their flags."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONSOLE = ROOT / "apps" / "console"

sys.path.insert(0, str(CONSOLE))
import keras_compaware_console as console  # noqa: E402

sys.path.remove(str(CONSOLE))


def test_every_program_is_there():
    assert set(console.PROGRAMS) == {file.stem for file in (ROOT / "apps").glob("*.py")}


def test_the_script_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="keras-compaware")
    assert script.value == "keras_compaware_console:main"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help(arguments, capsys):
    console.main(arguments)
    out = capsys.readouterr().out
    for name, text in console.PROGRAMS.items():
        assert name in out
        assert text in out


def test_version(capsys):
    console.main(["--version"])
    assert capsys.readouterr().out == (
        f"keras-compaware {importlib.metadata.version('keras-compaware')}\n"
    )


@pytest.mark.parametrize(
    ("name", "advice"), [("compct", "did you mean 'compact'?"), ("prune", "choose one of train,")]
)
def test_an_unknown_program(name, advice, capsys):
    with pytest.raises(SystemExit) as stopped:
        console.main([name])
    assert stopped.value.code == 2
    assert advice in capsys.readouterr().err


def test_keras_is_imported_only_for_a_program():
    code = "import keras_compaware_console as c, sys; c.main([]); print('keras' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=CONSOLE, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "False"


def test_a_program_runs_as_by_itself():
    code = "import keras_compaware_console as c; c.main()"
    arguments = ["compact", "missing.keras", "out.keras"]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=CONSOLE, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "error: --model: there is no file missing.keras"
