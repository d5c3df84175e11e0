"""The benchmark of architectures on networks that take no time."""

import importlib.util
import json
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from benchmarks.architectures import run as benchmark

FAST = {"BERT", "LSTM"}  # on JAX, where drawing random weights compiles for every shape


def build():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(20, activation="relu", name="a"),
            layers.Dense(32, name="b"),
            layers.Dense(2, name="z"),
        ]
    )


def frozen():
    """The width is under a normalisation, hidden units and heads are free."""
    inputs = keras.Input((3, 8))
    x = layers.LayerNormalization(name="norm")(layers.Dense(8, name="embedding")(inputs))
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(2, name="head")(layers.Dense(4, name="mlp_hidden")(x))
    return keras.Model(inputs, x)


def architecture(build, round_to=1):
    return benchmark.Architecture("net", build, round_to, is_application=True)


def test_every_application_and_other_network_is_listed_once():
    known = benchmark.architectures()
    others = {**benchmark.OTHERS, **benchmark.KERAS_HUB}
    assert {"ResNet50", "NASNetLarge", "ConvNeXtXLarge", *others} <= set(known)
    assert all(name == architecture.name for name, architecture in known.items())
    applications = [name for name, found in known.items() if found.is_application]
    assert len(applications) + len(others) == len(known)
    assert applications[-1] == "ConvNeXtXLarge"


def test_a_row():
    row = benchmark.measure(architecture(build, 8), 0.5)
    assert "failure" not in row
    assert row["input"] == "4"
    assert (row["spaces"], row["free"], row["coverage"]) == (4, 2, 1.0)
    assert row["frozen"] == {"the model's input": 1, "an output of the model": 1}
    assert row["macs"] == 4 * 20 + 20 * 32 + 32 * 2
    assert row["macs_after"] == 16 * 4 + 16 * 16 + 16 * 2
    assert row["parameters_after"] == row["macs_after"] + 16 + 16 + 2
    assert not row["is_least"]
    assert row["error"] <= 1e-5 < row["effect"]
    assert row["shrink_seconds"]["wall"] > 0


def test_the_least_budget_where_the_wanted_one_cannot_be_met():
    row = benchmark.measure(architecture(frozen), 0.3)
    assert "failure" not in row
    assert row["is_least"]
    assert row["layer_normalization"]
    assert 0.3 * row["macs"] < row["macs_after"]
    budget = {"macs": row["macs_after"] / row["macs"] - 0.01}
    with pytest.raises(ValueError, match="cannot be met"):
        kc.choose_channels(frozen(), "l2", budget)


def test_what_is_offered():
    model = frozen()
    assert benchmark.offered(model, kc.channel_spaces(model)) == [
        {"layer": "attention", "kind": "heads", "channels": 2, "reason": None},
        {"layer": "mlp_hidden", "kind": "hidden units", "channels": 4, "reason": None},
    ]
    with_own_layer = keras.Sequential(
        [keras.Input((3, 2)), layers.Dense(4), Untaught(name="untaught"), layers.Dense(2)]
    )
    ((entry),) = benchmark.offered(with_own_layer, kc.channel_spaces(with_own_layer))
    assert entry["kind"] == "recurrent units"
    assert entry["reason"].startswith("'untaught' (Untaught) has no rule for channels")


class Untaught(layers.RNN):
    """A recurrent layer that nobody has taught the package about."""

    def __init__(self, **kwargs):
        super().__init__(layers.SimpleRNNCell(3), **kwargs)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        return super().call(sequences, initial_state, mask, training)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in benchmark.OTHERS
    ],
)
def test_other_networks(name):
    model = benchmark.OTHERS[name]()
    assert len(benchmark.offered(model, kc.channel_spaces(model))) >= 2
    for array, tensor in zip(benchmark.example(model), model.inputs, strict=True):
        assert array.shape == (2, *tensor.shape[1:])
        assert array.dtype == tensor.dtype


@pytest.mark.tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.OTHERS)
def test_other_networks_become_files_after_they_are_cut(name, tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = benchmark.randomise(benchmark.OTHERS[name]())
    _, keep = benchmark.choose(model, 0.5, round_to=1)
    small = kc.shrink(model, keep)
    assert kc.measure.macs(small) < 0.9 * kc.measure.macs(model)
    inputs = benchmark.example(small)
    result = kc.export.to_litert(small, tmp_path / "model.tflite", inputs=inputs)
    assert result.max_error < 1e-4
    assert not any(kind.startswith("Flex") for kind in result.ops)
    assert kc.measure.file_bytes(result.path) < 5 * small.count_params() + 100_000


def test_a_failure_is_a_row(monkeypatch):
    def broken(model, keep):
        raise RuntimeError("no | way\nat all")

    monkeypatch.setattr(benchmark, "_warm_up", lambda: None)
    monkeypatch.setattr(kc, "shrink", broken)
    row = benchmark.measure(architecture(build), 0.5)
    assert row["failure"] == "RuntimeError: no | way\nat all"
    assert row["coverage"] == 1.0  # what was found before stands beside it
    text = benchmark.summary([row])
    assert "FAILED: RuntimeError: no \\| way at all" in text
    assert "Failures: net." in text


@pytest.mark.parametrize(
    ("shrink", "failure"),
    [
        (lambda model, keep: kc.compaction.shrink(model, {"a": keep["a"] + 9}), "differ"),
        (lambda model, keep: keras.models.clone_model(model), "are left, of the budget"),
    ],
)
def test_wrong_cuts_are_failures(shrink, failure, monkeypatch):
    monkeypatch.setattr(kc, "shrink", shrink)
    monkeypatch.setattr(benchmark, "_warm_up", lambda: None)
    keep = {"a": np.arange(10)}
    monkeypatch.setattr(benchmark, "choose", lambda *_: (0.6, keep))
    assert failure in benchmark.measure(architecture(build), 0.5)["failure"]


def test_reasons_without_names():
    for reason, expected in {
        "it is the model's input 'input_layer'": "the model's input",
        "it is an output of 'a/b' (LayerNormalization)": "an output of LayerNormalization",
        "'add' joins it with an output of 'x' (LSTM), which its rule leaves whole": (
            "a layer joins it with an output of LSTM"
        ),
        "'a' (Own) has no rule for channels, for its `call` is not that of Dense: register_x": (
            "Own has no rule for channels"
        ),
        "'a' (Matmul) has no rule for channels: register_operation_rule('Matmul') teaches it one": (
            "Matmul has no rule for channels"
        ),
        "the activation softmax of 'a' may mix its channels": (
            "the activation softmax of a layer may mix its channels"
        ),
    }.items():
        assert benchmark.short(reason) == expected


def test_the_verdict():
    rows = [
        {"name": name, "is_application": True, "layer_normalization": norm, "coverage": coverage}
        for name, norm, coverage in (("a", False, 0.94), ("b", True, 0.9), ("c", True, 0.8))
    ]
    for row in rows:
        row.update(input="4", free=0, spaces=1, frozen={"x": 1}, parameters=1234, macs=2_500_000)
    entries = [
        {"layer": "x", "kind": "heads", "channels": 8, "reason": None},
        {"layer": "y", "kind": "heads", "channels": 8, "reason": "'y' (LSTM) mixes"},
    ]
    rows.append({**rows[1], "name": "e", "is_application": False, "offered": entries})
    text = benchmark.summary([*rows, {"name": "d", "is_application": False, "failure": "died"}])
    assert text.splitlines()[-1] == (
        "Coverage below 95 % without layer normalisation: a (94.0 %). Coverage below 85 % with "
        "layer normalisation: c (80.0 %). Failures: d."
    )
    assert "| a | 4 | 0 / 1 | 1 x x | 94.0 % | 1.2 K | 2.5 M | nothing to cut |  |  |  |" in text
    assert "- d: not measured." in text
    assert "- e: heads of 1 of 2 layers (8), why not all: LSTM mixes." in text


def test_the_command_resumes_and_reports(tmp_path, monkeypatch, capsys):
    asked, dying = [], {"b"}

    def measured(name, fraction):
        asked.append(name)
        row = {"name": name, "is_application": True}
        return {**row, "failure": "died"} if name in dying else row

    def command(*arguments):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["run", f"--out={tmp_path}", *arguments])
        benchmark.main()
        return capsys.readouterr().out

    readme = tmp_path / "README.md"
    readme.write_text("Above.\n<!-- report -->\nold\n<!-- end of report -->\nBelow.\n")
    known = {name: benchmark.Architecture(name, build, 1, True) for name in "abc"}
    monkeypatch.setattr(benchmark, "architectures", lambda: known)
    monkeypatch.setattr(benchmark, "measure_elsewhere", measured)
    monkeypatch.setattr(benchmark, "_table", lambda rows: f"{len(rows)} rows")
    monkeypatch.setattr(benchmark, "_verdict", lambda rows: "verdict")
    command("--only=a")
    assert asked == ["a"]
    command()
    assert asked == ["b", "c"]
    dying.clear()
    command()
    assert asked == ["b"]
    assert list(json.loads((tmp_path / "results.json").read_text())["rows"]) == ["a", "b", "c"]
    text = command("--report").strip()
    assert asked == []
    marked = f"<!-- report -->\n{text}\n<!-- end of report -->"
    assert readme.read_text() == f"Above.\n{marked}\nBelow.\n"
    with pytest.raises(ValueError, match="no architecture 'x'"):
        command("--only=a,x")


def test_what_is_not_installed_is_listed_and_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure_elsewhere", lambda name, fraction: measured[name])
    monkeypatch.setattr(sys, "argv", ["run", f"--out={tmp_path}"])
    known = {n: benchmark.Architecture(n, build, 1, False) for n in ("LSTM", "KerasHub BERT")}
    monkeypatch.setattr(benchmark, "architectures", lambda: known)
    measured = {name: {"name": name, "is_application": False, "spaces": 1} for name in known}
    found = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[-1])
    assert benchmark.reason_not_to_run("LSTM") is None
    benchmark.main()
    text = capsys.readouterr().out
    assert "| KerasHub BERT |" in text
    assert "not run: keras_hub is not installed" in text
    assert "- KerasHub BERT: not measured." in text
    found.append("a module")
    benchmark.main()
    assert "not run" not in capsys.readouterr().out
    found.append(None)
    monkeypatch.setattr(sys, "argv", ["run", f"--out={tmp_path}", "--only=KerasHub BERT"])
    benchmark.main()  # what was measured where it is installed stays
    assert "not run" not in capsys.readouterr().out


def test_layers_whose_macs_are_not_known_are_counted():
    def untaught():
        own = Untaught(name="untaught")
        return keras.Sequential(
            [keras.Input((3, 2)), layers.Dense(4), layers.TimeDistributed(Own()), own]
        )

    with pytest.warns(UserWarning, match="unknown kind"):
        row = benchmark.measure(architecture(untaught), 0.5)
    assert row["layers_without_macs"] == 1
    assert f"{row['macs']}, without 1 layers" in benchmark.summary([row])


class Own(layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        return x * self.factor

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow]) for name in benchmark.KERAS_HUB],
)
def test_backbones_of_keras_hub(name):
    pytest.importorskip("keras_hub")
    row = benchmark.measure(benchmark.architectures()[name], 0.5)
    assert "failure" not in row


@pytest.mark.slow
def test_a_process_of_its_own_and_one_that_dies():
    row = benchmark.measure_elsewhere("LSTM", 0.5)
    assert row["name"] == "LSTM"
    assert row["coverage"] >= 0
    row = benchmark.measure_elsewhere("LSTM", "none of the numbers")
    assert row["failure"] == "the process ended with the status 2"
