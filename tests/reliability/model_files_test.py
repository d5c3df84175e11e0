"""`.keras` files of any origin, as the programs read them: refused in one line, or read rightly."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware.cli import files
from tests.reliability.hostile import hostile_model, network, packed, unpacked

pytestmark = pytest.mark.tensorflow

MIB = 2**20
MEMORY = 300 * MIB
"""What a program may take of memory for a hostile file, beyond what it takes for a good one."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound file: its bytes."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("good") / "good.keras"
    network().save(path)
    return path.read_bytes()


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(programs, tmp_path, monkeypatch):
    """Returns a function: bytes of a file -> what a program says that refuses it."""
    folder = tmp_path / "box" / "inner"
    (folder / "temporary").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = folder / "bad.keras"

    def run(data, name="compact"):
        path.write_bytes(data)
        before = listing(tmp_path)
        suffix = {"compact": ["--out", folder / "out.keras"], "evaluate": []}
        suffix["export"] = ["--out", folder / "out.tflite"]
        message = programs.fails(name, "--model", path, *suffix[name])
        assert listing(tmp_path) == before
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1000
        return message

    return run


def config_of(data):
    return json.loads(unpacked(data)["config.json"])


def with_config(data, config):
    return packed({**unpacked(data), "config.json": json.dumps(config)})


# Damage


def try_damaged(programs, good, folder, seed):
    """A damaged file is refused by `compact`, or what is read is what was stored."""
    data, is_whole = hostile_model(good, seed)
    path, out = folder / "bad.keras", folder / "out.keras"
    path.write_bytes(data)
    out.unlink(missing_ok=True)
    outcome = programs("compact", f"--model={path}", f"--out={out}")
    if outcome.status:
        assert outcome.status == 1, str(outcome)
        assert outcome.err.startswith("error: "), str(outcome)
        assert "Traceback" not in outcome.err
        assert not out.exists()
        assert len(outcome.err) < 2000, str(outcome)
        return False
    if is_whole:  # and no weight was left at random
        found = []
        for number in range(2):
            keras.utils.set_random_seed(number)
            found.append(files.read_model(path).get_weights())
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
    return True


def test_damaged_files(programs, good, tmp_path):
    read = [try_damaged(programs, good, tmp_path, seed) for seed in range(32)]
    assert 0 < sum(read) < 16


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(100, 500, 50))
def test_more_damaged_files(programs, good, tmp_path, begin):
    read = [try_damaged(programs, good, tmp_path, seed) for seed in range(begin, begin + 50)]
    assert 0 < sum(read) < 25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "evaluate"])
def test_damaged_files_of_other_programs(programs, good, tmp_path, name):
    path, out = tmp_path / "bad.keras", tmp_path / "out.tflite"
    for seed in range(40):
        path.write_bytes(hostile_model(good, seed)[0])
        arguments = [f"--model={path}"] + ([f"--out={out}"] if name == "export" else [])
        outcome = programs(name, *arguments)
        assert outcome.status in (0, 1), str(outcome)
        if outcome.status:
            assert outcome.err.lstrip().startswith("error: "), str(outcome)
            assert "Traceback" not in outcome.err


# Code in a file


def lambda_layer(marker):
    code = keras.layers.Lambda(eval(f"lambda x: open({str(marker)!r}, 'w') and x"), name="trap")
    return keras.saving.serialize_keras_object(code)


def called(module, name, *arguments):
    return {
        "module": module,
        "class_name": name,
        "config": list(arguments),
        "registered_name": name,
    }


TRAPS = {
    "Lambda": lambda_layer,
    "os.system": lambda marker: called("os", "system", f"touch {marker}"),
    "builtins.exec": lambda marker: called("builtins", "exec", f"open({str(marker)!r}, 'w')"),
    "subprocess.Popen": lambda marker: {
        **called("subprocess", "Popen"),
        "config": {"args": ["touch", str(marker)]},
    },
    "a function of a module": lambda marker: {
        "module": "pathlib",
        "class_name": "function",
        "config": "Path",
        "registered_name": "function",
    },
    "a file that is loaded": lambda marker: {
        **called("keras.models", "load_model"),
        "config": {"filepath": str(marker), "safe_mode": False},
    },
    "a file that is fetched": lambda marker: {
        **called("keras.utils", "get_file"),
        "config": {"fname": str(marker), "origin": f"file://{__file__}"},
    },
}


@pytest.mark.parametrize("trap", TRAPS)
def test_no_code_of_a_file_is_run(refused, good, tmp_path, trap):
    marker = tmp_path / "was-run"
    for place in ("layer", "activation", "initializer", "compile_config"):
        config, code = config_of(good), TRAPS[trap](marker)
        if place == "layer":
            layer = config["config"]["layers"][3]
            config["config"]["layers"][3] = {**layer, **code}
        elif place == "compile_config":
            config["compile_config"] = {"optimizer": code}
        else:
            key = "activation" if place == "activation" else "kernel_initializer"
            config["config"]["layers"][4]["config"][key] = code
        message = refused(with_config(good, config))
        assert "cannot be loaded" in message
        assert not marker.exists()


def test_a_file_cannot_permit_itself_code(refused, good, tmp_path):
    config = config_of(good)
    layers = config["config"]["layers"]
    permission = called("keras.config", "enable_unsafe_deserialization")
    layers[2]["config"]["gamma_initializer"] = permission
    layers[3] = {**layers[3], **lambda_layer(tmp_path / "was-run")}
    refused(with_config(good, config))
    assert not (tmp_path / "was-run").exists()
    layers[2]["config"]["gamma_initializer"] = "ones"
    refused(with_config(good, config))  # nor is it permitted from now on
    assert not (tmp_path / "was-run").exists()


# Names in an archive


@pytest.mark.parametrize(
    "name", ["../evil", "../../evil", "assets/../../evil", "/evil", "assets/../../../../evil"]
)
def test_names_that_lead_out_of_an_archive(refused, good, tmp_path, name):
    if name.startswith("/"):
        name = str(tmp_path / "evil")
    data = packed({**unpacked(good), name: "evil", "assets/x": "more than three are unpacked"})
    assert "leads out of its folder" in refused(data)
    assert not list(tmp_path.rglob("*evil*"))


def test_links_in_an_archive(refused, good, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    members = {**unpacked(good), "assets": str(tmp_path), "assets/evil": "evil", "assets/x": "x"}
    assert "it holds a link" in refused(packed(members, links=["assets"]))
    assert secret.read_text() == "secret"


def test_an_output_that_is_a_link(programs, good, tmp_path):
    """What a link points to is replaced; the link stays."""
    (tmp_path / "good.keras").write_bytes(good)
    (tmp_path / "real.keras").write_bytes(b"old")
    (tmp_path / "link.keras").symlink_to("real.keras")
    programs.succeeds(
        "compact", f"--model={tmp_path / 'good.keras'}", f"--out={tmp_path / 'link.keras'}"
    )
    assert (tmp_path / "link.keras").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "real.keras")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device"])
def test_what_is_no_file(programs, tmp_path, kind):
    path = tmp_path / "in.keras"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    message = programs.fails("compact", f"--model={path}", f"--out={tmp_path / 'out.keras'}")
    assert message == f"--model: there is no file {path}\n"


# Size


def bomb(good, kind, size, folder):
    """A small file that would take `size` bytes."""
    members = unpacked(good)
    config = config_of(good)
    if kind == "archive":
        return packed({**members, "model.weights.h5": bytes(size)}, (), zipfile.ZIP_DEFLATED)
    if kind == "config":
        return packed({**members, "config.json": b"[" * size}, (), zipfile.ZIP_DEFLATED)
    if kind == "members":
        extra = {f"assets/{number}": bytes(size // 64) for number in range(64)}
        return packed({**members, **extra}, (), zipfile.ZIP_DEFLATED)
    if kind == "layers":
        config["config"]["layers"][5]["config"]["units"] = size // (4 * 8)
        config["config"]["layers"][5].pop("build_config")
        return with_config(good, config)
    assert kind == "arrays"
    path = folder / "bomb.h5"
    path.write_bytes(members["model.weights.h5"])
    with h5py.File(path, "r+") as file:
        group = file["layers/dense/vars"]
        del group["0"]
        group.create_dataset("0", (size // 4,), "float32", chunks=(1024,), compression="gzip")
    return packed({**members, "model.weights.h5": path.read_bytes()})


BOMBS = {
    "archive": "it would unpack to",
    "members": "it would unpack to",
    "config": "it would unpack to",
    "layers": "bytes of weights, and its layers have",
    "arrays": "bytes, which stand for",
}

# Not `resource.getrusage`, whose peak is that of the parent process if that was larger.
MEASURED = """
import runpy
try:
    runpy.run_module("apps.compact", run_name="__main__")
finally:
    lines = open("/proc/self/status").read().splitlines()
    print("PEAK", *(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def peak(programs, path, out):
    """Returns `(status, message, bytes of memory at most)` of `compact` in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, f"--model={path}", f"--out={out}"],
        cwd=pathlib.Path(__file__).resolve().parents[2],
        env={**os.environ, **programs.environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stderr, int(found.stdout.rsplit("PEAK", 1)[1])


@pytest.mark.parametrize("kind", BOMBS)
def test_what_would_take_much_memory(refused, good, kind, tmp_path):
    assert BOMBS[kind] in refused(bomb(good, kind, 128 * MIB, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_how_much_memory_is_taken(programs, good, tmp_path):
    path, out = tmp_path / "in.keras", tmp_path / "out.keras"
    path.write_bytes(good)
    status, _, usual = peak(programs, path, out)
    assert status == 0
    for kind, words in BOMBS.items():
        path.write_bytes(bomb(good, kind, 1024 * MIB, tmp_path))
        assert path.stat().st_size < 8 * MIB
        status, message, taken = peak(programs, path, out)
        assert status == 1
        assert words in message
        print(f"{kind}: {(taken - usual) / MIB:.0f} MiB beyond {usual / MIB:.0f}")
        assert taken < usual + MEMORY
