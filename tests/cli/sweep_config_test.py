"""Configurations of sweeps: what is refused, before anything runs, and what is left out."""

import copy
import pathlib

import pytest
from ml_collections import ConfigDict

from keras_compaware import models
from keras_compaware.cli import config_flag
from keras_compaware.cli.config import recipe_of
from keras_compaware.cli.program import UserError
from keras_compaware.cli.sweep_config import DEFAULTS, check, recipe_config, resolve
from keras_compaware.search import expand

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.py"))
GIVEN = {
    "data": {"name": "digits"},
    "model": "lenet_300_100",
    "model_args": {"units": [16, 8]},
    "epochs": 7,
    "sweep": {
        "families": {
            "pruning": {
                "rule": {"compressor": "MagnitudePruning"},
                "budgets": [{"label": "90 %", "sparsity": 0.9}],
            }
        },
        "every": (1, 10),
    },
}


def given(path="", value=None):
    """The configuration above with another value somewhere, such as "sweep.every"."""
    config = copy.deepcopy(GIVEN)
    *folders, key = path.split(".") if path else [None]
    place = config
    for name in folders:
        place = place[name]
    if key is not None:
        place[key] = value
    return config


def test_what_is_left_out_has_its_default():
    config = resolve(given())
    assert set(config["sweep"]) == set(DEFAULTS)
    assert config["sweep"]["every"] == [1, 10]
    assert config["sweep"]["steps"] == 20_000
    assert config["sweep"]["families"]["pruning"]["label"] == "pruning"
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert not {"epochs", "seed", "rules"} & set(config)
    assert resolve(config) == resolve(ConfigDict(config)) == config


FAMILY = "sweep.families.pruning"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sweep", None, "expected the configuration of a sweep"),
        ("sweep.evry", [1], "unknown key 'config.sweep.evry'. Did you mean 'config.sweep.every'?"),
        ("modl", "a", "unknown key 'config.modl'. Did you mean 'config.model'?"),
        ("rules", {"a": {}}, "config.rules must be left out in a sweep"),
        ("shrink", {"budget": {}}, "config.shrink must be left out in a sweep"),
        ("sweep.every", [], "config.sweep.every must be a list, not an empty one. Received: []"),
        ("sweep.every", 10, "config.sweep.every must be a list"),
        ("sweep.every", [1, 1], "config.sweep.every must not repeat an element"),
        ("sweep.every", [0], "every element of config.sweep.every must be an integer of at least"),
        ("sweep.every", [True], "must be an integer of at least 1. Received: True"),
        ("sweep.seeds", [-1], "config.sweep.seeds must be an integer from 0 to 4294967295"),
        ("sweep.steps", "all", "config.sweep.steps must be an integer of at least 1"),
        ("sweep.init", "frsh", "config.sweep.init must be one of fresh, pretrained"),
        ("sweep.baselines", ["dens"], "unknown baseline 'dens'"),
        ("sweep.baselines", "held_pruning", "config.sweep.baselines must be a list"),
        ("sweep.families", {}, "config.sweep.families must be a dictionary with at least one"),
        ("sweep.families", {"a:b": {}}, "a name must consist of letters, digits"),
        ("sweep.families", {"a": 3}, "config.sweep.families.a must be a dictionary"),
        ("sweep.schedules", {}, "config.sweep.schedules must be a dictionary with at least one"),
        (
            "sweep.schedules",
            {"fast": {"schedule": "cosin"}},
            "config.sweep.schedules.fast: config.optimizer.schedule: unknown schedule 'cosin'",
        ),
        (
            "sweep.schedules",
            {"fast": {"learning_rat": 0.1}},
            "config.sweep.schedules.fast: unknown key 'config.optimizer.learning_rat'",
        ),
        (f"{FAMILY}.ruel", {}, f"unknown key 'config.{FAMILY}.ruel'. Did you mean"),
        (f"{FAMILY}.label", 3, f"config.{FAMILY}.label must be text. Received: 3"),
        (f"{FAMILY}.rule", None, f"config.{FAMILY}.rule must be a dictionary as in config.rules"),
        (f"{FAMILY}.rule.every", 10, "without `every`, which is config.sweep.every"),
        (f"{FAMILY}.budgets", [], f"config.{FAMILY}.budgets must be a list, not an empty one"),
        (f"{FAMILY}.budgets", [{"sparsity": 0.5}], "must be a dictionary with a `label`"),
        (f"{FAMILY}.budgets", [{"label": "a:b"}], "text without colons"),
        (
            f"{FAMILY}.budgets",
            [{"label": "a", "sparsity": 0.5}, {"label": "a", "sparsity": 0.6}],
            f"the labels of config.{FAMILY}.budgets must not repeat an element",
        ),
        (f"{FAMILY}.rule.where", object(), "config.sweep must hold numbers, text, booleans"),
        ("data.validation", 0.0, "config.data.validation must be positive in a sweep"),
    ],
)
def test_what_is_refused(path, value, message):
    with pytest.raises(UserError) as error:
        resolve(given(path, value))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def model():
    return models.build("lenet_300_100", (8, 8, 1), 10, units=(16, 8))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{FAMILY}.rule.compressor", "MagnitudePrunin", "unknown compressor 'MagnitudePrunin'"),
        (f"{FAMILY}.rule.sparsty", 0.5, "unknown argument of MagnitudePruning"),
        (f"{FAMILY}.budgets", [{"label": "90 %", "sparsity": 9}], "`sparsity` must be in [0, 1]"),
        (f"{FAMILY}.rule.where", "conv", "conv"),
    ],
)
def test_rules_that_do_not_fit(model, path, value, message):
    with pytest.raises(UserError) as error:
        check(resolve(given(path, value)), model)
    assert str(error.value).startswith("config.sweep.families.pruning, 90 %: ")
    assert message in str(error.value)


def test_noise_has_the_seed_of_its_trial():
    config = resolve(given(f"{FAMILY}.rule", {"compressor": "WeightNoise", "stddev": 0.1}))
    config["sweep"]["families"]["pruning"]["budgets"] = [{"label": "a"}, {"label": "b", "seed": 9}]
    seeds = {
        (trial.budget, trial.seed): recipe_of(recipe_config(trial), 1, 1).rules[0].actions[0]
        for trial in expand(config)
        if trial.kind == "every"
    }
    assert {key: action.constraint.seed for key, action in seeds.items()} == {
        **{("a", seed): seed for seed in (0, 1, 2)},
        **{("b", seed): 9 for seed in (0, 1, 2)},
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_of_this_project(file):
    config = resolve(config_flag.load(str(file)))
    shape = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1)}[config["data"]["name"]]
    model = models.build(config["model"], shape, 10, **config["model_args"])
    trials = check(config, model)
    assert {trial.kind for trial in trials} == {
        *("dense", "every", "post_training", "straight_through", "held_pruning")
    }
    assert config["sweep"]["steps"] >= 20 * max(config["sweep"]["every"])
