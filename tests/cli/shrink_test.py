"""The program `train` with channels that are removed: in training, and in cycles after it."""

import json
import shutil

import keras
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

pytestmark = pytest.mark.tensorflow

ONLY_SHRINK = """
    del config.rules["low_rank"]
    config.shrink = ConfigDict({"budget": {"macs": (0.5, 0.25)}, "epochs": 1, "round_to": 4})
"""
CHANNELS = """
    del config.rules["low_rank"]
    config.channels = ConfigDict(sort_keys=False)
    config.channels.half = {"every": 5, "compressor": "GroupPruning", "sparsity": 0.5}
"""


def run(programs, write_config, code, name, *flags):
    path = programs.folder / name
    arguments = (f"--config={write_config(code)}", f"--workdir={path}", *flags)
    out = programs.succeeds("train", *arguments)
    return path, arguments, out, json.loads((path / "report.json").read_text())


def test_cycles_of_cutting_and_training(programs, write_config):
    path, arguments, out, report = run(programs, write_config, ONLY_SHRINK, "cycles")
    rows = report["compact"]["shrink"]
    assert [row["what"] for row in rows] == [
        "trained",
        "cut to 50 % of the MACs",
        "trained further for 1 epoch",
        "cut to 25 % of the MACs",
        "trained further for 1 epoch",
    ]
    whole = rows[0]["macs"]
    assert rows[0]["keras_accuracy"] == report["dense"]["keras_accuracy"]  # the twin's training
    assert whole == report["dense"]["macs"]
    assert 0.3 * whole < rows[1]["macs"] == rows[2]["macs"] <= 0.5 * whole
    assert 0.1 * whole < rows[3]["macs"] == rows[4]["macs"] <= 0.25 * whole
    assert report["compact"]["macs"] == rows[4]["macs"]
    assert report["compact"]["keras_accuracy"] == rows[4]["keras_accuracy"]
    small = keras.models.load_model(path / "compact.keras")
    assert all(layer.units % 4 == 0 for layer in small.layers if layer.name in ("dense1", "dense2"))
    assert "channels removed: Keras on the test split" in out
    assert "channels removed" in programs.succeeds("report", f"--workdir={path}")

    # Interrupted in the second cycle, before its end: the first one is not trained again.
    before = small.get_weights()
    (path / "report.json").unlink()
    first = (path / "cycle-1" / "checkpoints" / "epoch-00001.keras").stat().st_mtime_ns
    shutil.rmtree(path / "cycle-2")
    programs.succeeds("train", *arguments)
    assert (path / "cycle-1" / "checkpoints" / "epoch-00001.keras").stat().st_mtime_ns == first
    after = keras.models.load_model(path / "compact.keras").get_weights()
    assert all((a == b).all() for a, b in zip(before, after, strict=True))

    programs.succeeds("train", *arguments, "--overwrite", "--config.shrink.budget={'macs': 0.5}")
    assert not (path / "cycle-2").exists()


def test_channels_removed_in_training(programs, write_config):
    path, _, out, report = run(programs, write_config, CHANNELS, "channels")
    assert report["compact"]["channels"] == [
        {"name": "dense1", "before": 32, "after": 16},
        {"name": "dense2", "before": 16, "after": 8},
    ]
    assert "channels that nothing reads are removed" in out
    assert report["compact"]["parameters"] == 64 * 16 + 16 + 16 * 8 + 8 + 8 * 10 + 10
    assert report["compact"]["agreement"] == 1.0
    assert report["compact"]["encoded_bytes"] < 0.5 * report["dense"]["encoded_bytes"]
    assert "dead_channels" in report["compact"]["history"][-1]
    small = keras.models.load_model(path / "compact.keras")
    assert small.get_layer("dense1").units == 16


def test_what_cannot_be_combined(programs, write_config):
    code = 'config.shrink = ConfigDict({"budget": {"macs": 0.5}})'
    path = programs.folder / "refused"
    message = programs.fails("train", f"--config={write_config(code)}", f"--workdir={path}")
    assert "would not stay compressed: dense1/kernel, dense2/kernel" in message
    code = ONLY_SHRINK.replace("(0.5, 0.25)", "0.0001")
    message = programs.fails("train", f"--config={write_config(code)}", f"--workdir={path}")
    assert message.startswith("config.shrink: ")
    assert not path.exists()
