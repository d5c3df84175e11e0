"""Disks that are full, folders that refuse, files that vanish: a message, nothing half-written."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess

import keras
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import _files
from keras_compaware.cli import experiment
from keras_compaware.search import ResultsFile
from tests.cli.resume_test import assert_same_result

pytestmark = pytest.mark.tensorflow


class Faults:
    """Lets the n-th file that is written fail as the operating system does."""

    def __init__(self, number, code):
        self.number, self.code, self.written = number, code, 0

    def fsync(self, descriptor):
        self.written += 1
        if self.written == self.number:
            raise OSError(self.code, os.strerror(self.code))
        os.fsync(descriptor)


@contextlib.contextmanager
def faults(number, code):
    with pytest.MonkeyPatch.context() as patch:
        found = Faults(number, code)
        patch.setattr(_files, "os", _Module(os, fsync=found.fsync))
        patch.setattr(_files, "_sync_folder", lambda folder: None)
        yield found


class _Module:
    """A module of which some functions are others."""

    def __init__(self, module, **functions):
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name):
        return getattr(self._module, name)


def fails_and_goes_on(programs, config, finished, path, number, code):
    arguments = (f"--config={config}", f"--workdir={path}")
    with faults(number, code) as found:
        outcome = programs("train", *arguments)
    if found.written < number:
        assert outcome.status == 0
        return False
    assert outcome.status == 1, str(outcome)
    assert outcome.err.startswith("error: "), str(outcome)
    assert os.strerror(code) in outcome.err
    assert str(path) in outcome.err  # the file that could not be written
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert not list(path.rglob(".tmp-*"))
    assert not (path / "report.json").exists()
    programs.succeeds("train", *arguments)
    assert_same_result(path, finished)
    return True


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (4, errno.ENOSPC),
        pytest.param(12, errno.EROFS, marks=pytest.mark.slow),
        pytest.param(1, errno.EACCES, marks=pytest.mark.slow),
    ],
)
def test_a_file_that_cannot_be_written(programs, config, finished, tmp_path, number, code):
    """A checkpoint; the trained model; the first file."""
    assert fails_and_goes_on(programs, config, finished, tmp_path / "run", number, code)


@pytest.mark.slow
def test_any_file_that_cannot_be_written(programs, config, finished, tmp_path):
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
    number = 1
    while fails_and_goes_on(
        programs, config, finished, tmp_path / str(number), number, codes[number % len(codes)]
    ):
        number += 1
    print(f"{number - 1} files failed")
    assert number > 12


@pytest.mark.slow
@pytest.mark.parametrize("size", ["32k", "64k", "96k", "128k"])
def test_a_disk_that_is_full(programs, config, finished, tmp_path, size):
    """A file system of so many bytes, which is made larger afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    try:
        made = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        path = disk / "run"
        arguments = (f"--config={config}", f"--workdir={path}")
        outcome = programs.process("train", *arguments)
        assert outcome.status == 1, str(outcome)
        message = outcome.err[outcome.err.index("error: ") :]
        assert "No space left on device" in message, str(outcome)
        assert str(path) in message
        assert "Traceback" not in outcome.err
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        programs.succeeds("train", *arguments)
        assert_same_result(path, finished)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_a_result_is_appended(tmp_path):
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append({"id": "a", "status": "done"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            file.append({"id": "b", "status": "done"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.append({"id": "c", "status": "done"})  # nothing is left of what was cut off
    assert [record["id"] for record in file.load()] == ["a", "c"]


# Files that vanish


class Remove(keras.callbacks.Callback):
    """Removes something when the second epoch begins."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink()


def test_a_folder_that_is_removed_under_way(programs, config, finished, tmp_path, monkeypatch):
    path = tmp_path / "run"
    arguments = (f"--config={config}", f"--workdir={path}")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_tensorboard", lambda workdir: [Remove(path)])
        message = programs.fails("train", *arguments)
    assert message == f"{path / 'checkpoints'} cannot be written: No such file or directory\n"
    assert not path.exists()
    programs.succeeds("train", *arguments)
    assert_same_result(path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints", "config.json", "plan.txt", "history.csv"])
def test_a_part_that_is_removed_under_way(programs, config, finished, tmp_path, monkeypatch, name):
    """What the run does not read again is no loss; it goes on."""
    path = tmp_path / "run"
    monkeypatch.setattr(experiment, "_tensorboard", lambda workdir: [Remove(path / name)])
    programs.succeeds("train", f"--config={config}", f"--workdir={path}")
    assert_same_result(path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.tflite", "report.json", "model.keras"])
def test_a_dense_twin_of_which_a_part_is_gone(programs, config, finished, tmp_path, name):
    """It is trained again, or the message says which file is missing."""
    (twin,) = pathlib.Path(programs.environment["KERAS_COMPAWARE_CACHE"]).glob("dense_twins/*")
    kept = tmp_path / "twin"
    shutil.copytree(twin, kept)
    path = tmp_path / "run"
    arguments = (f"--config={config}", f"--workdir={path}")
    try:
        (twin / name).unlink()
        outcome = programs("train", *arguments)
        if outcome.status:
            assert outcome.status == 1, str(outcome)
            assert str(twin) in outcome.err, str(outcome)
            assert "Traceback" not in outcome.err
        else:
            assert_same_result(path, finished)
            report = json.loads((path / "report.json").read_text())
            assert report["dense"]["accuracy"] == finished.report["dense"]["accuracy"]
    finally:
        shutil.rmtree(twin)
        shutil.copytree(kept, twin)
