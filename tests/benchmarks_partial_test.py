"""The benchmark of partial group lasso on networks and data that take no time."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest

from benchmarks.partial_group_lasso import run
from keras_compaware import data, measure
from keras_compaware.compaction import compact
from keras_compaware.models import lenet_300_100

UNITS = (8, 6)


def dataset(number=48):
    """Images whose class is the half that is bright."""
    generator = np.random.default_rng(0)
    splits = []
    for _ in range(3):
        labels = generator.integers(2, size=number)
        images = generator.integers(100, size=(number, 4, 4, 1))
        images[:, :2] += 150 * labels[:, None, None, None]
        splits.append(data.Split(images.astype("uint8"), labels))
    return data.Dataset("halves", "1.0.0", *splits, 2, (4, 4, 1), ("dark", "bright"))


def result(
    method, parameters, seed=0, trained=(0.9, 0.8, 0.7), finetuned=(0.95, 0.85, 0.75), **new
):
    trial = run.Trial("mnist", method, new.get("strength", 0.1), new.get("fraction", 0.5), seed)
    splits = ("train", "validation", "test")
    return dataclasses.asdict(trial) | {
        "parameters": parameters,
        "neurons": [parameters // 10, 3],
        "trained": dict(zip(splits, trained, strict=True)),
        "finetuned": dict(zip(splits, finetuned, strict=True)),
    }


def test_parameters_and_units_that_stay():
    model = lenet_300_100((28, 28, 1), 10)
    assert run.dense_parameters([784, *run.UNITS, 10]) == measure.parameters(model)
    assert run.left(0.0) == (300, 100)
    assert run.left(0.7375) == (300 - 221, 100 - 74)
    assert run.left(0.01, UNITS) == (7, 5)


@pytest.mark.parametrize("level", run.LEVELS)
def test_a_level_has_the_smallest_fraction_that_it_needs(level):
    fraction = run.fraction_for(level)
    limit = level * 266610
    smaller = (round(400 * fraction) - 1) / 400
    sizes = [run.dense_parameters([784, *run.left(f), 10]) for f in (fraction, smaller)]
    assert 0.9 * limit < sizes[0] <= 0.97 * limit < sizes[1]


def test_a_level_out_of_reach():
    with pytest.raises(ValueError, match=r"\(8, 6\) units cannot be cut to 0.10%"):
        run.fraction_for(0.001, 16, UNITS, 2)


def test_the_grid_has_every_method_and_the_first_seed_first():
    trials = run.grid(["fashion_mnist", "mnist"], [3, 1])
    assert [key for key, _ in itertools.groupby(trials, lambda t: (t.seed, t.dataset))] == [
        (seed, name) for seed in (3, 1) for name in ("fashion_mnist", "mnist")
    ]
    assert len({trial.name for trial in trials}) == len(trials)
    assert {trial.method for trial in trials} == set(run.METHODS)
    some = [trial for trial in trials if trial.dataset == "mnist" and trial.seed == 1]
    whole = [trial.fraction for trial in some if trial.method == "none"]
    assert whole == [0.0, *map(run.fraction_for, run.LEVELS)]
    for name, method in run.METHODS.items():
        found = {(trial.strength, trial.fraction) for trial in some if trial.method == name}
        fractions = whole[name != "none" :] if method.partial else [0]
        assert found == set(itertools.product(method.strengths["mnist"], fractions))


@pytest.mark.parametrize("name", run.METHODS)
def test_in_the_limit_of_large_steps_a_method_removes_what_it_penalises(name):
    trial = run.Trial("halves", name, 1.0, 0.5, 0)
    model = run.build(trial, dataset(), UNITS)
    method = run.METHODS[name]
    recipe = method.recipe(trial.strength, trial.fraction)
    if recipe is not None:
        optimizer = recipe.optimizer(keras.optimizers.SGD(1e3), model)
        weights = model.trainable_variables
        optimizer.apply([keras.ops.zeros(weight.shape) for weight in weights], weights)
    whole = compact(model).whole
    neurons = tuple(whole.get_layer(layer).units for layer in ("dense1", "dense2"))
    assert neurons == (run.left(0.5, UNITS) if method.partial else (1, 1))


def test_accuracies_are_those_of_the_splits():
    bright = dataset()
    model = lenet_300_100((4, 4, 1), 2, units=(2,))
    for layer in ("dense1", "head"):
        kernel, bias = model.get_layer(layer).weights
        kernel.assign(np.zeros(kernel.shape))
    bias.assign([0.0, 1.0])
    expected = {
        name: float(getattr(bright, name).labels.mean()) for name in ("train", "validation", "test")
    }
    assert run.accuracies(model, bright) == pytest.approx(expected)
    assert len(set(expected.values())) > 1


def test_a_trial(monkeypatch):
    monkeypatch.setattr(run, "BATCH_SIZE", 8)
    monkeypatch.setattr(run, "LEARNING_RATE", 0.05)
    trial = run.Trial("halves", "subset", 3.0, 0.5, 1)
    found = run.run_trial(trial, dataset(), 6, 1, UNITS)
    assert {name: found[name] for name in dataclasses.asdict(trial)} == dataclasses.asdict(trial)
    assert found["neurons"] == [4, 3]
    assert found["parameters"] == run.dense_parameters([16, 4, 3, 2])
    assert (found["epochs"], found["finetune_epochs"]) == (6, 1)
    assert found["finetuned"]["test"] > 0.9
    assert json.loads(json.dumps(found)) == found


def test_finished_trials_are_not_run_again(monkeypatch, tmp_path):
    runs, loads = [], []

    def run_trial(trial, dataset, epochs, finetune_epochs, units):
        runs.append(trial)
        lengths = {"epochs": epochs, "finetune_epochs": finetune_epochs}
        return result(trial.method, 100, trial.seed) | lengths

    monkeypatch.setattr(run, "run_trial", run_trial)
    trials = [run.Trial("mnist", "full", strength, 0, 0) for strength in (0.1, 0.2, 0.3)]
    first = run.run_all(trials[:2], tmp_path, loads.append, 5, 2)
    again = run.run_all(trials, tmp_path, loads.append, 5, 2)
    assert again[:2] == first
    assert runs == trials
    assert loads == ["mnist", "mnist"]  # once for each call that trains
    run.run_all(trials, tmp_path, loads.append, 5, 2)
    assert len(runs) == 3
    assert len(loads) == 2
    with pytest.raises(ValueError, match=r"of \(5, 2\) epochs, and \(6, 2\) are wanted"):
        run.run_all(trials, tmp_path, loads.append, 6, 2)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_best_on_validation_within_the_limit_is_chosen():
    trials = [
        result("full", 101, trained=(0.9, 0.99, 0.9)),
        result("full", 100, trained=(0.9, 0.8, 0.9), finetuned=(0.9, 0.8, 0.9)),
        result("full", 60, trained=(0.9, 0.85, 0.1)),
        result("subset", 50, trained=(0.9, 0.9, 0.9)),
        result("full", 70, seed=1),
    ]
    assert run.chosen(trials, "full", 100, "trained") == {0: trials[2], 1: trials[4]}
    assert run.chosen(trials, "full", 100, "finetuned")[0] is trials[2]
    assert run.chosen(trials, "full", 65, "trained") == {0: trials[2]}
    assert run.chosen(trials, "block", 100, "trained") == {}


def trials_of_two_seeds():
    found = []
    for seed in (0, 1):
        found += [
            result("none", 1000, seed, fraction=0.0),
            result("none", 480, seed, (0.9, 0.8, 0.80 + 0.02 * seed)),
            result("full", 400, seed, (0.9, 0.8, 0.70 + 0.04 * seed)),
            result("subset", 240, seed, (0.9, 0.8, 0.75 + 0.02 * seed)),
        ]
    return [*found, result("block", 240, 0)]


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_tables(monkeypatch):
    monkeypatch.setattr(run, "LEVELS", (0.5, 0.25, 0.1))
    trials = trials_of_two_seeds()
    accuracy = run.accuracy_table(trials, "trained")
    assert cells(accuracy, "none: narrower from the start") == ["81.00 ± 1.41", "–", "–"]
    assert cells(accuracy, "partial, subset") == ["76.00 ± 1.41", "76.00 ± 1.41", "–"]
    assert cells(accuracy, "partial, block") == ["–"] * 3  # not of all seeds
    difference = run.difference_table(trials, "trained", "full")
    assert cells(difference, "partial, subset") == ["+4.00 ± 1.41", "–", "–"]
    assert cells(difference, "group lasso") == ["–"] * 3
    assert cells(run.size_table(trials, "trained"), "group lasso")[0] == "400 (40 + 3)"
    seconds = {"none": [1e-3, 2e-3, 4e-3], "full": [2e-3, 3e-3, 8e-3]}
    assert cells(run.time_table(seconds), "none") == ["2.00 ms", "1.00"]
    assert cells(run.time_table(seconds), "group lasso") == ["3.00 ms", "2.00"]


def test_the_report_replaces_what_stands_between_its_marks(tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- report -->\nold\n<!-- end of report -->\nAfter.\n", "utf-8")
    results = {"trials": trials_of_two_seeds()}
    text = run.report(results, tmp_path)
    assert "### MNIST" in text
    assert "Not measured yet" in text
    marks = ("Before.\n<!-- report -->\n", "\n<!-- end of report -->\nAfter.\n")
    assert readme.read_text("utf-8") == text.join(marks)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results
    assert (tmp_path / "mnist.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "mnist.svg").read_text("utf-8")
    results["seconds_per_step"] = {"seconds": {"none": [1e-3], "full": [2e-3]}}
    text = run.report(results, tmp_path)
    assert cells(text[text.index("### Seconds") :], "group lasso") == ["2.00 ms", "2.00"]
    assert readme.read_text("utf-8") == text.join(marks)
    readme.write_text("nothing", "utf-8")
    with pytest.raises(ValueError, match="lacks the marks"):
        run.report(results, tmp_path)


def test_seconds_per_step_take_turns(monkeypatch):
    names = ("none", "subset")
    monkeypatch.setattr(run, "METHODS", {name: run.METHODS[name] for name in names})
    monkeypatch.setattr(run, "BATCH_SIZE", 4)
    seconds = run.timed(2, 2, 0.5, UNITS)
    assert list(seconds) == ["none", "subset"]
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
