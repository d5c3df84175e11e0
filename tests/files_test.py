"""Tests of atomic writing."""

import json
import os
import stat

import pytest

from keras_compaware import _files


def test_replaces_on_success_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.weights.h5"
    path.write_text("old")
    with _files.atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("model.weights.h5")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.weights.h5"]


def test_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")

    def fail():
        with _files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_writing_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(FileNotFoundError, match="Nothing was written"), _files.atomic_path(path):
        pass
    assert path.read_text() == "old"


def test_bad_targets(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="Create it first"),
        _files.atomic_path(tmp_path / "missing" / "a.txt"),
    ):
        pass
    with pytest.raises(IsADirectoryError), _files.atomic_path(tmp_path):
        pass


def test_permissions_and_links(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    _files.write_text_atomic(link, "new\n")
    assert link.is_symlink()
    assert path.read_bytes() == b"new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_json(tmp_path):
    path = tmp_path / "a.json"
    _files.write_json_atomic(path, {"α": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"α": [1, None]}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        _files.write_json_atomic(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        _files.write_json_atomic(path, {"a": object()})
    assert path.read_bytes() == before
