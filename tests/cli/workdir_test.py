"""Folders of runs that several processes want at the same time; files of configurations."""

import threading

import pytest

from keras_compaware.cli.config_flag import load
from keras_compaware.cli.program import UserError
from keras_compaware.cli.workdir import Workdir

fcntl = pytest.importorskip("fcntl")


def test_who_waits_comes_after_who_holds_the_lock(tmp_path, capsys):
    """A dense twin that another process trains is waited for. Locks belong to open files, so
    threads stand for processes here."""
    workdir = Workdir(tmp_path / "twin")
    events = []
    waiting = threading.Event()

    def wait():
        waiting.set()
        with Workdir(tmp_path / "twin").locked(wait=True):
            events.append("second")

    with workdir.locked():
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(timeout=10)
        thread.join(timeout=0.3)
        assert thread.is_alive()
        events.append("first")
    thread.join(timeout=10)
    assert events == ["first", "second"]
    assert f"waiting for another process to finish {tmp_path / 'twin'}" in capsys.readouterr().out


def test_a_lock_is_given_back(tmp_path):
    workdir = Workdir(tmp_path / "run")
    for _ in range(2):
        with workdir.locked():
            second = Workdir(tmp_path / "run").locked()
            with pytest.raises(UserError, match="another process is working"):
                second.__enter__()


def test_a_text_behind_the_file_is_the_argument_of_get_config(write_config):
    file = write_config(content="def get_config(text='none'):\n    return {'model': text}\n")
    assert load(f"{file}:small") == {"model": "small"}
    assert load(str(file)) == {"model": "none"}
