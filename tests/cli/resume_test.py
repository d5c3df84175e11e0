"""A run that is killed and started again ends as if it had never been interrupted."""

import csv
import json

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware.cli import experiment

on_tensorflow = pytest.mark.tensorflow  # what exports, or compares with a run that does

KILLED = """
import keras
from keras_compaware.cli import experiment

class Killer(keras.callbacks.Callback):
    epoch = -1

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == ({epoch}, {batch}) and "{folder}" in self.folder:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)

def killer(workdir):
    callback = Killer()
    callback.folder = str(workdir.path)
    return [callback]

experiment._tensorboard = killer
"""


def weights(path):
    return keras.models.load_model(path).get_weights()


def untimed(rows):
    return [{k: v for k, v in row.items() if k != "compression_seconds"} for row in rows]


def assert_same_result(path, finished):
    """The same weights, bit by bit, history and firings."""
    for file in ("model.keras", "compact.keras"):
        for one, other in zip(weights(path / file), weights(finished.path / file), strict=True):
            np.testing.assert_array_equal(one, other)
    rows = list(csv.DictReader((path / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    others = list(csv.DictReader((finished.path / "history.csv").read_text().splitlines()))
    assert untimed(rows) == untimed(others)
    report = json.loads((path / "report.json").read_text())
    for key in ("accuracy", "parameters", "encoded_bytes"):
        assert report["compact"][key] == finished.report["compact"][key]
    history = [one["compact"]["history"] for one in (report, finished.report)]
    assert untimed(history[0]) == untimed(history[1])
    for one, other in zip(
        report["compact"]["firings"], finished.report["compact"]["firings"], strict=True
    ):
        assert (one["step"], one["final"]) == (other["step"], other["final"])
        assert one["distortion"] == other["distortion"]


@on_tensorflow
def test_a_run_that_is_killed_in_the_middle_of_an_epoch(programs, config, finished, tmp_path):
    path = tmp_path / "run"
    code = KILLED.format(epoch=1, batch=6, folder=path)
    arguments = (f"--config={config}", f"--workdir={path}")
    outcome = programs.process("train", *arguments, code=code)
    assert outcome.status == -9, str(outcome)
    names = sorted(file.name for file in (path / "checkpoints").iterdir())
    assert names == ["epoch-00001.json", "epoch-00001.keras"]
    assert not (path / "model.keras").exists()

    (path / ".tmp-0123abcd-model.keras").write_bytes(b"what a killed process leaves")
    out = programs.succeeds("train", *arguments)
    assert "resuming after epoch 1 of 3" in out
    assert "Epoch 1/3" not in out
    assert "Epoch 2/3" in out
    assert not list(path.rglob(".tmp-*"))
    assert_same_result(path, finished)
    assert json.loads((path / "report.json").read_text())["compact"]["seconds"] > 0


@on_tensorflow
@pytest.mark.parametrize("moment", ["compact", "export", "report"])
def test_a_run_that_ends_after_the_last_epoch(
    programs, config, finished, tmp_path, monkeypatch, moment
):
    path = tmp_path / "run"
    arguments = (f"--config={config}", f"--workdir={path}")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "compact":
            patch.setattr(experiment, "compact", stop)
        elif moment == "export":
            patch.setattr(experiment.export, "to_litert", stop)
        else:
            patch.setattr(experiment.export, "latency", stop)
        outcome = programs("train", *arguments)
    assert outcome.status == 130, str(outcome)
    assert "interrupted" in outcome.err
    assert not (path / "report.json").exists()

    out = programs.succeeds("train", *arguments)
    assert "resuming after epoch 3 of 3" in out
    assert "Epoch " not in out
    assert_same_result(path, finished)


@pytest.mark.parametrize("every", [1, pytest.param(4, marks=pytest.mark.slow)])  # by the callback
def test_all_state_goes_on_where_it_was(programs, write_config, tmp_path, monkeypatch, every):
    """What a checkpoint restores: random layers, momentum, proximal maps, masks, fits, ranks."""
    file = write_config(
        """
        config.model = "small_cnn"
        config.model_args = {"filters": [4, 4], "units": 16, "dropout": 0.3}
        config.optimizer = {"name": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4}
        config.rules = ConfigDict(sort_keys=False)
        config.rules.shrink = ConfigDict({
            "where": "dense1", "action": "Proximal", "every": EVERY,
            "regularizer": "GroupLasso", "strength": 1e-3,
        })
        config.rules.prune = ConfigDict({
            "where": "conv2", "every": 4, "compressor": "MagnitudePruning", "sparsity": 0.5,
            "hold": True, "end": "2 epochs", "ramp": {"initial": 0.1},
        })
        config.rules.cluster = ConfigDict({"where": "head", "every": 4,
            "compressor": "WeightClustering", "num_clusters": 4})
        config.rules.low_rank = ConfigDict({"where": "conv1", "every": 4, "compressor": "LowRank",
            "energy": 0.9})
        """.replace("EVERY", str(every))
    )
    monkeypatch.setattr(experiment.Experiment, "dense_twin", lambda self: None)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "compact", stop)  # the trained model is all that counts here
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outcome = programs("train", f"--config={file}", f"--workdir={whole}")
    assert outcome.status == 130, str(outcome)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if (self.epoch, batch) == (1, 6):
                raise KeyboardInterrupt

    arguments = ("train", f"--config={file}", f"--workdir={broken}")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_tensorboard", lambda workdir: [Interrupt()])
        assert programs(*arguments).status == 130
    assert not (broken / "model.keras").exists()
    outcome = programs(*arguments)
    assert outcome.status == 130, str(outcome)
    assert "resuming after epoch 1 of 3" in outcome.out
    for one, other in zip(
        weights(whole / "model.keras"), weights(broken / "model.keras"), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@on_tensorflow
def test_a_damaged_checkpoint(programs, config, finished, tmp_path):
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text((finished.path / "config.json").read_text())
    (path / "checkpoints/epoch-00002.json").write_text("{}")
    (path / "checkpoints/epoch-00002.keras").write_bytes(b"no weights")
    message = programs.fails("train", f"--config={config}", f"--workdir={path}")
    assert f"the checkpoint {path / 'checkpoints/epoch-00002.json'} cannot be restored" in message
    assert "Run again with --overwrite." in message


@on_tensorflow
def test_overwriting_a_finished_run(programs, config, finished, tmp_path):
    path = tmp_path / "run"
    arguments = (f"--config={config}", f"--workdir={path}")
    programs.succeeds("train", *arguments)
    (path / "notes.txt").write_text("mine")
    out = programs.succeeds("train", *arguments, "--config.epochs=1", "--overwrite")
    assert "resuming" not in out
    rows = list(csv.DictReader((path / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1"]
    assert (path / "notes.txt").read_text() == "mine"
