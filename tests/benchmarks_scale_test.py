"""The benchmark of scale on models that take no time."""

import json

import keras
import pytest

import keras_compaware as kc
from benchmarks.scale import run as benchmark


@pytest.mark.parametrize(
    ("parameters", "layers", "width"),
    [(10**5, 10, 100), (10**7, 10, 1000), (10**8, 100, 1000), (5 * 10**8, 500, 1000)],
)
def test_models_get_deeper_and_not_wider(monkeypatch, parameters, layers, width):
    monkeypatch.setattr(keras, "Sequential", list)
    stack = benchmark.build(parameters)[1:]
    assert [layer.units for layer in stack] == [width] * layers
    assert stack[-1].name == "head"


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=[pytest.mark.tensorflow] if name == "to_litert" else [])
        for name in benchmark.OPERATIONS
    ],
)
def test_what_is_measured(operation):
    model = benchmark.build(1000)
    before = [layer.kernel.shape for layer in model.layers]
    found = benchmark.OPERATIONS[operation](model)()
    if operation == "plan":
        assert len(found.assignments) == 10
    elif operation == "compact":
        assert found.model.count_params() < 0.5 * model.count_params()
    elif operation == "shrink":
        assert found.layers[0].units == model.layers[0].units // 2
    elif operation == "to_litert":
        assert found.max_error < 1e-4
    else:
        compressor = {
            "MagnitudePruning": kc.MagnitudePruning(0.9),
            "LowRank": kc.LowRank(ratio=0.25),
            "UniformQuantization": kc.UniformQuantization(8),
        }[operation]
        for layer in model.layers:  # a firing finds compressed what the first has compressed
            again = keras.ops.convert_to_numpy(compressor(layer.kernel.value))
            assert keras.ops.convert_to_numpy(layer.kernel) == pytest.approx(again, abs=1e-5)
    assert [layer.kernel.shape for layer in model.layers] == before


def test_an_entry():
    entry = benchmark.measure("plan", 2000)
    assert entry["parameters"] == entry["bytes"] / 4 == 10 * 14 * 15
    assert entry["largest"] == 4 * 14**2
    assert entry["seconds"] > 0


def entries():
    return [
        {
            "operation": "compact",
            "size": size,
            "parameters": size,
            "bytes": 4 * size,
            "seconds": size**1.5,
            "cpu": 3 * size,
            "peak": 8 * size,
        }
        for size in (10**6, 10**7, 10**8)
    ]


def test_only_what_is_missing_and_fits_is_run(monkeypatch):
    asked = []

    def fresh(module, arguments, what):
        asked.append((module, arguments, what))
        return {"operation": "compact", "size": 10**9, "peak": 2, "bytes": 1}

    monkeypatch.setattr(benchmark, "in_fresh_process", fresh)
    # (4 + 8) bytes for each of 10^9 parameters, and half a GiB.
    assert benchmark.needed(entries(), "compact", 10**9) == 12e9 + 2**29
    assert benchmark.needed(entries(), "plan", 10**9) == 0
    for limit, last in (
        (12e9, {"operation": "compact", "size": 10**9, "limit": 12e9}),
        (13e9, fresh),
    ):
        *_, found = benchmark.run(entries(), ["compact"], [10**7, 10**9], limit)
        assert len(found) == 4
        assert found[-1] == (last if limit == 12e9 else fresh(*asked[0]))
    assert asked[0][:2] == ("benchmarks.scale.run", ["--operation=compact", "--size=1000000000"])
    assert len(asked) == 2  # by the second run, and by this test


def test_exponents_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = entries()
    assert benchmark.exponent(found, "compact", "seconds") == pytest.approx(1.5)
    assert benchmark.exponent(found, "compact", "peak") == pytest.approx(1.0)
    assert benchmark.exponent(found[:2], "compact", "peak") is None  # one of them is too small
    found.append({"operation": "compact", "size": 10**9, "limit": 12 * 2**30})
    text = benchmark.summary(found)
    assert text.count("not run: needs more than 12 GiB") == 2
    assert "| 2.00 |" in text
    benchmark.plot(found, tmp_path / "scale")
    assert {path.name for path in tmp_path.iterdir()} == {"scale.png", "scale.svg"}


def test_results_are_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        benchmark,
        "in_fresh_process",
        lambda module, arguments, what: benchmark.measure("plan", 1000),
    )
    arguments = ["run", f"--out={tmp_path}", "--operations=plan", "--sizes=1000"]
    monkeypatch.setattr("sys.argv", arguments)
    for _ in range(2):
        benchmark.main()
        assert "plan" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "results.json").read_text())["entries"]
    assert entry["operation"] == "plan"
