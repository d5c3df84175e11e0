"""The trials of a sweep: all of them, under names that stay."""

import copy

import pytest

from keras_compaware.search import expand
from tests.search.helpers import CONFIG, changed


def ids(config):
    return [trial.id for trial in expand(config)]


def test_the_whole_grid_with_its_baselines():
    found = ids(changed(seeds=[3], schedules={"cosine": {}}))
    assert found == [
        "dense:cosine:3",
        "pruning:90 %:every-1:cosine:3",
        "pruning:90 %:every-10:cosine:3",
        "pruning:90 %:post_training:cosine:3",
        "pruning:90 %:straight_through:cosine:3",
        "pruning:90 %:held_pruning:cosine:3",
        "pruning:95 %:every-1:cosine:3",
        "pruning:95 %:every-10:cosine:3",
        "pruning:95 %:post_training:cosine:3",
        "pruning:95 %:straight_through:cosine:3",
        "pruning:95 %:held_pruning:cosine:3",
        "low_rank:1/4:every-1:cosine:3",
        "low_rank:1/4:every-10:cosine:3",
        "low_rank:1/4:post_training:cosine:3",
        "low_rank:1/4:straight_through:cosine:3",
        "noise:0.1:every-1:cosine:3",
        "noise:0.1:every-10:cosine:3",
    ]


def test_dense_networks_come_first_and_then_seed_by_seed():
    trials = expand(CONFIG)
    assert [t.id for t in trials[:4]] == [
        "dense:constant:0",
        "dense:cosine:0",
        "dense:constant:1",
        "dense:cosine:1",
    ]
    assert [t.seed for t in trials[4:]] == sorted(t.seed for t in trials[4:])


def test_ids_are_unique_and_do_not_depend_on_the_rest_of_the_grid():
    found = ids(CONFIG)
    assert len(set(found)) == len(found) == 4 + 4 * 16
    assert set(ids(changed(every=[10], seeds=[1]))) < set(found)


def test_settings_hold_what_decides_about_a_result_and_nothing_else():
    by_id = {trial.id: trial for trial in expand(CONFIG)}
    trial = by_id["pruning:95 %:every-10:constant:1"]
    assert trial.settings == {
        "config": {
            "model": "lenet_300_100",
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "schedule": "constant"},
            "seed": 1,
        },
        "rule": {"where": None, "compressor": "MagnitudePruning", "sparsity": 0.95, "every": 10},
        "steps": 1000,
        "pretrain_steps": None,
        "steps_per_execution": 10,
    }
    renamed = copy.deepcopy(CONFIG)
    renamed["sweep"]["families"]["pruning"]["label"] = "cutting"
    assert [t.settings for t in expand(renamed)] == [t.settings for t in expand(CONFIG)]


def test_rules_of_baselines():
    by_id = {trial.id: trial.settings["rule"] for trial in expand(CONFIG)}
    bare = {"where": None, "compressor": "MagnitudePruning", "sparsity": 0.9}
    pruning = {kind: by_id[f"pruning:90 %:{kind}:cosine:0"] for kind in ("held_pruning",)}
    assert pruning["held_pruning"] == {
        **bare,
        "every": 5,
        "end": 500,
        "ramp": {"initial": 0.0},
        "hold": True,
    }
    assert by_id["pruning:90 %:post_training:cosine:0"] == {**bare, "action": "AtEnd"}
    assert by_id["pruning:90 %:straight_through:cosine:0"] == {
        **bare,
        "action": "StraightThrough",
        "every": 1,
    }


@pytest.mark.parametrize("action", ["Proximal", "StraightThrough"])
def test_other_actions_have_no_baselines(action):
    families = {"x": {"label": "x", "rule": {"action": action}, "budgets": [{"label": "a"}]}}
    kinds = {trial.kind for trial in expand(changed(families=families))}
    assert kinds == {"dense", "every"}


def test_trials_that_start_from_a_trained_network():
    fresh, further = expand(CONFIG), expand(changed(init="pretrained"))
    assert "dense_longer:cosine:0" not in {trial.id for trial in fresh}
    by_id = {trial.id: trial for trial in further}
    longer, dense = by_id["dense_longer:cosine:0"], by_id["dense:cosine:0"]
    assert (dense.settings["steps"], longer.settings["steps"]) == (500, 1000)
    assert not dense.needs_dense
    assert all(trial.needs_dense for trial in further if trial.kind != "dense")
    assert {trial.kind for trial in fresh if trial.needs_dense} == {"post_training"}
