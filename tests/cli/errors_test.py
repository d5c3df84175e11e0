"""What a user does wrong ends in one message, a status that is not 0, and nothing half-written."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware.cli import experiment

pytestmark = pytest.mark.tensorflow


@pytest.fixture
def refused(programs, tmp_path, monkeypatch):
    """Returns a function: what `train` says when it refuses, before anything is written."""

    def train(self, workdir):
        raise AssertionError(f"trained in {workdir.path}")

    monkeypatch.setattr(experiment.Experiment, "train", train)
    path = tmp_path / "run"

    def run(*arguments, workdir=path):
        message = programs.fails("train", *arguments, f"--workdir={workdir}")
        assert not path.exists()
        return message

    return run


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupt")
    (folder / "model.keras").write_bytes(b"PK\x03\x04 this is no model")
    (folder / "model.weights.h5").write_bytes(b"\x89HDF no weights")
    (folder / "model.tflite").write_bytes(b"this is no model " * 10)
    return folder


# The command line


def test_what_is_missing(programs, config, tmp_path):
    assert "--config is missing" in programs.fails("train", f"--workdir={tmp_path / 'run'}")
    assert "--workdir is missing" in programs.fails("train", f"--config={config}")
    for name in ("compact", "export", "evaluate"):
        assert "--model is missing" in programs.fails(name)
    assert "--out is missing" in programs.fails("compact", "--model=a.keras")
    assert "--workdir is missing" in programs.fails("report")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "evaluate", "report"])
def test_arguments_that_are_no_flags(programs, name):
    message = programs.fails(name, "model.keras")
    assert "unexpected argument 'model.keras': every argument is a flag" in message


@pytest.mark.parametrize("name", ["compact", "export"])
def test_more_arguments_than_a_program_takes(programs, name):
    message = programs.fails(name, "in.keras", "out", "another")
    assert "unexpected argument 'another'" in message


@pytest.mark.parametrize("name", ["train", "compact", "export", "evaluate", "report"])
def test_unknown_flags(programs, name):
    outcome = programs(name, "--wrkdir=a")
    assert outcome.status in (1, 2)
    assert "Unknown command line flag 'wrkdir'" in outcome.err
    assert "Traceback" not in outcome.err


def test_debug_shows_the_traceback(programs):
    outcome = programs("report", "--workdir=nowhere", "--debug")
    assert outcome.status == 1
    assert "Traceback" in outcome.err
    assert "error: there is no nowhere/report.json; no run is there" in outcome.err


# The configuration file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x = 1", "the file has no function get_config()"),
        ("import nope_nope", "ModuleNotFoundError in line 1: No module named 'nope_nope'"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return {}['x']", "KeyError in line 2: 'x'"),
        ("def get_config():\n    raise ValueError('bad\\nworse')", "ValueError in line 2: bad"),
        ("def get_config():\n    pass", "must be a ml_collections.ConfigDict. Received: None"),
        ("def get_config(size):\n    pass", "TypeError: get_config() missing 1 required"),
        ("def get_config():\n    return {'epohcs': 1}", "Did you mean 'config.epochs'?"),
    ],
)
def test_bad_configuration_files(refused, write_config, content, expected):
    file = write_config(content=content)
    message = refused(f"--config={file}")
    assert message.startswith(f"--config={file}: ")
    assert expected in message


def test_a_configuration_file_that_is_not_there(refused, tmp_path):
    message = refused(f"--config={tmp_path / 'none.py'}")
    assert message == f"--config={tmp_path / 'none.py'}: there is no such file\n"
    (tmp_path / "config.txt").write_text("x")
    assert "expected a Python file" in refused(f"--config={tmp_path / 'config.txt'}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epohcs=3", "unknown key 'config.epohcs'. Did you mean 'config.epochs'?"),
        ("optimizer.nme=sgd", "Did you mean 'config.optimizer.name'?"),
        ("rules.lowrank.every=3", "unknown key 'config.rules.lowrank'. Did you mean"),
        ("rules.low_rank.evry=3", "Did you mean 'config.rules.low_rank.every'?"),
        ("epochs.x=3", "unknown key 'config.epochs.x'. Known: none"),
        ("epochs=many", "--config.epochs=many"),
        ("epochs=0", "config.epochs must be at least 1. Received: 0"),
        ("rules.low_rank.every=often", "config.rules.low_rank.every must be a number of"),
        ("rules.low_rank.compressor=LowRnk", "'LowRnk'. Did you mean 'LowRank'?"),
        ("rules.low_rank.where=dens9", "takes no kernel: kernels of the model 'lenet_300_100'"),
        ("rules.low_rank.rank=17", "rank=17 is above the largest possible rank 16"),
        ("rules.low_rank.rank=0", "`rank` must be at least 1"),
        ("optimizer.name=sdg", "unknown optimizer 'sdg'. Did you mean 'sgd'?"),
        ("optimizer.schedule=linear", "unknown schedule 'linear'. Known: constant, cosine"),
        ("model=lenet", "There is no model 'lenet'"),
        ("model=no_such_module:build", "There is no module 'no_such_module'"),
        ("model_args={} --config.model=no/m.keras", "There is no model file no/m.keras"),
        ("data.name=no_such_set", "no_such_set"),
        ("data.validation=1.5", "`validation` is the fraction of the training split"),
        ("data.image_size=(8,)", "`image_size` must be two integers (height, width)"),
        ("init_from=nowhere.keras", "--init_from: there is no file nowhere.keras"),
    ],
)  # fmt: skip
def test_bad_overrides(refused, config, override, expected):
    assert expected in refused(f"--config={config}", *f"--config.{override}".split(" "))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("config.rules.low_rank.rnak = 3", "Did you mean 'config.rules.low_rank.rank'?"),
        ("config.rules = ConfigDict()", "the configuration has no rules"),
        ("config.rules = {'a': {'where': '.', 'action': 'Skip'}}", "nothing would be compressed"),
        ("config.rules.low_rank.update({'where': 'dense2', 'rank': 16})", "rank 16 saves nothing"),
        ("config.rules.again = {'where': 'dense1', 'action': 'Skip'}", "is taken by rule 1"),
        ("config.rules.low_rank.action = 'Penalty'", "Actions that take a `compressor`"),
        ("config.model_args = {'unit': [3]}", "unexpected keyword argument 'unit'"),
    ],
)  # fmt: skip
def test_bad_rules(refused, write_config, code, expected):
    assert expected in refused(f"--config={write_config(code)}")


def test_a_data_folder_that_is_not_there(refused, config, tmp_path):
    message = refused(
        f"--config={config}", "--config.data.name=mnist", f"--data_dir={tmp_path / 'none'}"
    )
    assert str(tmp_path / "none") in message
    assert not (tmp_path / "none").exists()


# Files that are damaged or do not fit


def test_corrupt_models(programs, refused, config, corrupt, tmp_path):
    model, litert = corrupt / "model.keras", corrupt / "model.tflite"
    assert "cannot be loaded" in refused(
        f"--config={config}", f"--config.model={model}", "--config.model_args={}"
    )
    for start in (model, corrupt / "model.weights.h5"):
        message = refused(f"--config={config}", f"--init_from={start}")
        assert f"--init_from: the weights of {start} cannot be loaded" in message
    for name, suffix in (("compact", "keras"), ("export", "tflite")):
        out = tmp_path / f"old.{suffix}"
        out.write_bytes(b"old")
        message = programs.fails(name, f"--model={model}", f"--out={out}")
        assert f"--model: {model} cannot be loaded" in message
        assert out.read_bytes() == b"old"
    assert "cannot be loaded" in programs.fails("evaluate", f"--model={model}")
    message = programs.fails("evaluate", f"--model={litert}")
    assert "is not a valid .tflite file, or it is damaged" in message
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["old.keras", "old.tflite"]


def test_models_of_the_wrong_kind(programs, refused, config, finished, tmp_path):
    model, litert = finished.path / "model.keras", finished.path / "model.tflite"
    for name in ("compact", "export"):
        suffix = {"compact": "keras", "export": "tflite"}[name]
        out = f"--out={tmp_path / 'a'}.{suffix}"
        assert "must be a .keras file" in programs.fails(name, f"--model={litert}", out)
        assert "there is no file nowhere.keras" in programs.fails(
            name, "--model=nowhere.keras", out
        )
        wrong = programs.fails(name, f"--model={model}", f"--out={tmp_path / 'a.h5'}")
        assert f"--out must end in .{suffix}" in wrong
        far = programs.fails(name, f"--model={model}", f"--out={tmp_path / 'no' / 'a'}.{suffix}")
        assert f"there is no folder {tmp_path / 'no'}" in far
    assert "must be a .keras or .tflite file" in programs.fails("evaluate", "--model=a.onnx")
    assert "there is no file a.tflite" in programs.fails("evaluate", "--model=a.tflite")
    message = refused(f"--config={config}", f"--init_from={litert}")
    assert "--init_from must be a .keras or .weights.h5 file" in message
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model(refused, finished, config):
    message = refused(
        f"--config={config}",
        "--config.model_args.units=[24, 16]",
        f"--init_from={finished.path / 'model.keras'}",
    )
    assert "cannot be loaded into the model 'lenet_300_100'" in message


def test_a_model_that_does_not_fit_the_data(programs, finished, tmp_path):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(7)]
    )
    model.save(tmp_path / "seven.keras")
    message = programs.fails("evaluate", f"--model={tmp_path / 'seven.keras'}")
    assert "gives outputs of shape (896, 7); expected (896, 10), a score for each class" in message
    folder = f"--data_dir={programs.environment['TFDS_DATA_DIR']}"
    message = programs.fails(
        "evaluate", f"--model={finished.path / 'model.tflite'}", "--image_size=9,9", folder
    )
    assert "received (896, 9, 9, 1)" in message
    message = programs.fails("evaluate", f"--model={tmp_path / 'seven.keras'}", "--image_size=9")
    assert "--image_size must be height,width" in message


def test_the_compact_model_does_not_replace_the_trained_one(programs, finished, tmp_path):
    model = tmp_path / "model.keras"
    shutil.copy(finished.path / "model.keras", model)
    before = model.read_bytes()
    message = programs.fails(
        "compact", f"--model={model}", f"--out={tmp_path}/../{tmp_path.name}/model.keras"
    )
    assert "--out names the trained model itself" in message
    assert model.read_bytes() == before


def test_reports_that_are_none(programs, finished, tmp_path):
    assert "no run is there" in programs.fails("report", f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "was not finished" in programs.fails("report", f"--workdir={tmp_path}")
    report = tmp_path / "report.json"
    for text, expected in (
        ("{", "damaged"),
        ("[]", "expected an object, received a list"),
        ('{"name": 1}', "its part name is damaged: expected a text, received 1"),
        ('{"name": "a"}', "lacks 'dense'"),
    ):
        report.write_text(text)
        message = programs.fails("report", f"--workdir={finished.path}", f"--compare={tmp_path}")
        assert str(report) in message
        assert expected in message


# The folder of a run


def test_a_finished_run_is_left_alone(refused, config, finished, contents):
    before = contents(finished.path)
    message = refused(f"--config={config}", workdir=finished.path)
    assert f"{finished.path} holds a finished run. Choose another --workdir" in message
    assert "--overwrite" in message
    assert contents(finished.path) == before


def test_what_cannot_work_does_not_overwrite(refused, config, finished, tmp_path, contents):
    path = tmp_path / "copy"
    shutil.copytree(finished.path, path)
    before = contents(path)
    for override in ("rules.low_rank.rank=17", "optimizer.name=adma", "model=lenet", "epochs=0"):
        arguments = (f"--config={config}", f"--config.{override}", "--overwrite")
        refused(*arguments, workdir=path)
        assert contents(path) == before


def test_an_interrupted_run_of_another_configuration(refused, config, finished, tmp_path, contents):
    path = tmp_path / "copy"
    shutil.copytree(finished.path, path)
    (path / "report.json").unlink()
    before = contents(path)
    arguments = ("--config.rules.low_rank.every=6", "--config.seed=1")
    message = refused(f"--config={config}", *arguments, workdir=path)
    assert "an interrupted run of another configuration" in message
    assert "differs in config.seed, config.rules.low_rank.every." in message
    assert contents(path) == before
    (path / "config.json").write_text("{")
    assert "config.json is damaged" in refused(f"--config={config}", workdir=path)


def test_another_order_of_rules_is_another_configuration(refused, config, write_config, tmp_path):
    skip = "ConfigDict({'where': 'dense1', 'action': 'Skip'})"
    low_rank = "ConfigDict({'every': 5, 'compressor': 'LowRank', 'rank': 4})"
    new = "config.rules = ConfigDict(sort_keys=False)"
    one = write_config(f"{new}\nconfig.rules.b = {skip}\nconfig.rules.a = {low_rank}")
    path = tmp_path / "other"
    path.mkdir()
    rules = {"a": {"every": 5, "compressor": "LowRank", "rank": 4}}
    rules["b"] = {"where": "dense1", "action": "Skip"}
    settings = {"model": "lenet_300_100", "model_args": {"units": [32, 16]}, "rules": rules}
    settings |= {"epochs": 3, "batch_size": 64}
    from keras_compaware.cli.config import resolve

    (path / "config.json").write_text(json.dumps(resolve(settings)))
    message = refused(f"--config={one}", workdir=path)
    assert "which differs in the order of config.rules." in message


def test_files_that_are_of_no_run(refused, config, tmp_path, contents):
    path = tmp_path / "mine"
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints/epoch-00001.h5").write_text("mine")
    (path / "model.keras").write_text("mine")
    before = contents(path)
    for arguments in ((), ("--overwrite",)):
        message = refused(f"--config={config}", *arguments, workdir=path)
        assert "holds model.keras, checkpoints, but no config.json" in message
        assert contents(path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_written_to(refused, config, tmp_path, overwrite):
    (tmp_path / "file").write_text("a file")
    arguments = (f"--config={config}", *(["--overwrite"] if overwrite else []))
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        message = refused(*arguments, workdir=path)
        assert f"--workdir {path} cannot be written to: " in message
        assert "Choose a folder in which you may write." in message
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder(refused, config, tmp_path):
    path = tmp_path / "read_only"
    path.mkdir(mode=0o500)
    assert "cannot be written to: Permission denied" in refused(f"--config={config}", workdir=path)


def test_a_folder_in_use(refused, config, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "busy"
    path.mkdir()
    with open(path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = refused(f"--config={config}", workdir=path)
    assert f"another process is working in {path}" in message


# A full disk


@contextlib.contextmanager
def largest_file(size):
    """Makes writing beyond `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_a_model_is_written(programs, finished, tmp_path):
    model = finished.path / "model.keras"
    for name, suffix, size in (("compact", "keras", 20_000), ("export", "tflite", 4_000)):
        out = tmp_path / f"old.{suffix}"
        out.write_bytes(b"old")
        with largest_file(size):
            message = programs.fails(name, f"--model={model}", f"--out={out}")
        assert message == f"{out} cannot be written: {os.strerror(errno.EFBIG)}\n"
        assert out.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_while_a_checkpoint_is_written(programs, config, finished, tmp_path, contents):
    path = tmp_path / "run"
    with largest_file(20_000):
        message = programs.fails("train", f"--config={config}", f"--workdir={path}")
    assert f"{path / 'checkpoints/epoch-00001.keras'} cannot be written" in message
    # TensorBoard's writer writes when it is collected.
    left = {name for name in contents(path) if not name.startswith("tensorboard/")}
    assert left - {"plan.txt"} == {"config.json"}
    # and with room again it goes on
    programs.succeeds("train", f"--config={config}", f"--workdir={path}")
    assert (path / "report.json").exists()


def test_a_full_disk_while_a_model_is_replaced(programs, config, finished, tmp_path, monkeypatch):
    """Training is done and its checkpoint lies there; writing model.keras fails, then succeeds."""
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    for name in ("report.json", "compact.keras", "model.tflite"):
        (path / name).unlink()
    (path / "model.keras").write_bytes(b"old")
    with largest_file(20_000):
        message = programs.fails("train", f"--config={config}", f"--workdir={path}")
    assert f"{path / 'model.keras'} cannot be written" in message
    assert (path / "model.keras").read_bytes() == b"old"
    assert not list(path.rglob(".tmp-*"))
    programs.succeeds("train", f"--config={config}", f"--workdir={path}")
    report = json.loads((path / "report.json").read_text())
    for key in ("accuracy", "parameters", "litert_bytes"):
        assert report["compact"][key] == finished.report["compact"][key]
    assert np.all(
        [pathlib.Path(path / name).exists() for name in ("compact.keras", "model.tflite")]
    )
