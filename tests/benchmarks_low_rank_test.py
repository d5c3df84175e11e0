"""The benchmark of the low-rank regularizer on networks and data that take no time."""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from benchmarks.low_rank_regularizer import run as benchmark
from keras_compaware import data

FOLDER = pathlib.Path(benchmark.__file__).parent

SETTINGS = benchmark.Settings(
    title="tiny",
    network="lenet_300_100",
    arguments={"units": (24, 12)},
    strengths={"none": (0.0,), "nuclear": (1.0, 2.0)},
    group_share=0.1,
    epochs=1,
    tune_steps=2,
    targets=(0.5, 0.25),
    every=2,
    batch_size=16,
    recalibrate_steps=1,
)


def build():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(16, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.GlobalAveragePooling2D(name="average"),
            layers.Dense(24, name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )


@pytest.mark.parametrize("budget", [100, 250, 400, 600])
def test_truncation_is_by_the_largest_energy_that_meets_the_budget(budget):
    model = build()
    energy, ranks = benchmark.ranks_within(model, budget)
    shapes = {"conv/kernel": (18, 16), "hidden/kernel": (16, 24)}
    assert set(ranks) <= set(shapes)
    planned = sum(
        ranks[name] * sum(shape) if name in ranks else shape[0] * shape[1]
        for name, shape in shapes.items()
    )
    assert planned <= budget
    for target in benchmark.kernels(model):
        if target.name in ranks:  # the package's own rule finds the same ranks
            settled = kc.LowRank(energy=energy - 1e-6).settle(target.read(), target.axes)
            assert settled.rank == ranks[target.name]
    # One rank more, where that loses least, does not fit.
    energies = [benchmark.spectrum(target)[0] for target in benchmark.kernels(model)]
    above = min(value for value in np.concatenate(energies) if value > energy)
    more = [
        int(kc.LowRank(energy=float(above) - 1e-6).settle(target.read(), target.axes).rank)
        for target in benchmark.kernels(model)
    ]
    costs = [min(r * (m + n), m * n) for r, (m, n) in zip(more, shapes.values(), strict=True)]
    assert sum(costs) > budget
    small = benchmark.truncated(model, ranks)
    assert benchmark.kernel_parameters(small) == planned
    assert benchmark.size(small, model)["kernel_ratio"] == planned / (18 * 16 + 16 * 24)


def test_a_kernel_of_low_rank_within_the_budget_loses_nothing():
    model = build()
    hidden = model.get_layer("hidden").kernel
    hidden.assign(np.outer(np.arange(1.0, 17.0), np.ones(24)))
    energy, ranks = benchmark.ranks_within(model, 18 * 16 + 40)
    assert energy == 1.0
    assert ranks == {"hidden/kernel": 1}
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("float32")
    small = benchmark.truncated(model, ranks)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(small(x)), keras.ops.convert_to_numpy(model(x)), atol=1e-4
    )


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(ValueError, match="74 parameters, more than 73"):
        benchmark.ranks_within(build(), 73)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)

    def split(number):
        labels = np.arange(number) % 3
        images = rng.integers(0, 100, (number, 8, 8, 1))
        images[np.arange(number), labels] += 150
        return data.Split(images.astype("uint8"), labels)

    return data.Dataset(
        name="squares",
        version="1.0.0",
        train=split(64),
        validation=split(24),
        test=split(30),
        num_classes=3,
        image_shape=(8, 8, 1),
        label_names=("a", "b", "c"),
    )


def test_a_trial_with_a_strong_regularizer(dataset):
    trial = benchmark.Trial("squares", "tiny", "nuclear", 700.0, 3)
    record = benchmark.run_trial(trial, SETTINGS, dataset)
    dense = 64 * 24 + 24 * 12
    assert record["dense"]["kernel_ratio"] == 1.0
    assert record["dense"]["parameters"] == dense + 24 + 12 + 13 * 3
    ratio = record["trained"]["kernel_ratio"]
    assert ratio < 0.2  # the proximal map left few singular values, or none
    for entry, target in zip(record["truncated"], SETTINGS.targets, strict=True):
        assert entry["target"] == target
        assert entry["kernel_ratio"] == ratio  # so there was nothing to truncate
        assert entry["before"]["test"] == record["trained"]["test"]
        assert set(entry["after"]) == {"validation", "test"}
    assert json.loads(json.dumps(record)) == record


def test_a_trial_without_a_regularizer(dataset):
    settings = dataclasses.replace(
        SETTINGS, batch_size=4, epochs=2, tune_steps=16, learning_rate=0.01, targets=(0.2,)
    )
    trial = benchmark.Trial("squares", "tiny", "none", 0.0, 0)
    record = benchmark.run_trial(trial, settings, dataset)
    assert record["trained"]["kernel_ratio"] == 1.0
    assert record["trained"]["test"] > 0.9
    (entry,) = record["truncated"]
    assert 0.1 < entry["kernel_ratio"] <= 0.2
    assert entry["before"]["test"] < record["trained"]["test"]
    assert entry["after"]["test"] > entry["before"]["test"]


def test_fine_tuning_beyond_an_epoch_is_refused(dataset):
    settings = dataclasses.replace(SETTINGS, tune_steps=5)
    trial = benchmark.Trial("squares", "tiny", "none", 0.0, 0)
    with pytest.raises(ValueError, match="at most the 4 steps"):
        benchmark.tuned(build(), trial, settings, dataset)


def test_arms():
    settings = benchmark.NETWORKS["lenet_300_100"]
    assert benchmark.action("none", 0.0, settings) is None
    assert benchmark.action("l2", 0.5, settings).regularizer.l2 == 0.5
    nuclear = benchmark.action("nuclear", 2.0, settings)
    assert nuclear == kc.Proximal(kc.NuclearNorm(2.0), every=100)
    both = benchmark.action("nuclear_groups", 2.0, settings).regularizer
    assert (both.strength, both.group_strength) == (2.0, 2.0 * settings.group_share)
    with pytest.raises(ValueError, match="none, l2, nuclear"):
        benchmark.action("entropy", 1.0, settings)


def test_the_first_seed_of_everything_comes_first():
    trials = benchmark.all_trials(list(benchmark.DATASETS), list(benchmark.NETWORKS), [4, 0])
    assert len({trial.name for trial in trials}) == len(trials)
    seeds = [trial.seed for trial in trials]
    half = len(trials) // 2
    assert seeds == [4] * half + [0] * half
    assert {trial.network for trial in trials[:half]} == set(benchmark.NETWORKS)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "NETWORKS", {"tiny": SETTINGS})
    trials = benchmark.all_trials(["mnist"], ["tiny"], [0])
    done = []

    def execute(trial):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(trial)
        return {"settings": SETTINGS.to_json(), "seconds": 1.0, "name": trial.name}

    with pytest.raises(KeyboardInterrupt):
        benchmark.run(trials, tmp_path, execute)
    assert {path.stem for path in tmp_path.iterdir()} == {trial.name for trial in done}
    finished = list(done)
    done.clear()
    benchmark.run(trials, tmp_path, execute)
    assert finished + done == trials

    changed = dataclasses.replace(SETTINGS, epochs=2)
    monkeypatch.setattr(benchmark, "NETWORKS", {"tiny": changed})
    with pytest.raises(ValueError, match="other settings"):
        benchmark.run(trials, tmp_path, execute)


def results():
    """Two seeds; the strength 2 is better on validation, the strength 1 on test."""
    records = []
    for seed in (0, 1):
        for arm, strength, validation, test in [
            ("none", 0.0, 0.5, 0.5),
            ("nuclear", 1.0, 0.6, 0.9),
            ("nuclear", 2.0, 0.7, 0.8 + 0.1 * seed),
        ]:
            accuracy = {"validation": validation, "test": test}
            cost = {"kernel_ratio": 0.5, "parameters": 1000 + seed, "macs": 900}
            entry = {"kernel_ratio": 0.25, "before": accuracy, "after": accuracy}
            records.append(
                {"dataset": "mnist", "network": "tiny", "arm": arm, "strength": strength}
                | {"seed": seed, "trained": cost | accuracy}
                | {"truncated": [entry | {"target": 0.5}, entry | {"target": 0.25}]}
            )
    records.append({**records[0], "seed": 2})  # the other arms of this seed are missing
    return {"datasets": ["mnist", "squares"], "networks": ["tiny"], "trials": records}


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "NETWORKS", {"tiny": SETTINGS})
    given = results()
    group, missing = benchmark.groups(given["trials"], given["datasets"], given["networks"])
    assert (group.seeds, missing.seeds) == ((0, 1), ())
    assert group.chosen("nuclear", 0, "after") == 2.0
    lines = benchmark.accuracy_table([group, missing], "after").splitlines()
    assert lines[0] == "|  | regularizer | seeds | 0.5 | 0.25 |"
    assert lines[2] == "| MNIST, tiny | no regularizer | 2 | 50.00 ± 0.00 | 50.00 ± 0.00 |"
    cells = "85.00 ± 7.07 (2) | 85.00 ± 7.07 (2)"
    assert lines[3] == f"| MNIST, tiny | nuclear norm | 2 | {cells} |"
    assert lines[4] == "| squares, tiny | not run |  |  |  |"
    gain = benchmark.gain_table([group, missing], ["nuclear"]).splitlines()
    cells = "before fine-tuning | +35.00 ± 7.07 | +35.00 ± 7.07"
    assert gain[2] == f"| MNIST, tiny | nuclear norm | {cells} |"
    assert len(gain) == 4
    rows = benchmark.trained_table([group, missing]).splitlines()
    cells = "90.00 ± 0.00 | 0.500 | 1,000 | 900"
    assert rows[3] == f"| MNIST, tiny | nuclear norm | 1 | {cells} |"
    targets = [1.0, *benchmark.all_targets([group, missing])]
    assert benchmark.by_target(group, targets, str) == ["", "0", "1"]
    pytest.importorskip("matplotlib")
    benchmark.plot(given, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in ("accuracy", "strengths") for kind in ("png", "svg")
    }
