"""The benchmarks on models that take no time."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from benchmarks.common import Steps, environment, table, write_results
from benchmarks.deploy import run as deploy
from benchmarks.latency import run as latency
from benchmarks.shrink_speed import run as shrink_speed
from benchmarks.sparse_files import run as sparse_files
from keras_compaware import data


def build(name="net"):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(20, name="a"),
            layers.Dense(32, name="b"),
            layers.Dense(2, name="z"),
        ],
        name=name,
    )


def test_environment_and_results(tmp_path):
    results = {"environment": environment(), "values": [1.5]}
    write_results(tmp_path / "new" / "results.json", results)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]
    assert results["environment"]["versions"]["keras"] == keras.__version__
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_a_training_has_as_many_steps_as_it_says():
    split = data.Split(np.zeros((10, 8, 8, 1), "uint8"), np.arange(10))
    batches = Steps(data.batches(split, 4, seed=0, epoch=5), 8)
    passes = [data.batches(split, 4, seed=0, epoch=epoch) for epoch in (5, 6, 7)]
    expected = [labels for one in passes for _, labels in one]
    for index in range(8):
        np.testing.assert_array_equal(batches[index][1], expected[index])
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten()])
    model.add(layers.Dense(10, activation="softmax"))
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(batches, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 8


def test_a_share_of_every_space_is_removed():
    keep = shrink_speed.kept(build(), 0.3)
    assert {name: len(kept) for name, kept in keep.items()} == {"a": 14, "b": 22}
    assert kc.shrink(build(), keep).get_layer("b").units == 22


def test_times_and_memory(monkeypatch):
    monkeypatch.setattr(shrink_speed, "build", build)
    samples = shrink_speed.timed(["one", "two"], 0.3, repeats=1)
    assert [(sample["model"], sample["operation"]) for sample in samples] == [
        (name, operation) for name in ("one", "two") for operation in shrink_speed.OPERATIONS
    ]
    assert all(sample["wall"] > 0 for sample in samples)
    peak = shrink_speed.memory("one", 0.3)
    assert peak["bytes"] == 4 * build().count_params()
    assert peak["bytes_after"] == 4 * (14 * 5 + 22 * 15 + 2 * 23)
    samples = [
        {"model": "one", "operation": operation, "round": number, "wall": wall, "cpu": 0.25}
        for operation in shrink_speed.OPERATIONS
        for number, wall in enumerate([1.0, 9.0, 2.0])
    ]
    peaks = [{"model": "one", "bytes": 2**20, "peak_extra_bytes": 2**19}]
    line = shrink_speed.summary(samples, peaks).splitlines()[-1]
    cells = ["one", *["2.00 s (0.25 s)"] * 3, "1 MiB", "0.50"]
    assert line == f"| {' | '.join(cells)} |"


def test_clones_hold_the_same_weights():
    model = build()
    clone = shrink_speed.cloned(model)
    for a, b in zip(model.get_weights(), clone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.tensorflow
def test_latency(tmp_path):
    entries = latency.measured(build(), 0.5, [8], passes=2, repeats=2, folder=tmp_path)
    assert [entry["macs"] for entry in entries] == [784, 16 * 4 + 16 * 16 + 16 * 2]
    assert [len(entry["median_ms"]) for entry in entries] == [2, 2]
    entries[0].update(median_ms=[2.0, 4.0], minimum_ms=[1.0, 2.0])
    entries[1].update(median_ms=[1.0, 1.0], minimum_ms=[0.5, 0.5])
    line = latency.summary({"net": entries}).splitlines()[-1]
    expected = ["net: multiples of 8", "0.0 M", "0.45", "1.000 ms", "0.38", "0.500 ms", "0.38"]
    assert [cell for cell in line.strip("| ").split(" | ") if "KB" not in cell] == expected


@pytest.mark.tensorflow
def test_sizes_and_latencies_of_sparse_files(tmp_path):
    pytest.importorskip("ai_edge_litert")
    forms = {name: sparse_files.FORMS[name] for name in ("as it is", "pruned, 90 %")}
    forms["tiles"] = kc.GroupPruning(0.75, block=(4, 4))
    entries = sparse_files.measured(build, forms, passes=1, repeats=2, folder=tmp_path)
    of = {(entry["form"], entry["encoding"]): entry for entry in entries}
    assert [entry["form"] for entry in entries[::3]] == list(forms)
    assert of["as it is", "sparse"]["sparse_tensors"] == 0
    assert of["pruned, 90 %", "dense"]["zeros"] == pytest.approx(0.9, abs=0.01)
    assert of["pruned, 90 %", "sparse"]["bytes"] < of["pruned, 90 %", "dense"]["bytes"]
    assert of["pruned, 90 %", "sparse"]["same_outputs_as_dense"]
    assert "wrongly" in of["tiles", "sparse float16"]["refused"]
    lines = sparse_files.summary({"net": entries}).splitlines()
    assert len(lines) == 2 + len(forms)
    assert lines[2].split(" | ")[5] == "1.00 / 1.00"
    assert (lines[-1].split(" | ")[4], lines[-1].split(" | ")[-1]) == ("refused", "- |")


@pytest.mark.tensorflow
def test_files_for_the_device(tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = build()
    examples = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    entries = []
    for mode in (None, "int8"):
        path = tmp_path / f"{mode}.tflite"
        about = deploy.exported(model, mode, path, examples)
        entries.append({"by": "keras_compaware", "form": "dense", "mode": mode or "float32"})
        entries[-1] |= about | deploy.of_file(path, None)
    assert entries[0]["agreement"] == 1.0
    for entry, times in zip(entries, ([2.0, 4.0], [1.0, 1.0]), strict=True):
        entry |= {f"ms_{threads}": times for threads in deploy.THREADS}
    lines = deploy.summary({"mobilenet_v2": entries}).splitlines()
    assert lines[0] == "### MobileNetV2, 224 x 224"
    assert lines[-1].startswith("| dense | int8 |")
    assert lines[-1].endswith("| 1.000 | 0.38 | 1.000 | 0.38 |")


@pytest.mark.tensorflow
def test_a_form_that_cannot_be_exported(tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = keras.Sequential([keras.Input((4, 2)), layers.LSTM(3)])
    examples = np.zeros((4, 4, 2), "float32")
    path = tmp_path / "model.tflite"
    about = deploy.exported(model, "int8", path, examples)
    assert "crashed" in about["refused"]
    assert not path.exists()


def test_weights_are_handed_over_by_layer_and_name(tmp_path):
    model = build()
    deploy.hand_over(model, tmp_path)
    with np.load(tmp_path / "start.npz") as saved:
        assert sorted(saved) == [f"{n}/{v}" for n in "abz" for v in ("bias", "kernel")]
        np.testing.assert_array_equal(saved["b/kernel"], model.get_layer("b").kernel)
