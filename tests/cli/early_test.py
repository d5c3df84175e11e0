"""Compaction part-way through training: what it leaves, what it refuses, how it is resumed."""

import csv
import json

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import models
from keras_compaware.base import AtEnd, Every
from keras_compaware.cli import experiment
from keras_compaware.cli.config import (
    DEFAULTS,
    ScheduleFrom,
    dense_config,
    optimizer_of,
    resolve,
)
from keras_compaware.cli.early import check, epoch_of
from keras_compaware.cli.program import UserError
from keras_compaware.compressors import LowRank, MagnitudePruning, Tucker2, UniformQuantization
from keras_compaware.recipe import Recipe
from keras_compaware.rules import Rule

on_tensorflow = pytest.mark.tensorflow  # what exports

EARLY = """
config.epochs = 4
config.compact_at_epoch = 2
config.optimizer = {"name": "adam", "learning_rate": 0.003, "schedule": "cosine"}
"""
STEPS = 13  # of an epoch


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


# The key


def test_the_key():
    assert epoch_of(resolve({})) is None
    assert epoch_of(resolve({"epochs": 4, "compact_at_epoch": 3})) == 3
    twin = dense_config(resolve({"epochs": 4, "compact_at_epoch": 3}))
    assert twin == resolve({"epochs": 4})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"compact_at_epoch": 0}, "must be an integer from 1 to 9, so that"),
        ({"compact_at_epoch": -1}, "Received: -1"),
        ({"compact_at_epoch": 10}, "compaction follows training. Received: 10"),
        ({"compact_at_epoch": True}, "Received: True"),
        ({"compact_at_epoch": 2.5}, "Received: 2.5"),
        ({"compact_at_epoch": "3 epochs"}, "Received: '3 epochs'"),
        ({"compact_at_epoch": 1, "epochs": 1}, "an integer below config.epochs, which is 1"),
        ({"compact_at_epoch": 2, "shrink": {"budget": {"macs": 0.5}}}, "Leave one of them out."),
    ],
)
def test_wrong_values_are_refused(config, expected):
    message = refusal(epoch_of, resolve(config))
    assert message.startswith("config.compact_at_epoch ")
    assert expected in message


@pytest.mark.parametrize(
    ("actions", "lost"),
    [
        ([Every(5, LowRank(rank=4))], False),
        ([AtEnd(LowRank(energy=0.9))], False),
        ([Every(5, LowRank(rank=8)), AtEnd(LowRank(energy=0.9))], False),
        ([Every(5, LowRank(rank=4, tile=16))], True),
        ([Every(5, MagnitudePruning(0.5))], True),
        ([Every(5, LowRank(rank=4)), AtEnd(UniformQuantization(8))], True),
    ],
)
def test_what_would_be_lost_is_refused(actions, lost):
    model = models.build("lenet_300_100", (8, 8, 1), 10, units=(32, 16))
    recipe = Recipe([Rule("dense1", *actions)])
    if not lost:
        check(model, recipe)
        return
    message = refusal(check, model, recipe)
    assert "these kernels would not stay compressed: dense1/kernel. Low rank stays" in message


def test_tucker_stays():
    model = models.build("small_cnn", (8, 8, 1), 10)
    check(model, Recipe([Rule("conv2", Every(5, Tucker2(ratio=0.3)))]))


@on_tensorflow
def test_nothing_is_written_when_it_is_refused(programs, config, write_config, tmp_path):
    path = tmp_path / "run"
    arguments = (f"--workdir={path}", "--config.compact_at_epoch=1")
    message = programs.fails(
        "train", f"--config={config}", "--config.compact_at_epoch=3", arguments[0]
    )
    assert "from 1 to 2, so that" in message
    quantized = 'config.rules.low_rank.at_end = {"compressor": "UniformQuantization", "bits": 8}'
    message = programs.fails("train", f"--config={write_config(quantized)}", *arguments)
    assert "would not stay compressed: dense1/kernel, dense2/kernel" in message
    message = programs.fails("train", f"--config={write_config('config.rules = {}')}", *arguments)
    assert "the configuration has no rules" in message
    assert not path.exists()


# The learning rate


@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
def test_the_schedule_goes_on_in_an_optimizer_that_begins_anew(schedule):
    config = {"optimizer": {**DEFAULTS["optimizer"], "learning_rate": 0.5, "schedule": schedule}}
    whole, rest = optimizer_of(config, 20), optimizer_of(config, 20, first_step=8)
    for step in range(12):
        whole.iterations.assign(8 + step)
        rest.iterations.assign(step)
        assert float(rest.learning_rate) == float(whole.learning_rate)


def test_a_schedule_from_a_step_on_is_saved():
    cosine = keras.optimizers.schedules.CosineDecay(0.5, 20)
    saved = keras.saving.serialize_keras_object(ScheduleFrom(cosine, 8))
    restored = keras.saving.deserialize_keras_object(json.loads(json.dumps(saved)))
    assert float(restored(2)) == float(cosine(10)) != float(cosine(2))


# A run


@pytest.fixture(scope="module")
def early(programs, write_config):
    """The folder of a finished run, what was printed, its report; nothing must be changed."""
    path = programs.folder / "early"
    out = programs.succeeds("train", f"--config={write_config(EARLY)}", f"--workdir={path}")
    return path, out, json.loads((path / "report.json").read_text())


@on_tensorflow
def test_the_smaller_network_is_trained_to_the_end(programs, early):
    path, out, report = early
    small = report["compact"]
    assert small["early"]["epoch"] == 2
    assert small["early"]["macs"] == small["macs"] == 4 * (64 + 32) + 4 * (32 + 16) + 16 * 10
    assert small["early"]["parameters"] == small["parameters"] == small["macs"] + 32 + 16 + 10
    assert [(row["name"], row["note"]) for row in small["early"]["layers"][:2]] == [
        ("dense1", "rank 4 of 32"),
        ("dense2", "rank 4 of 16"),
    ]
    assert small["early"]["channels"] == []
    seconds = small["early"]["seconds_per_epoch"]
    assert 0 < seconds["before"] < small["seconds"] > seconds["after"] > 0
    # The rules end with the second epoch.
    assert [firing["step"] for firing in small["firings"]] == [5, 10, 15, 20, 25, 26]
    assert [firing["final"] for firing in small["firings"]] == [False] * 5 + [True]
    assert {key for row in small["history"][2:] for key in row}.isdisjoint({"rank", "sparsity"})
    before, after = (weights(path / name) for name in ("early.keras", "model.keras"))
    assert [w.shape for w in before] == [w.shape for w in after]
    assert not any(map(np.array_equal, before, after))
    line = "compacted after epoch 2 of 4: 794 of 2,778 parameters, "
    assert line in out
    assert line in programs.succeeds("report", f"--workdir={path}")


@on_tensorflow
def test_history_and_learning_rate_are_those_of_one_training(early):
    path, _, report = early
    history, twin = report["compact"]["history"], report["dense"]["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in history] == [row["learning_rate"] for row in twin]
    rows = list(csv.DictReader((path / "history.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    optimizer = keras.models.load_model(path / "model.keras").optimizer
    schedule = optimizer.get_config()["learning_rate"]
    assert schedule["class_name"] == "CosineDecay"
    assert schedule["config"]["decay_steps"] == int(optimizer.iterations) == 4 * STEPS


# Runs that end with the trained model: without the dense twin, export and measurements


@pytest.fixture(scope="module")
def trained(programs):
    """Returns a function: (file, folder, what is patched, flags) -> what was printed."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def run(file, path, *patches, flags=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment.Experiment, "dense_twin", lambda self: None)
            patch.setattr(experiment.Experiment, "measure", stop)
            for name, value in patches:
                patch.setattr(experiment, name, value or stop)
            outcome = programs("train", f"--config={file}", f"--workdir={path}", *flags)
        assert outcome.status == 130, str(outcome)
        return outcome.out

    return run


def weights(path):
    return keras.models.load_model(path).get_weights()


def test_channels_are_removed_early(trained, write_config, tmp_path):
    file = write_config(
        """
        config.epochs, config.compact_at_epoch = 2, 1
        config.rules = {}
        config.channels = ConfigDict({"half": {"every": 5, "compressor": "GroupPruning",
            "sparsity": 0.5}})
        """
    )
    trained(file, tmp_path / "run")
    for name in ("early.keras", "model.keras", "compact.keras"):
        shapes = [w.shape for w in weights(tmp_path / "run" / name)]
        assert shapes == [(64, 16), (16,), (16, 8), (8,), (8, 10), (10,)]


def test_nothing_got_smaller_and_overwriting(trained, write_config, tmp_path):
    file = write_config(
        """
        config.epochs, config.compact_at_epoch = 2, 1
        config.optimizer = {"schedule": "constant"}
        config.rules = {"weak": {"action": "Proximal", "regularizer": "L1", "strength": 1e-9}}
        """
    )
    path = tmp_path / "run"
    out = trained(file, path)
    assert "nothing got smaller by then, so the network is trained further as it is" in out
    assert weights(path / "model.keras")[0].shape == (64, 32)
    assert {"early.keras", "early-checkpoints"} < {file.name for file in path.iterdir()}
    rows = list(csv.DictReader((path / "history.csv").read_text().splitlines()))
    assert [(row["epoch"], float(row["learning_rate"])) for row in rows] == [
        *(("1", pytest.approx(1e-3)), ("2", pytest.approx(1e-3)))
    ]

    flags = ("--config.compact_at_epoch=None", "--overwrite")
    assert "nothing got smaller" not in trained(file, path, flags=flags)
    assert not {"early.keras", "early-checkpoints"} & {file.name for file in path.iterdir()}


class Interrupt(keras.callbacks.Callback):
    """Ends the process, as it were, in the middle of an epoch (0, 1, ...)."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (self.at, 6):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again(trained, write_config, tmp_path):
    """Before, at and after the compaction: dropout, moments, batch statistics, history."""
    file = write_config(
        """
        config.epochs, config.compact_at_epoch = 4, 2
        config.model = "small_cnn"
        config.model_args = {"filters": [8], "units": 16, "dropout": 0.3}
        config.rules.low_rank.update({"where": "dense1", "rank": 2})
        """
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(file, whole)
    for patch, resumes in (
        (("_tensorboard", lambda workdir: [Interrupt(1)]), []),
        (("compact", None), ["1 of 2"]),
        (("_tensorboard", lambda workdir: [Interrupt(3)]), ["2 of 2"]),
        (("save_model", experiment.save_model), ["2 of 2", "3 of 4"]),
    ):
        assert not (broken / "model.keras").exists()
        lines = trained(file, broken, patch).splitlines()
        found = [line for line in lines if line.startswith("resuming after epoch ")]
        assert found == [f"resuming after epoch {which}" for which in resumes]

    for name in ("early.keras", "model.keras", "compact.keras"):
        one, other = (keras.models.load_model(path / name) for path in (whole, broken))
        variables = [[*m.weights, *m.optimizer.variables] for m in (one, other)]
        for a, b in zip(*variables, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
        assert int(one.optimizer.iterations) == (4 * STEPS if name == "model.keras" else 0)
    one, other = (
        list(csv.DictReader((path / "history.csv").read_text().splitlines()))
        for path in (whole, broken)
    )
    assert [row["epoch"] for row in one] == ["1", "2", "3", "4"]
    for row in (*one, *other):
        del row["compression_seconds"]
    assert one == other
