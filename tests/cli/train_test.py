"""The program `train`, end to end on the digits."""

import csv
import gzip
import json

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import data, export, measure
from keras_compaware.cli import experiment

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def test_split(programs, finished):
    cache = programs.environment["KERAS_COMPAWARE_CACHE"]
    return data.load("digits", data_dir=programs.environment["TFDS_DATA_DIR"], cache_dir=cache).test


def litert_accuracy(path, split):
    scores = export.predict(path, split.images * np.float32(1 / 255))
    return np.mean(np.argmax(scores, axis=-1) == split.labels)


def keras_accuracy(model, split):
    scores = model.predict(data.batches(split, 128), verbose=0)
    return np.mean(np.argmax(scores, axis=-1) == split.labels)


def twin_of(run):
    line = next(line for line in run.out.splitlines() if line.startswith("dense twin: training"))
    return line.rsplit(", ", 1)[1]


def test_the_files_of_a_run(finished):
    names = {path.name for path in finished.path.iterdir()} - {".lock", "tensorboard"}
    assert names == {
        "checkpoints",
        "codes.safetensors",
        "compact.keras",
        "config.json",
        "history.csv",
        "model.keras",
        "model.tflite",
        "plan.txt",
        "report.json",
    }
    checkpoints = sorted(path.name for path in (finished.path / "checkpoints").iterdir())
    assert checkpoints == ["epoch-00003.json", "epoch-00003.keras"]


def test_config_json_is_the_whole_configuration(finished):
    config = json.loads((finished.path / "config.json").read_text())
    assert config == finished.report["config"]
    assert config["epochs"] == 3
    assert config["optimizer"]["name"] == "adam"  # which the file leaves out
    assert config["data"] == {
        "name": "digits",
        "validation": 0.1,
        "image_size": None,
        "augment": "",
    }


def test_the_plan(finished):
    lines = (finished.path / "plan.txt").read_text().splitlines()
    assert lines[2].split() == [
        *("dense1/kernel", "Dense", "64x32", "Every(every=5,", "constraint=LowRank(rank=4))")
    ]
    assert [row["name"] for row in finished.report["plan"]] == [
        *("dense1/kernel", "dense2/kernel", "head/kernel")
    ]
    assert finished.report["plan"][2]["actions"] == []


def test_the_history(finished):
    rows = list(csv.DictReader((finished.path / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, entry in zip(rows, finished.report["compact"]["history"], strict=True):
        assert {key: float(value) for key, value in row.items()} == entry
        assert set(row) == {
            *("epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate"),
            *("sparsity", "rank", "distortion", "compression_seconds"),
        }


def test_firings_are_every_fifth_step_and_the_end(finished):
    firings = finished.report["compact"]["firings"]
    # 3 epochs of 13 batches: the end is after step 39
    assert [firing["step"] for firing in firings] == [5, 10, 15, 20, 25, 30, 35, 39]
    assert [firing["final"] for firing in firings] == [False] * 7 + [True]
    assert set(firings[0]["distortion"]) == {"dense1/kernel", "dense2/kernel"}


@pytest.mark.parametrize("which", ["dense", "compact"])
def test_the_report_says_what_the_files_are(finished, test_split, which):
    row = finished.report[which]
    if which == "compact":
        model, litert = finished.path / "compact.keras", finished.path / "model.tflite"
    else:
        model, litert = (f"{twin_of(finished)}/model.{kind}" for kind in ("keras", "tflite"))
    model = keras.models.load_model(model)
    with open(litert, "rb") as file:
        content = file.read()
    assert row["parameters"] == measure.parameters(model) == model.count_params()
    assert row["macs"] == measure.macs(model)
    assert row["litert_bytes"] == len(content)
    assert row["gzip_bytes"] == pytest.approx(len(gzip.compress(content, 9)), abs=40)
    assert row["accuracy"] == litert_accuracy(litert, test_split)
    assert row["keras_accuracy"] == keras_accuracy(model, test_split)
    assert row["agreement"] > 0.99
    assert row["latency_ms"] > 0
    assert row["seconds"] > 0


def test_the_numbers_of_this_network(finished):
    dense, compact = finished.report["dense"], finished.report["compact"]
    # 64-32-16-10 with biases, then dense1 and dense2 as two factors of rank 4
    assert dense["parameters"] == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert dense["macs"] == 64 * 32 + 32 * 16 + 16 * 10
    assert compact["macs"] == 4 * (64 + 32) + 4 * (32 + 16) + 16 * 10
    assert compact["parameters"] == compact["macs"] + 32 + 16 + 10
    # Four bytes of each and a header of less than 2 KB.
    for row in (compact, dense):
        assert 0 < row["encoded_bytes"] - 4 * row["parameters"] < 2048
    assert finished.report["steps_per_epoch"] == 13
    assert [(row["name"], row["after"]) for row in compact["layers"]] == [
        ("dense1", 4 * (64 + 32) + 32),
        ("dense2", 4 * (32 + 16) + 16),
        ("head", 170),
    ]


def test_the_trained_model_is_compressed_and_goes_on_training(finished, test_split):
    model = keras.models.load_model(finished.path / "model.keras")
    for name in ("dense1", "dense2"):
        kernel = keras.ops.convert_to_numpy(model.get_layer(name).kernel)
        assert np.linalg.matrix_rank(kernel, tol=1e-4 * np.linalg.norm(kernel, 2)) == 4
    model.fit(data.batches(test_split, 64), shuffle=False, verbose=0)


def test_the_archive_holds_the_trained_weights(finished):
    path = finished.path / "codes.safetensors"
    model = keras.models.load_model(finished.path / "model.keras")
    expected = model.get_weights()
    model.set_weights([np.zeros_like(w) for w in expected])
    saved = export.load_codes(path, model)
    assert set(saved.codes) == {"dense1/kernel", "dense2/kernel"}
    for before, after in zip(expected, model.get_weights(), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert finished.report["compact"]["encoded_bytes"] == path.stat().st_size
    twin = f"{twin_of(finished)}/codes.safetensors"
    assert export.load_codes(twin).codes == {}
    assert finished.report["dense"]["encoded_bytes"] == measure.file_bytes(twin)


def test_what_is_printed(finished):
    assert "dense1/kernel  Dense  64x32" in finished.out
    table = finished.out.splitlines()[-4:]
    assert [line.split()[0] for line in table[1:]] == ["dense", "compact", "compact"]
    assert f"{100 * finished.report['compact']['accuracy']:.2f} %" in table[2]
    assert finished.report["command"].startswith("python -m apps.train --config=")


def test_compact_keras_needs_nothing_of_this_package(programs, finished):
    code = f"""
        import sys
        sys.modules["keras_compaware"] = None  # every import of it fails
        import keras, numpy as np
        model = keras.models.load_model({str(finished.path / "compact.keras")!r})
        print("parameters", model.count_params(), "compiled", model.compiled)
        model.fit(np.ones((4, 8, 8, 1)), np.zeros(4), verbose=0)
        raise SystemExit
    """
    outcome = programs.process("report", code=code)
    assert outcome.status == 0, str(outcome)
    expected = finished.report["compact"]["parameters"]
    assert f"parameters {expected} compiled True" in outcome.out


def test_the_dense_twin_is_trained_once(programs, finished, config, tmp_path, monkeypatch):
    """Which runs find the twin, and which train another one; nothing is trained here."""
    trained = []

    def train(self, workdir):
        trained.append(workdir.path)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Experiment, "train", train)

    def begins(number, *arguments, file=config):
        folder = tmp_path / str(number)
        outcome = programs("train", f"--config={file}", f"--workdir={folder}", *arguments)
        assert outcome.status == 130, str(outcome)
        return folder, outcome.out

    folder, out = begins(0)
    assert out.startswith(f"dense twin: found in {twin_of(finished)}")
    assert trained == [folder]
    folder, out = begins(1, "--config.rules.low_rank.every=7")
    assert "dense twin: found in" in out
    assert trained[1:] == [folder]
    others = [
        begins(2, "--config.seed=1"),
        begins(3, "--config.epochs=4"),
        begins(4, "--config.model=small_cnn", "--config.model_args={}"),
        begins(5, "--config.optimizer.learning_rate=0.01"),
        begins(6, f"--init_from={finished.path / 'model.keras'}"),
        begins(7, "--config.data.validation=0.2"),
    ]
    assert all("dense twin: training" in out for _, out in others)
    twins = trained[2:]
    assert len(set(twins)) == len(others)
    assert not set(twins) & {folder for folder, _ in others}
    assert twin_of(finished) not in map(str, twins)


@pytest.mark.parametrize(("lost", "seed"), [("litert", 7), ("codes", 8)])
def test_an_unfinished_twin_is_not_taken_for_a_finished_one(
    programs, config, tmp_path, monkeypatch, lost, seed
):
    """A twin's folder whose LiteRT file or archive was lost is trained again, not handed out."""
    overrides = ("--config.epochs=1", f"--config.seed={seed}")  # a twin that no other test has
    arguments = (f"--config={config}", *overrides, f"--workdir={tmp_path / 'run'}")
    twins = []
    measure_twin = experiment.Experiment.measure

    def stop_after_twin(self, model, small, workdir, compressors, codes):
        if compressors:
            raise KeyboardInterrupt
        twins.append(workdir)
        return measure_twin(self, model, small, workdir, compressors, codes)

    monkeypatch.setattr(experiment.Experiment, "measure", stop_after_twin)
    assert programs("train", *arguments).status == 130
    file = getattr(twins[0], lost)
    file.unlink()
    outcome = programs("train", *arguments)
    assert outcome.status == 130, str(outcome)
    assert "dense twin: training" in outcome.out
    assert len(twins) == 2
    assert file.exists()


# What a run starts from


@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_init_from(programs, finished, config, tmp_path, kind, monkeypatch):
    model = keras.models.load_model(finished.path / "model.keras")
    file = tmp_path / f"start.{kind}"
    model.save(file) if kind == "keras" else model.save_weights(file)
    started = []

    def train(self, workdir):
        started.append(self.build_model())
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Experiment, "train", train)
    run = programs(
        "train", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--init_from={file}"
    )
    assert run.status == 130, str(run)
    for before, after in zip(model.get_weights(), started[0].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert json.loads((tmp_path / "run/config.json").read_text())["init_from"] == str(file)


MODEL_MODULE = """
import keras

def tiny(input_shape, num_classes, width=8):
    return keras.Sequential([
        keras.Input(input_shape),
        keras.layers.Flatten(),
        keras.layers.Dense(width, "relu", name="hidden"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(num_classes, "softmax", name="head"),
    ], name="tiny")
"""


def test_a_function_as_model_with_every_kind_of_rule(programs, write_config, tmp_path, monkeypatch):
    """`where`, `ramp`, `at_end` and durations, from the file to the report."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_model_of_a_test.py").write_text(MODEL_MODULE)
    file = write_config(
        """
        config.model = "tiny_model_of_a_test:tiny"
        config.model_args = {"width": 24}
        config.rules = ConfigDict(sort_keys=False)
        config.rules.z_first = ConfigDict({
            "where": "hidden", "every": "50%", "compressor": "MagnitudePruning", "sparsity": 0.75,
            "ramp": {"initial": 0.5, "end": "2 epochs"},
            "at_end": {"compressor": "UniformQuantization", "bits": 8},
        })
        config.rules.a_second = ConfigDict({"where": "head", "action": "Skip", "reason": "small"})
        """
    )
    path = tmp_path / "run"
    arguments = ("--config.rules.z_first.every=1 epoch", "--config.epochs=2")
    programs.succeeds("train", f"--config={file}", f"--workdir={path}", *arguments)
    report = json.loads((path / "report.json").read_text())
    assert list(report["config"]["rules"]) == ["z_first", "a_second"]
    assert [firing["step"] for firing in report["compact"]["firings"]] == [13, 26, 26]
    assert report["plan"][0]["actions"] == [
        "Every(every=13, constraint=MagnitudePruning(sparsity=0.75), begin=0, end=None, "
        "ramp=Ramp(initial=0.5, begin=None, end=26, shape='polynomial', power=3.0), hold=False)",
        "AtEnd(compressor=UniformQuantization(bits=8, axis=None))",
    ]
    assert report["plan"][1]["reason"] == "small"
    kernel = keras.models.load_model(path / "model.keras").get_layer("hidden").kernel
    kernel = keras.ops.convert_to_numpy(kernel)
    assert np.count_nonzero(kernel) <= 64 * 24 // 4
    assert len(np.unique(np.abs(kernel))) <= 2**7 + 1
    assert report["compact"]["encoded_bytes"] < report["dense"]["encoded_bytes"] / 2


def test_a_file_as_model(programs, finished, config, tmp_path, monkeypatch):
    file = finished.path / "compact.keras"
    planned = []

    def twin(self):
        planned.append([row.name for row in self.recipe().plan(self.build_model()).rows])
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Experiment, "dense_twin", twin)
    outcome = programs(
        *("train", f"--config={config}", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.model={file}", "--config.model_args={}"),
        *("--config.rules.low_rank.where=dense1", "--config.rules.low_rank.rank=1"),
    )
    assert outcome.status == 130, str(outcome)
    assert any(name.startswith("dense1/") for name in planned[0])


@pytest.mark.slow
def test_training_on_jax(programs, config, tmp_path):
    pytest.importorskip("jax")
    outcome = programs.process(
        *("train", f"--config={config}", f"--workdir={tmp_path / 'run'}"), KERAS_BACKEND="jax"
    )
    assert outcome.status == 0, str(outcome)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["backend"] == "jax"
    assert [firing["step"] for firing in report["compact"]["firings"]][-2:] == [35, 39]
    assert report["compact"]["agreement"] > 0.99
    assert report["compact"]["parameters"] == 4 * (64 + 32) + 4 * (32 + 16) + 16 * 10 + 58
