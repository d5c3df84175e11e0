"""The benchmarks beside other tools: the arms of this package, the same network in PyTorch."""

import json
import pathlib

import keras
import numpy as np
import pytest

from benchmarks.side_by_side import network, ours, toolkit
from benchmarks.side_by_side import run as side_by_side
from benchmarks.torch_pruning import run as torch_pruning
from keras_compaware import data, measure, models

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def noise(monkeypatch):
    random = np.random.default_rng(0)
    split = data.Split(
        random.integers(0, 256, size=(300, 28, 28, 1), dtype="uint8"), np.arange(300) % 10
    )
    found = type("Noise", (), {"train": split, "test": split})()
    monkeypatch.setattr(network, "images", lambda data_dir: found)
    monkeypatch.setattr(network, "_WARM_UP", 1)
    return found


def run(monkeypatch, capsys, arm, folder, *flags):
    arguments = [f"--arm={arm}", "--seed=0", "--steps=4", f"--folder={folder}", *flags]
    monkeypatch.setattr("sys.argv", ["ours", *arguments])
    ours.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.tensorflow
def test_arms_go_from_the_same_weights_to_files(noise, monkeypatch, capsys, tmp_path):
    pytest.importorskip("ai_edge_litert")
    start = run(monkeypatch, capsys, "start", tmp_path)
    assert start["parameters"] == 207_066
    with np.load(tmp_path / "start.npz") as saved:
        assert saved["conv2/kernel"].shape == (3, 3, 16, 32)
    only_time = run(monkeypatch, capsys, "ranks", tmp_path, "--time")
    assert sorted(only_time) == ["memory", "seconds_per_step"]
    assert not list(tmp_path.glob("*.tflite"))
    found = {
        arm: run(monkeypatch, capsys, arm, tmp_path)
        for arm in ("dense", "ranks-after", "channels-half", "aware-int8")
    }
    assert found["ranks-after"]["parameters"] < 0.4 * start["parameters"]
    assert found["channels-half"]["macs"] <= 0.5 * start["macs"]
    names = {path.name for path in side_by_side.paths(tmp_path)}
    assert names == {
        f"ours-{arm}-{mode}.tflite"
        for arm, modes in [
            ("dense", ("float32", "int8")),
            ("ranks-after", ("float32", "int8")),
            ("channels-half", ("float32", "int8")),
            ("aware-int8", ("int8",)),
        ]
        for mode in modes
    }


def test_every_arm_has_a_name_and_a_place():
    order = side_by_side.runs()
    assert len(set(order)) == len(order)
    assert {arm for side, arm in order if side == "ours"} == {"start", *ours.ARMS, *ours.UNTRAINED}
    assert {arm for side, arm in order if side == "tfmot"} == set(toolkit.ARMS)
    for side, arm in order:
        assert arm in side_by_side.NAMES or arm == "start"
        assert side == "ours" or order.index((side, arm)) == order.index(("ours", arm)) + 1


def test_everyone_sees_the_same_batches(noise):
    images, labels = network.in_order(noise.train, 7, seed=3)
    again, same = network.in_order(noise.train, 7, seed=3)
    assert len(labels) == 7 * network.BATCH_SIZE
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)
    np.testing.assert_array_equal(np.bincount(labels[:300]), 30)  # a whole pass, then the next
    assert np.any(labels[:148] != labels[300:])


def test_tables_of_both_sides():
    entry = {"accuracy": 0.5, "parameters": 10, "memory": 2e6}
    results = {
        "arms": {f"{seed}/{side}/dense": entry for seed in "01" for side in ("ours", "tfmot")},
        "files": {"0": {"ours-dense-int8": {"bytes": 4000, "gzip_bytes": 3000, "accuracy": 0.25}}},
        "time": {
            "steps": {"ours/dense": [0.002, 0.004], "tfmot/dense": [0.001, 0.001]},
            "latencies": {"ours-dense-int8": [1.0], "ours-dense-float32": [2.0]},
        },
    }
    training, files = side_by_side.summary(results).split("\n\n")
    lines = training.splitlines()
    assert lines[2] == "| dense | 50.00 ± 0.00 | 10 | 3.0 | 1.00 | 2 |"
    assert lines[3] == "| tfmot: dense | 50.00 ± 0.00 | 10 | 1.0 | 1.00 | 2 |"
    assert lines[4] == "| 50 % zeros | not run | not run | not run | not run | not run |"
    assert files.splitlines()[2:] == ["| dense | int8 | 25.00 | 4 | 3 | 1.000 | 0.50 |"]


def test_the_same_network_in_pytorch():
    pytest.importorskip("torch")
    keras.utils.set_random_seed(1)
    model = models.build("resnet_20", (32, 32, 3), 10)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([np.random.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    images = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype("float32")
    network = torch_pruning.in_torch(model)
    scores = torch_pruning.in_batches(network)(images)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-5)
    assert torch_pruning.sizes_in_torch(network) == {
        "macs": measure.macs(model),
        "parameters": measure.parameters(model),
    }


@pytest.mark.parametrize("benchmark", [side_by_side, torch_pruning], ids=lambda m: m.__name__)
def test_readme_shows_the_results(benchmark):
    folder = pathlib.Path(benchmark.__file__).parent
    results = json.loads((folder / "results.json").read_text())
    assert benchmark.summary(results) in (folder / "README.md").read_text()
