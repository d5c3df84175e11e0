"""Worker processes: they work, fail, die and end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from keras_compaware.cli.workers import Workers

MAKE = "tests.cli.worker_functions:make"


def ended(pool, number, seconds=120):
    """Waits for so many tasks to end."""
    found, until = [], time.monotonic() + seconds
    while len(found) < number:
        assert time.monotonic() < until, "the workers do not answer"
        found += pool.wait(1.0)
    return found


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_life_of_two_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    before = dict(os.environ)
    log = tmp_path / "log"
    with Workers(2, MAKE, (41,), log) as pool:
        assert dict(os.environ) == before
        assert pool.idle == 2
        pool.start("add")
        pool.start("pid")
        assert pool.idle == 0
        assert sorted(task for task, seconds in pool.running) == ["add", "pid"]
        results = {one.task: one for one in ended(pool, 2)}
        assert results["add"].result == 42
        assert pool.idle == 2

        pool.start("fail")
        (failed,) = ended(pool, 1)
        assert (failed.task, failed.result) == ("fail", None)
        assert failed.error.rstrip().endswith("ValueError: no such thing as 41")
        pool.start("threads")
        (threads,) = ended(pool, 1)
        assert (threads.result["OMP_NUM_THREADS"], threads.result["NPROC"]) == ("1", "1")
        assert threads.result["XLA_FLAGS"].startswith("--xla_dump_to= --xla_cpu_multi_thread")

        pool.start("die")
        pool.start("sleep")
        (dead,) = ended(pool, 1)
        assert (dead.task, dead.error) == ("die", "the worker process ended by signal 9; see log")
        pool.start("add")  # another process has taken its place
        assert [one.result for one in ended(pool, 1)] == [42]
        pool.start("pid")
        (pid,) = ended(pool, 1)
        assert is_running(pid.result)
    assert not is_running(pid.result)
    assert "no such thing as 41" in log.read_text()


@pytest.mark.slow
def test_a_process_that_does_not_start(tmp_path):
    with (
        Workers(1, "tests.cli.worker_functions:make_nothing", (), tmp_path / "log") as pool,
        pytest.raises(RuntimeError, match=r"ended with status 1 while it started; see .*log"),
    ):
        ended(pool, 1)
    assert "OSError: not today" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = f"""
from keras_compaware.cli.workers import Workers
if __name__ == "__main__":
    with Workers(1, {MAKE!r}, (0,), {str(tmp_path / "log")!r}) as pool:
        pool.start("pid")
        while not (found := pool.wait(1.0)):
            pass
        pool.start("sleep")
        print(found[0].result, flush=True)
        pool.wait(60)
"""
    file = tmp_path / "parent.py"
    file.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(pid)
