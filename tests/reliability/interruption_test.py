"""Processes that are killed at any moment, and started again: the result is that of one run."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from tests.cli.conftest import ROOT
from tests.cli.resume_test import assert_same_result

pytestmark = pytest.mark.tensorflow

# Kills the process before or after the n-th time that it renames or removes a file of the run.
AT_A_FILE = """
import os, signal
count = 0
def point(path):
    global count
    if str(path).startswith({folder!r} + "/"):
        count += 1
        if count == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
for name in ("replace", "unlink"):
    def wrapped(*paths, function=getattr(os, name), **options):
        point(paths[-1])
        function(*paths, **options)
        point(paths[-1])
    setattr(os, name, wrapped)
"""
# Kills the process so many seconds after all is imported.
AT_A_MOMENT = """
import os, signal, threading
import keras_compaware.cli.train, tensorflow
timer = threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL))
timer.daemon = True
timer.start()
"""
POINTS = 40
"""How often a run renames or removes a file, twice, before it writes its report."""

SECONDS = 6.0
"""How long a run takes, once all is imported; twice as long where the machine is busy."""


def killed_and_started_again(programs, config, path, codes):
    """Runs `train` once for each code, which kills it or not, and then to the end."""
    arguments = (f"--config={config}", f"--workdir={path}")
    deaths = 0
    for code in codes:
        outcome = programs.process("train", *arguments, code=code.replace("FOLDER", str(path)))
        if (path / "report.json").exists():
            break
        assert outcome.status == -9, str(outcome)
        deaths += 1
    if not (path / "report.json").exists():
        programs.succeeds("train", *arguments)
    return deaths


def at_a_file(number):
    return AT_A_FILE.format(folder="FOLDER", number=number)


def at_a_moment(seconds):
    return AT_A_MOMENT.format(seconds=seconds)


def assert_finished(path, finished):
    assert_same_result(path, finished)
    assert not list(path.rglob(".tmp-*"))
    report = json.loads((path / "report.json").read_text())
    steps = [firing["step"] for firing in report["compact"]["firings"]]
    assert steps == [*range(5, 40, 5), 39]  # none lost, none twice


@pytest.mark.slow
def test_three_kills_in_a_row(programs, config, finished, tmp_path):
    """In the middle of a checkpoint, at any moment, and after training."""
    path = tmp_path / "run"
    codes = [at_a_file(6), at_a_moment(random.Random(0).uniform(0.2, 1.0)), at_a_file(16)]
    assert killed_and_started_again(programs, config, path, codes) == 3
    assert_finished(path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment(programs, config, finished, tmp_path, seed, monkeypatch):
    """Every second run has no dense twin yet, and may be killed while it trains that."""
    if seed % 2:
        cache = tmp_path / "cache"
        monkeypatch.setitem(programs.environment, "KERAS_COMPAWARE_CACHE", str(cache))
    dice = random.Random(seed)
    path = tmp_path / "run"
    codes = [at_a_moment(dice.uniform(0.0, SECONDS))]
    deaths = killed_and_started_again(programs, config, path, codes)
    print(f"seed {seed}: killed {deaths} times")
    assert_finished(path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(1, 5))
def test_a_kill_at_every_file(programs, config, finished, tmp_path, begin):
    """A run is killed again and again, each time a little later."""
    path = tmp_path / "run"
    codes = [at_a_file(number) for number in range(begin, POINTS, 4)]
    assert killed_and_started_again(programs, config, path, codes) >= 3
    assert_finished(path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compact", "export"])
def test_a_kill_while_a_file_is_written(programs, finished, tmp_path, name):
    """What was there before stays, or the new file is whole."""
    suffix = {"compact": "keras", "export": "tflite"}[name]
    out = tmp_path / f"out.{suffix}"
    whole = tmp_path / f"whole.{suffix}"
    model = f"--model={finished.path / 'model.keras'}"
    programs.succeeds(name, model, f"--out={whole}")
    dice = random.Random(0)
    codes = [AT_A_FILE.format(folder=str(tmp_path), number=number) for number in (1, 2)]
    codes += [
        AT_A_MOMENT.replace("cli.train", f"cli.{name}").format(seconds=dice.uniform(0.0, 2.0))
        for _ in range(4)
    ]
    for code in codes:
        out.write_bytes(b"old")
        outcome = programs.process(name, model, f"--out={out}", code=code)
        assert outcome.status in (0, -9), str(outcome)
        content = out.read_bytes()
        # The names of members, and dates, may differ between archives.
        assert content == b"old" or abs(len(content) - whole.stat().st_size) < 64
        if content != b"old" and name == "export":
            assert content == whole.read_bytes()
    for left in tmp_path.glob(".tmp-*"):  # a killed process cannot remove it
        left.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name}


# Two processes in one folder


def started(programs, *arguments, code=""):
    run = "import runpy; runpy.run_module('apps.train', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\n{run}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **programs.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_lock_ends_with_its_process(programs, config, finished, tmp_path):
    """A second run is refused, however it is started; when the first is killed it goes on."""
    pytest.importorskip("fcntl")
    path = tmp_path / "run"
    arguments = (f"--config={config}", f"--workdir={path}")
    waits = "import keras_compaware.cli.train, keras_compaware.cli.experiment as e, time\n"
    waits += "e._run_in = lambda *a: time.sleep(600)"
    with started(programs, *arguments, code=waits) as first:
        try:
            until = time.monotonic() + 120
            while not (path / "config.json").exists():
                assert first.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            for more in ([], ["--overwrite"]):
                message = programs.fails("train", *arguments, *more)
                assert message.startswith(f"another process is working in {path}. Wait until")
        finally:
            first.send_signal(signal.SIGKILL)
    programs.succeeds("train", *arguments)
    assert_finished(path, finished)


# Sweeps


def children(pid):
    file = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def results(path):
    """The last record of each trial, without what is different in every run."""
    lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)  # none twice
    timed = ("seconds", "ms_per_step", "versions")
    return {line["id"]: {k: v for k, v in line.items() if k not in timed} for line in lines}


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_sweep_that_is_killed_at_any_moment(programs, write_sweep, tmp_path):
    """Its workers end with it, and the results are those of a sweep that was not killed."""

    file = write_sweep()
    whole, path = tmp_path / "whole", tmp_path / "sweep"
    programs.succeeds("sweep", f"--config={file}", f"--workdir={whole}", "--workers=1")
    dice = random.Random(0)
    arguments = (f"--config={file}", f"--workdir={path}", "--workers=2")
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-m", "apps.sweep", *arguments],
            cwd=ROOT,
            env={**os.environ, **programs.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            until, workers = time.monotonic() + 120, []
            while process.poll() is None and len(workers) < 2 and time.monotonic() < until:
                workers = children(process.pid)
                time.sleep(0.05)
            time.sleep(dice.uniform(0.0, 20.0))
            workers = children(process.pid) or workers
            process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 20
        while any(map(is_running, workers)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(map(is_running, workers))
    programs.succeeds("sweep", *arguments)
    assert results(path) == results(whole)
