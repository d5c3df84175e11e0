"""Budgets over channels and ranks together, against what the smaller models really cost."""

import dataclasses
import itertools
import json
import os

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from keras_compaware import measure
from keras_compaware.search import budget
from keras_compaware.search.groups import CHANNELS, Groups
from keras_compaware.search.sensitivities import Sensitivity
from tests.coupling import networks
from tests.coupling.helpers import inputs_of, outputs_of, randomise
from tests.marks import slow_on_jax

BACKEND = keras.backend.backend()
MEASURES = {"params": measure.parameters, "macs": measure.macs}
# On JAX every operation is compiled anew for every shape, which is most of what these tests cost.


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="a"),
            layers.Conv2D(24, 3, strides=2, padding="same", activation="relu", name="b"),
            layers.Conv2D(24, 3, padding="same", activation="relu", name="c"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(20, "relu", name="d"),
            layers.Dense(4, name="head"),
        ]
    )


def all_groups(model, **options):
    defaults = {"score": "l2", "channels": True, "ranks": True, "round_to": 1, "exclude": None}
    return Groups(model, **defaults | {"allow_inexact": False} | options)


@slow_on_jax
@pytest.mark.parametrize(
    "make", [networks.residual, networks.concatenation, networks.depthwise, convolutional]
)
def test_the_joint_cost_is_what_the_smaller_model_costs(make):
    model = randomise(make())
    groups = all_groups(model)
    random = np.random.default_rng(0)
    amounts = [int(random.choice(group.amounts)) for group in groups.all]
    found = budget._allocation(
        model, groups, [np.zeros(len(g.amounts)) for g in groups.all], amounts, {}, False
    )
    small = found.apply(model).model
    for kind, of in MEASURES.items():
        cost = groups.cost(model, kind)
        assert cost.total == of(model)
        changes = 0
        for place, amount in enumerate(amounts):
            before, change = cost.total, cost.change(place, amount)
            assert cost.total == before
            cost.set(place, amount)
            changes += change
        assert cost.total == of(model) + changes == found.costs[kind][1] == of(small)


def test_the_factors_of_a_kernel_that_is_cut_as_well():
    model = keras.Sequential(
        [keras.Input((30,)), layers.Dense(20, name="a"), layers.Dense(20, name="b")]
    )
    groups = all_groups(model)
    cost = groups.cost(model, "macs")
    kinds = {(group.kind, group.name): place for place, group in enumerate(groups.all)}
    assert set(kinds) == {("channels", "a"), ("rank", "a/kernel")}
    cost.set(kinds["rank", "a/kernel"], 5)
    assert cost.total == 5 * (30 + 20) + 400
    cost.set(kinds["channels", "a"], 10)
    assert cost.total == 5 * (30 + 10) + 200
    cost.set(kinds["channels", "a"], 6)  # 30 * 6 entries are as few as their factors have
    assert cost.total == 30 * 6 + 120


@slow_on_jax
@pytest.mark.parametrize("solver", ["greedy", "uniform"])
@pytest.mark.parametrize("kind", MEASURES)
def test_budgets_are_met(kind, solver):
    model = randomise(convolutional())
    x = inputs_of(model)
    measured = kc.sensitivity(model, [x], round_to=4, steps=3)
    found = kc.fit_budget(model, None, {kind: 0.5}, measured=measured, solver=solver, round_to=4)
    small = found.apply(model).model
    share = MEASURES[kind](small) / MEASURES[kind](model)
    assert share <= 0.5
    assert share > (0.45 if solver == "greedy" else 0.35)
    assert all(len(kept) % 4 == 0 for kept in found.keep.values())
    assert all(rank % 4 == 0 for rank in found.ranks.values())
    before = [np.array(y) for y in outputs_of(model, x)]
    assert outputs_of(small, x)[0].shape == before[0].shape
    np.testing.assert_array_equal(outputs_of(model, x)[0], before[0])
    again = kc.Allocation.from_json(json.loads(json.dumps(found.to_json())))
    assert str(again) == str(found)
    for a, b in zip(outputs_of(again.apply(model).model, x), outputs_of(small, x), strict=True):
        np.testing.assert_array_equal(a, b)


class Additive:
    """A cost without products."""

    def __init__(self, prices, amounts):
        self.prices, self.amounts = prices, list(amounts)

    @property
    def total(self):
        return sum(p * n for p, n in zip(self.prices, self.amounts, strict=True))

    def change(self, place, amount):
        return self.prices[place] * (amount - self.amounts[place])

    def set(self, place, amount):
        self.amounts[place] = amount

    def neighbours(self, place):
        return [place]


def test_greedy_is_near_the_optimum_and_meets_every_limit():
    random = np.random.default_rng(0)
    excess = []
    for _ in range(30):
        groups = [budget.Group(CHANNELS, g, f"g{g}", np.arange(1, 8)) for g in range(4)]
        losses = [np.append(np.sort(random.exponential(size=6))[::-1], 0.0) for _ in groups]
        prices = random.integers(1, 6, 4).tolist()
        limit = 0.6 * 7 * sum(prices)
        found = budget.greedy(groups, losses, Additive(prices, [7] * 4), limit)
        assert Additive(prices, found).total <= limit

        def loss(amounts, losses=losses):
            return sum(lost[n - 1] for lost, n in zip(losses, amounts, strict=True))

        best = min(
            loss(amounts)
            for amounts in itertools.product(range(1, 8), repeat=4)
            if Additive(prices, amounts).total <= limit
        )
        excess.append(loss(found) / best - 1)
    assert min(excess) >= -1e-9
    assert np.mean(excess) < 0.1


def test_greedy_spends_where_it_hurts_least():
    model = randomise(convolutional())
    channels = {
        "a": {4: 0.0, 8: 0.0},
        "b": {6: 1.0, 12: 0.5},
        "c": {6: 1.0, 12: 0.5},
        "d": {5: 1.0, 10: 0.5},
    }
    measured = Sensitivity("given", 0.0, channels, {})
    options = {"measured": measured, "ranks": False}
    assert set(kc.fit_budget(model, None, {"params": 0.9}, **options).keep) == {"a"}
    harder = kc.fit_budget(model, None, {"params": 0.5}, **options)
    assert len(harder.keep["a"]) == 1
    assert len(harder.keep) > 1


def test_greedy_goes_on_beyond_a_plateau():
    groups = [budget.Group(CHANNELS, g, f"g{g}", np.arange(1, 11)) for g in range(2)]
    losses = [np.array([1.0] * 5 + [0.9, 0.6, 0.3, 0.1, 0.0]), np.arange(9.0, -1, -1)]
    cost = Additive([10, 1], [10, 10])
    assert budget.greedy(groups, losses, cost, 90)[0] == 8  # not 1, the end of the hull


def test_a_solver_of_the_users_own():
    model = randomise(convolutional())

    def halves(groups, losses, cost, limit):
        assert limit == pytest.approx(0.5 * cost.total)
        return [int(group.amounts[len(group.amounts) // 2]) for group in groups]

    found = kc.fit_budget(model, None, {"macs": 0.5}, solver=halves, ranks=False)
    assert {name: len(kept) for name, kept in found.keep.items()} == {
        "a": 9, "b": 13, "c": 13, "d": 11,
    }  # fmt: skip


@slow_on_jax
def test_the_recipe_leads_to_the_same_sizes():
    model = randomise(convolutional())
    measured = kc.sensitivity(model)
    free = {"c/kernel": {4: 0.0}}
    measured = dataclasses.replace(measured, ranks=dict(measured.ranks) | free)
    found = kc.fit_budget(model, None, {"params": 0.3}, measured=measured, round_to=4)
    assert found.keep
    assert found.ranks
    recipe = found.recipe()
    assert recipe.plan(model).assignments
    small = kc.compact(kc.compress(model, recipe)).model
    applied = found.apply(model).model
    assert measure.parameters(small) == measure.parameters(applied)
    every = found.recipe(lambda compressor: kc.Every(200, compressor))
    assert "Every(every=200" in str(every.plan(model))


def test_text():
    found = kc.Allocation(
        {"a": [0, 2]}, {"b/kernel": 3}, {"macs": 0.5}, {"macs": (1000, 480)},
        {"a": 4, "b/kernel": (8, 6)}, {"a": 0.25},
    )  # fmt: skip
    assert str(found).splitlines()[2:] == [
        "a         channels  4 -> 2      +0.25",
        "b/kernel  rank      8 x 6 -> 3  ",
        "MACs: 1,000 -> 480 (48.0%)",
    ]


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", ["bytes", pytest.param("latency_ms", marks=pytest.mark.slow)])
def test_measured_budgets(kind, tmp_path, monkeypatch):
    model = randomise(convolutional())
    if kind == "latency_ms":  # a clock that counts bytes, or the test would depend on the machine

        def latency(paths):
            sizes = {path: os.path.getsize(path) for path in paths}
            return {p: kc.export.Latency(size, size, size, 1) for p, size in sizes.items()}

        monkeypatch.setattr(kc.export, "latency", latency)
    kc.export.to_litert(model, tmp_path / "whole.tflite")
    whole = (tmp_path / "whole.tflite").stat().st_size
    found = kc.fit_budget(model, None, {kind: 0.6 * whole})
    kc.export.to_litert(found.apply(model).model, tmp_path / "small.tflite")
    assert 0.5 * whole < (tmp_path / "small.tflite").stat().st_size <= 0.6 * whole
    with pytest.raises(ValueError, match="were not reached"):
        kc.fit_budget(model, None, {kind: 100})


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (0.5, {}, TypeError, "mapping with one entry"),
        ({"macs": 0.5, "params": 0.5}, {}, ValueError, "exactly one of the keys"),
        ({"flops": 0.5}, {}, ValueError, "exactly one of the keys"),
        ({"macs": 0.0}, {}, ValueError, "target"),
        ({"macs": 1.5}, {}, ValueError, "target"),
        ({"macs": 0.5}, {"solver": "best"}, ValueError, "solver"),
        ({"macs": 0.5}, {"round_to": 0}, ValueError, "round_to"),
        ({"macs": 0.5}, {"exclude": "nothing"}, ValueError, "matches no channel space or kernel"),
        ({"macs": 0.001}, {}, ValueError, "cannot be met: at least"),
        ({"macs": 0.5}, {"channels": False, "ranks": False}, ValueError, "cannot be met"),
        ({"macs": 0.5}, {"loss": "mse"}, ValueError, "needs `data`"),
        (
            {"macs": 0.5},
            {"measured": Sensitivity("", 0.0, {}, {}), "steps": 3},
            TypeError,
            "given by `measured`",
        ),
        ({"macs": 0.5}, {"measured": Sensitivity("", 0.0, {}, {})}, ValueError, "was not measured"),
    ],
)
def test_bad_arguments(target, options, error, message):
    model = convolutional()
    before = [np.array(w) for w in model.get_weights()]
    with pytest.raises(error, match=message):
        kc.fit_budget(model, None, target, **options)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
