"""Configurations: validation, durations, and the recipe that rules describe."""

import json

import keras
import pytest
from ml_collections import ConfigDict

from keras_compaware import (
    AtEnd,
    Every,
    GroupLasso,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    Penalty,
    Proximal,
    Ramp,
    Recipe,
    Rule,
    Skip,
    StraightThrough,
    StrengthController,
    UniformQuantization,
    models,
)
from keras_compaware.cli.config import (
    DEFAULTS,
    dense_config,
    fingerprint,
    optimizer_of,
    recipe_of,
    resolve,
    source_of,
    steps_of,
)
from keras_compaware.cli.program import UserError
from keras_compaware.cli.shrinking import check, settings_of


def recipe(**rules):
    return recipe_of({"rules": rules, "channels": {}}, steps_per_epoch=10, total_steps=200)


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# Values


def test_what_is_left_out_has_its_default():
    assert resolve(ConfigDict()) == DEFAULTS
    resolved = resolve({"optimizer": {"learning_rate": 1}, "epochs": 3})
    assert resolved["optimizer"] == {**DEFAULTS["optimizer"], "learning_rate": 1.0}
    assert isinstance(resolved["optimizer"]["learning_rate"], float)
    assert resolved["epochs"] == 3


def test_resolving_does_not_change_the_defaults():
    resolve({})["data"]["name"] = "mnist"
    assert resolve({})["data"]["name"] == "digits"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"epohcs": 3}, "unknown key 'config.epohcs'. Did you mean 'config.epochs'?"),
        (
            {"data": {"nmae": "x"}},
            "unknown key 'config.data.nmae'. Did you mean 'config.data.name'?",
        ),
        ({"xyz": 3}, "unknown key 'config.xyz'. Known: data, model,"),
        ({"epochs": 2.5}, "config.epochs must be of type int, like its default 10. Received: 2.5"),
        ({"epochs": True}, "config.epochs must be of type int"),
        ({"epochs": None}, "config.epochs must be of type int"),
        ({"epochs": 0}, "config.epochs must be at least 1. Received: 0"),
        ({"batch_size": -4}, "config.batch_size must be at least 1. Received: -4"),
        ({"seed": -1}, "config.seed must be from 0 to 4294967295. Received: -1"),
        ({"recalibrate_steps": -1}, "config.recalibrate_steps must be at least 0"),
        ({"model": 3}, "config.model must be of type str"),
        ({"rules": []}, "config.rules must be a dictionary. Received: []"),
        ({"model_args": 5}, "config.model_args must be a dictionary. Received: 5"),
        ({"data": {"augment": "crop"}}, "config.data.augment: unknown augmentation 'crop'"),
        ({"data": {"augment": "flip_corp"}}, "Did you mean 'flip_crop'?"),
        ({"data": {"augment": None}}, "config.data.augment must be of type str"),
        ({"data": "mnist"}, "config.data must be a dictionary with keys of ['name',"),
        ({"optimizer": {"learning_rate": "x"}}, "config.optimizer.learning_rate must be of type"),
        ({"optimizer": {"learning_rate": 0.0}}, "config.optimizer.learning_rate must be positive"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate must be positive"),
        ({"optimizer": {"weight_decay": -1.0}}, "config.optimizer.weight_decay must be at least 0"),
        ({"rules": {"a": {"where": keras.layers.Dense}}}, "must hold numbers, text, booleans"),
        ({"model_args": {"dropout": float("inf")}}, "must hold numbers, text, booleans"),
        (None, "must be a ml_collections.ConfigDict. Received: None"),
    ],
)
def test_wrong_values_are_refused(config, expected):
    assert expected in message(resolve, config)


def test_tuples_become_the_lists_that_config_json_holds():
    resolved = resolve({"model_args": {"units": (3, 4)}})
    assert resolved == json.loads(json.dumps(resolved))
    assert resolved["model_args"] == {"units": [3, 4]}


def test_rules_keep_the_order_in_which_they_are_written():
    config = ConfigDict()
    config.rules = ConfigDict(sort_keys=False)
    config.rules.z_first = ConfigDict({"where": "dense1", "action": "Skip"})
    config.rules.a_second = ConfigDict({"every": 5, "compressor": "LowRank", "rank": 4})
    for resolved in (resolve(config), json.loads(json.dumps(resolve(config)))):
        assert list(resolved["rules"]) == ["z_first", "a_second"]
        found = recipe_of(resolved, 10, 100)
        assert found == Recipe([Rule("dense1", Skip()), Rule(None, Every(5, LowRank(rank=4)))])


def test_rules_that_would_be_sorted_are_refused():
    config = ConfigDict({"rules": {"z": {"action": "Skip"}, "a": {"action": "Skip"}}})
    assert "ConfigDict(sort_keys=False)" in message(resolve, config)
    del config.rules.a
    assert list(resolve(config)["rules"]) == ["z"]


# Durations


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (7, 7),
        (0, 0),
        (None, None),
        ("7", 7),
        ("150 steps", 150),
        ("1 step", 1),
        ("2 epochs", 20),
        ("1 epoch", 10),
        ("1.25 epochs", 13),
        (".5epochs", 5),
        ("25%", 50),
        ("2.5 %", 5),
        ("0 epochs", 0),
    ],
)
def test_durations(duration, steps):
    assert steps_of(duration, steps_per_epoch=10, total_steps=200, name="every") == steps


@pytest.mark.parametrize(
    "duration", ["", "epochs", "two epochs", "1.2.3 epochs", "-1 epochs", "3 days", 2.5, True, [3]]
)
def test_bad_durations(duration):
    text = message(steps_of, duration, 10, 200, "config.rules.a.every")
    assert text.startswith("config.rules.a.every must be a number of optimizer steps, or text")
    assert text.endswith(f"Received: {duration!r}")


def test_a_duration_that_rounds_to_nothing():
    assert "less than one optimizer step" in message(steps_of, "0.01 epochs", 10, 200, "every")


# Rules


def test_rules_become_actions():
    found = recipe(
        skip={"where": "head", "action": "Skip", "reason": "small"},
        prune={
            "where": "conv",
            "every": "1 epoch",
            "begin": "10%",
            "end": "50%",
            "compressor": "MagnitudePruning",
            "sparsity": 0.9,
            "ramp": {"initial": 0.1, "begin": "2 epochs", "end": "40%"},
            "hold": True,
        },
        shrink={
            "where": "dense1",
            "action": "Proximal",
            "regularizer": "GroupLasso",
            "strength": 0.1,
            "controller": {"dead_groups": 0.5, "end": "25%"},
            "at_end": {"compressor": "UniformQuantization", "bits": 8},
        },
        penalty={
            "where": "dense2",
            "action": "Penalty",
            "regularizer": "GroupLasso",
            "strength": 0.1,
        },
        wrapped={
            "action": "StraightThrough",
            "compressor": "LowRank",
            "rank": 3,
            "every": 7,
            "alpha": {"initial": 1.0, "end": "50%", "power": 1},
        },
    )
    ramp = Ramp(initial=0.1, begin=20, end=80)
    half = StrengthController(dead_groups=0.5, end=50)
    steered = Proximal(GroupLasso(0.1), controller=half)
    assert found == Recipe(
        [
            Rule("head", Skip("small")),
            Rule("conv", Every(10, MagnitudePruning(0.9), begin=20, end=100, ramp=ramp, hold=True)),
            Rule("dense1", steered, AtEnd(UniformQuantization(8))),
            Rule("dense2", Penalty(GroupLasso(0.1))),
            Rule(None, StraightThrough(LowRank(rank=3), 7, Ramp(1.0, end=100, power=1))),
        ]
    )


def test_no_rules_are_no_recipe():
    assert recipe() is None


def test_rules_for_channels():
    channels = {
        "first": {
            "where": "conv",
            "every": "1 epoch",
            "compressor": "GroupPruning",
            "sparsity": 0.5,
        },
        "second": {"action": "Proximal", "regularizer": "GroupLasso", "strength": 0.1},
    }
    found = recipe_of({"rules": {}, "channels": channels}, steps_per_epoch=10, total_steps=200)
    rules = [
        Rule("conv", Every(10, GroupPruning(0.5))),
        Rule(None, Proximal(GroupLasso(0.1))),
    ]
    assert found == Recipe(channels=rules)
    channels["second"]["axis"] = "outputs"
    text = message(recipe_of, {"rules": {}, "channels": channels}, 10, 200)
    assert "groups along the outputs" in text
    text = message(recipe_of, {"rules": {}, "channels": {"a": {}}}, 10, 200)
    assert text.startswith("config.channels.a.compressor is missing")
    config = ConfigDict({"channels": {"z": {"action": "Skip"}, "a": {"action": "Skip"}}})
    assert "config.channels = ConfigDict(sort_keys=False)" in message(resolve, config)


RULE = {"every": 5, "compressor": "LowRank", "rank": 4}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({**RULE, "compressor": "LowRnak"}, "'LowRnak'. Did you mean 'LowRank'?"),
        ({**RULE, "compressor": ["LowRank"]}, "config.rules.a.compressor: unknown compressor"),
        ({**RULE, "action": "Evry"}, "action: unknown action 'Evry'. Did you mean 'Every'?"),
        ({**RULE, "rnak": 3}, "argument of LowRank 'config.rules.a.rnak'. Did you mean"),
        ({"every": 5, "rank": 4}, "config.rules.a.compressor is missing. Known: Binary"),
        ({"compressor": "LowRank", "rank": 4}, "config.rules.a.every is missing: the action Every"),
        ({"every": 5, "compressor": "MagnitudePruning"}, "config.rules.a.sparsity is missing"),
        ({**RULE, "ratio": 0.5}, "config.rules.a: LowRank: give exactly one of"),
        ({**RULE, "rank": "4"}, "config.rules.a: LowRank: `rank` must be an integer"),
        ({**RULE, "every": 0}, "config.rules.a: Every: `every` must be at least 1"),
        ({**RULE, "every": "often"}, "config.rules.a.every must be a number of optimizer steps"),
        ({**RULE, "where": 3}, "config.rules.a.where must be a regular expression, or None"),
        ({**RULE, "where": "(dense"}, "config.rules.a: "),
        ({**RULE, "ramp": "cubic"}, "config.rules.a.ramp must be a dictionary. Received: 'cubic'"),
        ({**RULE, "ramp": {"initial": 0.1}}, "does not know when the final value is reached"),
        ({**RULE, "ramp": {"end": 9}}, "config.rules.a.ramp.initial is missing: Ramp needs it"),
        ({**RULE, "hold": True}, "keeps the zeros of a compressor that selects entries"),
        ({**RULE, "ramp": {"inital": 0.1}}, "Did you mean 'config.rules.a.ramp.initial'?"),
        ({**RULE, "at_end": "UniformQuantization"}, "config.rules.a.at_end must be a dictionary"),
        ({**RULE, "at_end": {}}, "config.rules.a.at_end.compressor is missing"),
        ({**RULE, "at_end": {"compressor": "UniformQuantization", "bit": 8}}, "a.at_end.bits'?"),
        (
            {"every": 5, "regularizer": "GroupLasso", "strength": 0.1},
            "the action Every takes a `compressor`, not a `regularizer`. Actions that take a "
            "`regularizer`: Proximal, Penalty",
        ),
        (
            {"action": "Proximal", "compressor": "LowRank", "rank": 4},
            "Actions that take a `compressor`: Every, StraightThrough, AtEnd",
        ),
        ({"action": "Penalty", "regularizer": "GroupLaso"}, "Did you mean 'GroupLasso'?"),
        ({"action": "Skip", "every": 5}, "unknown key 'config.rules.a.every'. Known: reason"),
        (["LowRank"], "config.rules.a must be a dictionary. Received: ['LowRank']"),
    ],
)  # fmt: skip
def test_wrong_rules_are_refused(rule, expected):
    assert expected in message(recipe, a=rule)


# Optimizers, dense twins


def test_optimizers():
    settings = {"name": "sgd", "learning_rate": 0.5, "schedule": "constant", "weight_decay": 0.0}
    optimizer = optimizer_of({"optimizer": settings}, total_steps=100)
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert float(optimizer.learning_rate) == 0.5
    settings = {"name": "adamw", "learning_rate": 0.5, "schedule": "cosine", "weight_decay": 0.1}
    optimizer = optimizer_of({"optimizer": settings}, total_steps=100)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert optimizer.weight_decay == 0.1
    assert float(optimizer.learning_rate) == 0.5
    optimizer.iterations.assign(50)
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("total_steps", "rates"),
    [
        (8, [0.5] * 4 + [0.05] * 2 + [0.005] * 2),
        # Half of seven steps are 3.5, three quarters 5.25: the step that is under way is finished.
        (7, [0.5] * 4 + [0.05] * 2 + [0.005]),
        (2, [0.5, 0.05]),
        (1, [0.5]),
    ],
)
def test_the_learning_rate_falls_in_steps(total_steps, rates):
    settings = {"name": "sgd", "learning_rate": 0.5, "schedule": "steps", "weight_decay": 1e-4}
    optimizer = optimizer_of({"optimizer": settings}, total_steps)
    assert optimizer.weight_decay == 1e-4
    found = []
    for step in range(total_steps):
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", "admw", "config.optimizer.name: unknown optimizer 'admw'. Did you mean 'adamw'?"),
        ("name", "lossscaleoptimizer", "unknown optimizer"),
        ("schedule", "cosin", "unknown schedule 'cosin'. Did you mean 'cosine'? Known: constant,"),
    ],
)
def test_unknown_optimizers(key, value, expected):
    config = {"optimizer": {**DEFAULTS["optimizer"], key: value}}
    assert expected in message(optimizer_of, config, total_steps=100)


def test_settings_for_shrinking():
    assert settings_of(resolve({})) is None
    config = resolve({"shrink": {"budget": {"macs": (0.5, 0.25)}, "score": "taylor"}})
    settings = settings_of(config)
    assert (settings["kind"], settings["shares"]) == ("macs", [0.5, 0.25])
    assert settings["learning_rate"] == pytest.approx(1e-4)  # a tenth of the optimizer's
    assert settings_of(resolve({"shrink": {"budget": {"params": 0.5}}}))["shares"] == [0.5]


@pytest.mark.parametrize(
    ("shrink", "expected"),
    [
        ({"bugdet": {"macs": 0.5}}, "Did you mean 'config.shrink.budget'?"),
        ({"score": "l2"}, "config.shrink.budget must be a dictionary with one of the keys"),
        ({"budget": {"flops": 0.5}}, "'channels', 'macs', 'params'"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "with one of the keys"),
        ({"budget": {"macs": 0}}, "config.shrink.budget.macs must be a share in (0, 1]"),
        ({"budget": {"macs": "half"}}, "or a list of them. Received: 'half'"),
        ({"budget": {"macs": []}}, "Received: []"),
        ({"budget": {"macs": (0.2, 0.5)}}, "must decrease from cycle to cycle"),
        ({"budget": {"macs": 0.5}, "epochs": -1}, "config.shrink.epochs must be an integer"),
        ({"budget": {"macs": 0.5}, "learning_rate": 0}, "must be positive or None. Received: 0"),
        ({"budget": {"macs": 0.5}, "score": "l3"}, "config.shrink.score"),
    ],
)
def test_wrong_settings_for_shrinking_are_refused(shrink, expected):
    assert expected in message(settings_of, resolve({"shrink": shrink}))


def test_a_budget_that_cannot_be_met_is_refused():
    settings = settings_of(resolve({"shrink": {"budget": {"macs": 0.1}, "max_ratio": 0.1}}))
    model = models.build("lenet_300_100", (8, 8, 1), 10)
    assert message(check, model, settings).startswith("config.shrink: ")


def test_the_dense_twin_differs_by_its_rules_only():
    config = resolve({"rules": {"a": {"action": "Skip"}}, "seed": 3})
    assert dense_config(config) == resolve({"seed": 3})
    assert config["rules"]


def test_fingerprints():
    one = fingerprint(resolve({"seed": 1}), {"backend": "jax"})
    assert one == fingerprint(resolve({"seed": 1}), {"backend": "jax"})
    assert one != fingerprint(resolve({"seed": 2}), {"backend": "jax"})
    augmented = resolve({"seed": 1, "data": {"augment": "flip_crop"}})
    assert one != fingerprint(augmented, {"backend": "jax"})
    assert one != fingerprint(resolve({"seed": 1}), {"backend": "torch"})


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_the_source_of_a_file_is_its_content(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"1")
    one = source_of(str(file))
    file.write_bytes(b"2")
    assert source_of(str(file)) != one


def test_the_source_of_a_function_is_its_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model_of_a_test.py").write_text("def build(): return helper()\n")
    one = source_of("model_of_a_test:build")
    (tmp_path / "model_of_a_test.py").write_text("def build(): return helper()  # changed\n")
    assert source_of("model_of_a_test:build") != one
    assert source_of("lenet_5") == source_of("") == ""
