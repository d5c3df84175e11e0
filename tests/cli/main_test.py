"""`python -m keras_compaware`, which is the console command by another name."""

import pathlib
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    """Returns a function that runs `python -m keras_compaware ARGUMENTS...` in this process."""
    monkeypatch.syspath_prepend(ROOT / "apps" / "console")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["keras_compaware", *arguments])
        runpy.run_module("keras_compaware", run_name="__main__", alter_sys=True)

    return run


def test_help_is_that_of_the_console_command(run, capsys):
    run("--help")
    found = capsys.readouterr().out
    from keras_compaware_console import main

    main(["--help"])
    assert found == capsys.readouterr().out
    assert found.startswith("usage: keras-compaware PROGRAM")


def test_an_unknown_program(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("trian")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: there is no program 'trian'; did you mean 'train'?\n"


def test_a_program_takes_its_arguments(run, monkeypatch):
    from keras_compaware.cli import compact

    seen = []
    monkeypatch.setattr(compact, "run", lambda: seen.append(list(sys.argv)))
    run("compact", "in.keras", "--out=out.keras")
    assert seen == [["keras-compaware compact", "in.keras", "--out=out.keras"]]
