"""The benchmark of speed on a network and matrices that take no time."""

import json
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from benchmarks.speed import run as benchmark

BACKEND = keras.backend.backend()


@pytest.fixture
def tiny(monkeypatch):
    def network(kit=keras):
        return kit.Sequential(
            [
                kit.Input((32, 32, 3)),
                layers.AveragePooling2D(8),
                layers.Flatten(),
                layers.Dense(20, "relu"),
                layers.Dense(10),
            ]
        )

    def arm(name, recipe, every, in_step=False):
        limits = dict.fromkeys(benchmark.BACKENDS, 0.5)
        return benchmark.Arm(name, recipe, every, limits, in_step)

    monkeypatch.setattr(benchmark, "network", network)
    arms = (
        arm("LowRank", benchmark._everywhere(kc.LowRank(rank=2), 2), 2),
        arm("MagnitudePruning(0.5)", benchmark._everywhere(kc.MagnitudePruning(0.5), 1), 1),
        arm("GroupLasso", benchmark._proximal(kc.GroupLasso(0.01)), 1, in_step=True),
    )
    monkeypatch.setattr(benchmark, "ARMS", arms)


def test_the_network_is_that_of_the_limits():
    model = benchmark.network()
    assert model.count_params() == 128_842
    names = {target.name for target in kc.find_targets(model)[0]}
    assert len(names) == 5
    for arm in benchmark.ARMS:
        assert set(arm.limits) == set(benchmark.BACKENDS)
        plan = arm.recipe().plan(model)
        assert {assignment.target.name for assignment in plan.assignments} == names


@pytest.mark.usefixtures("tiny")
def test_steps():
    entries = benchmark.measure_steps(rounds=1, steps=4, batch=2, with_toolkit=False)
    names = ["LowRank, every 2", "MagnitudePruning(0.5), every 1", "GroupLasso, every 1"]
    assert [entry["name"] for entry in entries] == names
    for entry in entries:
        assert len(entry["seconds"]) == len(entry["seconds_without"]) == 1
        assert min(entry["seconds"]) > 0
    assert all(0 < share < 1 for entry in entries[:2] for share in entry["shares"])
    assert entries[2]["inside"] is None


def test_what_is_timed_is_the_callback(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    timed = benchmark.Timed(kc.OccasionalCompression(kc.MagnitudePruning(0.5), 2, where="a"))
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="a")])
    model.compile("sgd", "mse")
    model.fit(np.ones((6, 3)), np.ones((6, 4)), batch_size=1, verbose=0, callbacks=[timed])
    # Every batch takes one tick; each of the three firings reads the clock twice in between.
    assert timed.seconds == 6 + 2 * 3
    assert np.sum(keras.ops.convert_to_numpy(model.layers[0].kernel) == 0) == 6


def test_a_decomposition_that_holds_and_one_that_does_not(monkeypatch):
    entry = benchmark.measure_decomposition("flat", benchmark.kernel((90, 80), None), 1)
    assert (entry["rank"], entry["cold_held"], entry["warm_held"]) == (8, False, True)
    assert entry["cold_error"] == pytest.approx(1, abs=1e-5)
    assert entry["warm_error"] == pytest.approx(1, abs=1e-3)
    assert min(entry[f"{name}_seconds"] for name in ("svd", "cold", "warm")) > 0
    values = benchmark.spectra(70)["harmonic"]
    matrix = benchmark.kernel((70, 80), values)
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), values, atol=1e-5)


def test_a_trained_kernel():
    pytest.importorskip("sklearn")
    kernel = benchmark.trained_kernel((24, 16), epochs=1)
    assert kernel.shape == (24, 16)
    assert np.all(np.isfinite(kernel))


def test_a_ramp_is_traced_once():
    found = benchmark.measure_ramp(6)
    assert found == {"firings": 6, "traces": 6 if BACKEND == "torch" else 1}


@pytest.mark.parametrize("kind", ["warm", "cold", "svd"])
def test_memory_of_a_firing(kind):
    found = benchmark.measure_memory(kind, 64)
    assert found["kernel_bytes"] == 4 * 64 * 64
    assert found["peak_extra_bytes"] is None or found["peak_extra_bytes"] >= 0


def result():
    def step(name, inside, paired, limit, in_step=False):
        shares = [] if inside is None else [inside]
        return {"name": name, "inside": inside, "paired": paired, "limit": limit} | {
            "in_step": in_step, "seconds": [1.0], "seconds_without": [1.0], "shares": shares,
        }  # fmt: skip

    entry = {"name": "harmonic", "shape": [2048, 2048], "rank": 204, "svd_seconds": 2.0}
    entry |= {"cold_seconds": 0.4, "cold_error": 1.0005, "cold_held": True}
    entry |= {"warm_seconds": 0.1, "warm_error": 1.0, "warm_held": True}
    return {
        "environment": {},
        "steps": [
            step("LowRank, every 10", 0.04, 0.06, 0.05),
            step("MagnitudePruning(0.5), every 1", 0.1, 0.11, 0.2),
            step("GroupLasso, every 1", None, 0.12, 0.1, in_step=True),
            step("tfmot, every 1", None, 0.2, None, in_step=True),
        ],
        "decompositions": [entry, entry | {"warm_seconds": 0.3}, entry | {"cold_error": 1.002}],
        "ramp": {"firings": 10, "traces": 1},
        "memory": [
            {"kind": "warm", "kernel_bytes": 100, "peak_extra_bytes": 290},
            {"kind": "svd", "kernel_bytes": 100, "peak_extra_bytes": 700},
            {"kind": "cold", "kernel_bytes": 100, "peak_extra_bytes": None},
        ],
    }


def test_report():
    found = {"tensorflow": result(), "torch": {"ramp": {"firings": 10, "traces": 10}}}
    rows = benchmark.steps_table(found).splitlines()[2:]
    assert rows == [
        "| tensorflow: LowRank, every 10 | 4.0% | +6.0% | 5% | yes |",
        "| tensorflow: MagnitudePruning(0.5), every 1 | 10.0% | +11.0% | 20% "
        "| yes, half of tfmot's: no |",
        "| tensorflow: GroupLasso, every 1 |  | +12.0% | 10% | no |",
        "| tensorflow: tfmot, every 1 |  | +20.0% |  |  |",
    ]
    rows = benchmark.decompositions_table(found).splitlines()[2:]
    assert rows[0] == (
        "| tensorflow: 2048 x 2048, harmonic | 2000 ms | 400.0 ms (5.0x) | 1.00050 | yes "
        "| 100.0 ms (20.0x) | 1.00000 | yes | yes |"
    )
    assert [row.split(" | ")[-1] for row in rows] == ["yes |", "no |", "no |"]
    assert benchmark.memory_table(found).splitlines()[2:] == [
        "| tensorflow: peak of a firing / kernel, warm | 2.90 | 3 | yes |",
        "| tensorflow: peak of a firing / kernel, svd | 7.00 | 6 | no |",
        "| tensorflow: peak of a firing / kernel, cold | not measured | 3 |  |",
        "| tensorflow: traces in 10 firings of a ramp | 1 | 1 | yes |",
    ]


def test_the_command_merges_backends(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    other = next(name for name in benchmark.BACKENDS if name != BACKEND)
    path.write_text(json.dumps({other: result(), BACKEND: {"memory": []}}))
    arguments = ["run", f"--out={tmp_path}", "--parts=decompositions,ramp", "--shapes=24x20"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--repeats=1", "--epochs=1"])
    monkeypatch.setattr(
        benchmark, "trained_kernel", lambda shape, epochs: np.eye(*shape, dtype=np.float32)
    )
    benchmark.main()
    written = json.loads(path.read_text())
    assert set(written) == {other, BACKEND}
    assert set(written[BACKEND]) == {"environment", "decompositions", "ramp", "memory"}
    assert f"{BACKEND}: 24 x 20, trained" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run", f"--out={tmp_path}", "--report"])
    benchmark.main()
    assert capsys.readouterr().out.strip() == benchmark.summary(written)
