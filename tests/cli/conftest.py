"""Runs the programs of apps/ inside the test process, in folders of their own."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
import textwrap

import pytest
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Outcome:
    """What a program did: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    def __str__(self):
        return f"status {self.status}\n--- out\n{self.out}\n--- err\n{self.err}"


class Programs:
    """The programs, with their data and caches below one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            "KERAS_COMPAWARE_CACHE": str(folder / "cache"),
            "TFDS_DATA_DIR": str(folder / "tfds"),
        }

    def __call__(self, name, *arguments):
        """Runs `python -m apps.NAME ARGUMENTS...` in this process."""
        app.define_help_flags()
        known = set(flags.FLAGS)
        out, err = io.StringIO(), io.StringIO()
        status = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            for key, value in self.environment.items():
                patch.setenv(key, value)
            file = str(ROOT / "apps" / f"{name}.py")
            patch.setattr(sys, "argv", [file, *map(str, arguments)])
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                runpy.run_path(file, run_name="__main__")
            except SystemExit as error:
                status = error.code or 0
            finally:
                for flag in set(flags.FLAGS) - known:
                    delattr(flags.FLAGS, flag)
                flags.FLAGS.unparse_flags()
        return Outcome(status, out.getvalue(), err.getvalue())

    def process(self, name, *arguments, code=None, timeout=180, **environment):
        """Runs a program, or some code before it, as a process of its own."""
        command = [sys.executable, "-m", f"apps.{name}"]
        if code is not None:
            run = f"import runpy; runpy.run_module('apps.{name}', run_name='__main__')"
            command = [sys.executable, "-c", f"{textwrap.dedent(code)}\n{run}"]
        found = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Outcome(found.returncode, found.stdout, found.stderr)

    def succeeds(self, name, *arguments):
        """Runs a program that must succeed; returns what it printed."""
        outcome = self(name, *arguments)
        assert outcome.status == 0, str(outcome)
        return outcome.out

    def fails(self, name, *arguments):
        """Runs a program that must fail with one message; returns the message."""
        outcome = self(name, *arguments)
        assert outcome.status in (1, 2), str(outcome)
        error = outcome.err.lstrip()  # a progress bar of the data may end in a new line
        assert error.startswith("error: "), str(outcome)
        assert "Traceback" not in error, str(outcome)
        return error.removeprefix("error: ")


CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.data = {"name": "digits"}
    config.model = "lenet_300_100"
    config.model_args = {"units": [32, 16]}
    config.epochs = 3
    config.batch_size = 64
    config.rules = ConfigDict(sort_keys=False)
    config.rules.low_rank = {"where": None, "every": 5, "compressor": "LowRank", "rank": 4}
    RULES
    return config
"""


SWEEP = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.data = {"name": "digits"}
    config.model = "lenet_300_100"
    config.model_args = {"units": [16, 8]}
    config.batch_size = 64
    config.sweep = ConfigDict()
    config.sweep.families = {
        "pruning": {
            "rule": {"compressor": "MagnitudePruning"},
            "budgets": [{"label": "50 %", "sparsity": 0.5}],
        },
        "rank": {
            "rule": {"where": "dense", "compressor": "LowRank"},
            "budgets": [{"label": "rank 2", "rank": 2}],
        },
    }
    config.sweep.every = [1, 10]
    config.sweep.schedules = {"constant": {"schedule": "constant", "learning_rate": 0.01}}
    config.sweep.seeds = [0]
    config.sweep.steps = 40
    RULES
    return config
"""


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The programs; data and dense twins are shared by the tests of a process."""
    from keras_compaware import data

    programs = Programs(tmp_path_factory.mktemp("programs"))
    with contextlib.redirect_stderr(io.StringIO()):  # the preparation of the data prints
        data.load(
            "digits",
            data_dir=programs.environment["TFDS_DATA_DIR"],
            cache_dir=programs.environment["KERAS_COMPAWARE_CACHE"],
        )
    return programs


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Returns a function that writes a configuration file: code to add -> path."""
    folder = tmp_path_factory.mktemp("configs")

    def write(code="", content=CONFIG):
        file = folder / f"config_{len(list(folder.iterdir()))}.py"
        file.write_text(content.replace("RULES", textwrap.dedent(code).replace("\n", "\n    ")))
        return file

    return write


@pytest.fixture(scope="session")
def config(write_config):
    """A configuration that trains a tiny network for three epochs of 13 steps."""
    return write_config()


@dataclasses.dataclass
class Run:
    """A finished run: its folder, what was printed, its report."""

    path: pathlib.Path
    out: str
    report: dict


@pytest.fixture(scope="session")
def finished(programs, config):
    """A finished run of `config`; its folder must not be changed."""
    path = programs.folder / "finished"
    out = programs.succeeds("train", f"--config={config}", f"--workdir={path}")
    return Run(path, out, json.loads((path / "report.json").read_text()))


@pytest.fixture(scope="session")
def contents():
    """Returns a function: folder -> {relative path: bytes} of the files in it, locks left out."""

    def read(folder):
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != ".lock"
        }

    return read
