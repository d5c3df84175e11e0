"""The choice of ranks: budgets are met and measured, the choice is the best there is."""

import itertools
import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from keras_compaware import measure
from keras_compaware.models import resnet_20
from keras_compaware.scores import choose_ranks, cost_of_ranks
from tests.marks import slow_on_jax

BACKEND = keras.backend.backend()
MEASURES = {"params": measure.parameters, "macs": measure.macs}


def fill(model, decay=1.0, seed=0):
    """Kernels of full rank, whose singular values fall like powers of their number."""
    random = np.random.default_rng(seed)
    for target in kc.find_targets(model)[0]:
        shape = target.shape
        w = random.normal(size=(int(np.prod(shape[:-1])), shape[-1]))
        left, values, right = np.linalg.svd(w, full_matrices=False)
        values = (1.0 + np.arange(len(values))) ** -decay
        target.variables[0].assign((left * values @ right).reshape(shape))
    return model


def dense(*sizes, inputs=12):
    hidden = [layers.Dense(n, name=name) for n, name in zip(sizes, "abcdef", strict=False)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(3, name="head")])


def convolutional(padding="same"):
    inputs = keras.Input((13, 11, 3))
    x = layers.Conv2D(16, 3, padding=padding, name="stem")(inputs)
    x = layers.Conv2D(24, (3, 5), strides=2, padding=padding, activation="relu", name="wide")(x)
    x = layers.Conv2D(24, 3, padding="same", groups=2, name="grouped")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Conv2D(20, 1, strides=2, use_bias=False, name="point")(x)
    shared = layers.Conv2D(20, 3, padding="same", dilation_rate=2, name="shared")
    x = layers.Flatten()(shared(shared(x)))
    return keras.Model(inputs, layers.Dense(5, name="head")(x))


def one_dimensional():
    inputs = keras.Input((12, 8))
    x = layers.Conv1D(16, 5, strides=2, padding="causal", name="steps")(inputs)
    x = layers.Dense(16, name="each")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


def factorised(model, ranks):
    rules = [kc.Rule(f"^{re.escape(name)}$", kc.AtEnd(c)) for name, c in ranks.items()]
    return kc.compact(kc.compress(model, kc.Recipe(rules))).model


def numbers(ranks):
    return {name: compressor.rank for name, compressor in ranks.items()}


def shares(model, name):
    """The relative energies of the ranks 0, 1, ... of a kernel's channel matrix."""
    target = next(t for t in kc.find_targets(model)[0] if t.name == name)
    w = keras.ops.convert_to_numpy(target.read()).astype("float64")
    values = np.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False) ** 2
    return np.append(0.0, np.cumsum(values)) / values.sum()


# ---- costs ------------------------------------------------------------------------------------


def check_measured(model, kind, fraction, **options):
    ranks = choose_ranks(model, {kind: fraction}, **options)
    small = factorised(model, ranks)
    for other, measured in MEASURES.items():
        assert cost_of_ranks(model, ranks, other) == measured(small) < measured(model)
    assert MEASURES[kind](small) <= fraction * MEASURES[kind](model)
    assert MEASURES[kind](small) > 0.8 * fraction * MEASURES[kind](model)
    split = {layer.name for layer in small.layers if isinstance(layer, keras.Sequential)}
    assert split == {name.removesuffix("/kernel") for name in ranks}
    return ranks


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_what_is_predicted_is_measured_on_dense_layers(kind):
    check_measured(fill(dense(24, 40, 32)), kind, 0.5)


@slow_on_jax
@pytest.mark.parametrize("split", ["channel", "spatial"])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_what_is_predicted_is_measured_on_convolutions(padding, kind, split):
    ranks = check_measured(fill(convolutional(padding)), kind, 0.6, split=split)
    assert {compressor.split for compressor in ranks.values()} == {split}
    assert {"wide/kernel", "shared/kernel"} <= set(ranks)
    assert "depthwise/kernel" not in ranks


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_what_is_predicted_is_measured_on_sequences(kind):
    assert "steps/kernel" in check_measured(fill(one_dimensional()), kind, 0.6)


@slow_on_jax
@pytest.mark.parametrize(("kind", "split"), [("params", "channel"), ("macs", "spatial")])
def test_what_is_predicted_is_measured_on_a_residual_network(kind, split):
    ranks = check_measured(resnet_20((32, 32, 3), 10), kind, 0.5, split=split)
    assert len(ranks) >= 5


def test_ranks_that_save_no_macs_are_not_chosen():
    """A window of 1 x 3 and a stride of 4: the first layer runs at four times as many positions."""
    model = keras.Sequential(
        [
            keras.Input((3, 64, 8)),
            layers.Conv2D(8, 3, strides=(1, 4), padding="same", name="a"),
            layers.Conv2D(2, 1, name="head"),
        ]
    )
    fill(model)
    # At each position of the output: r (4 * 3 * 8 + 3 * 8) < 9 * 64 MACs, where r (24 + 24) < 576
    # parameters would allow 11.
    ranks = choose_ranks(model, {"params": 0.9}, split="spatial", where="^a")
    assert ranks == {"a/kernel": kc.LowRank(rank=4, split="spatial")}
    assert measure.macs(factorised(model, ranks)) == measure.macs(model) - 48 * (576 - 4 * 120)
    assert cost_of_ranks(model, {"a/kernel": kc.LowRank(rank=5, split="spatial")}, "params") == (
        measure.parameters(model)
    )


def test_the_model_is_left_as_it_is():
    model = fill(dense(8, 6))
    config, weights = model.get_config(), model.get_weights()
    kc.choose_ranks(model, {"macs": 0.8})
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


# ---- what is chosen ---------------------------------------------------------------------------


def best_choice(model, kind, fraction):
    """The largest sum of energies over all choices of ranks within the budget, by trial."""
    hidden = [layer for layer in model.layers if layer.name != "head"]
    total = MEASURES[kind](model)
    options = []
    for layer in hidden:
        rows, columns = layer.kernel.shape
        energy = shares(model, f"{layer.name}/kernel")
        ranks = range(1, -(-rows * columns // (rows + columns)))
        of_layer = [(rows * columns - r * (rows + columns), energy[r]) for r in ranks]
        options.append([*of_layer, (0, 1.0)])
    return max(
        sum(energy for _, energy in choice)
        for choice in itertools.product(*options)
        if total - sum(saved for saved, _ in choice) <= fraction * total
    )


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_as_good_as_trying_all(decay, seed):
    """But for the last step, which may be a kernel that would have stayed whole."""
    model = fill(dense(10, 14, 8, inputs=9), decay, seed)
    names = ("a/kernel", "b/kernel", "c/kernel")
    for fraction in (0.5, 0.7, 0.9):
        ranks = numbers(choose_ranks(model, {"macs": fraction}))
        found = sum(shares(model, n)[ranks[n]] if n in ranks else 1.0 for n in names)
        best = best_choice(model, "macs", fraction)
        rest = max(1 - shares(model, n)[rank] for n, rank in ranks.items())
        assert best - rest - 1e-6 <= found <= best + 1e-6
        assert found > 0.93 * best


def test_energies_are_relative_and_steep_kernels_lose_first():
    model = dense(16, 16, 16, inputs=16)
    for name, decay, size in (("a", 0.0, 1.0), ("b", 2.0, 1e-3), ("c", 2.0, 1e3)):
        basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
        values = size * (1.0 + np.arange(16)) ** -decay
        model.get_layer(name).kernel.assign(basis * values @ basis.T)
    ranks = numbers(choose_ranks(model, {"params": 0.6}))
    assert "a/kernel" not in ranks  # of a flat spectrum every rank is worth as much: it stays whole
    assert abs(ranks["b/kernel"] - ranks["c/kernel"]) <= 1  # one for the last of the budget


def test_a_budget_of_one_leaves_all_whole_but_what_has_low_rank_already():
    model = fill(dense(16, 16, inputs=16))
    assert choose_ranks(model, {"params": 1.0}) == {}
    random = np.random.default_rng(0)
    model.get_layer("a").kernel.assign(random.normal(size=(16, 2)) @ random.normal(size=(2, 16)))
    assert numbers(choose_ranks(model, {"params": 1.0})) == {"a/kernel": 2}
    model.get_layer("a").kernel.assign(np.zeros((16, 16)))
    assert numbers(choose_ranks(model, {"params": 1.0})) == {"a/kernel": 1}
    assert choose_ranks(dense(), {"params": 1.0}) == {}


def test_smaller_budgets_choose_smaller_ranks():
    model = fill(dense(24, 40, 32))
    before = {f"{name}/kernel": 99 for name in "abc"}
    for fraction in (0.9, 0.7, 0.5, 0.3):
        ranks = numbers(choose_ranks(model, {"params": fraction}))
        assert all(ranks.get(name, 99) <= rank for name, rank in before.items())
        before = {name: ranks.get(name, 99) for name in before}
        assert choose_ranks(model, {"params": fraction}) == choose_ranks(
            model, {"params": fraction}
        )


def test_multiples_floor_and_cap():
    model = fill(dense(48, 64, 8, inputs=48), decay=0.5)
    ranks = numbers(choose_ranks(model, {"params": 0.7}, round_to=8))
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks.values())
    assert "c/kernel" not in ranks  # 64 x 8 has no eight ranks that save
    ranks = numbers(choose_ranks(model, {"params": 0.6}, round_to=4, min_rank=9))
    assert min(ranks.values()) >= 12
    for cap in (1.0, 0.5):
        ranks = numbers(choose_ranks(model, {"params": 0.6}, max_ratio=cap))
        for name, rank in ranks.items():
            rows, columns = model.get_layer(name.removesuffix("/kernel")).kernel.shape
            assert rank * (rows + columns) <= cap * rows * columns


def test_where_and_exclude():
    model = fill(dense(24, 40, 32))
    every = {"a/kernel", "b/kernel", "c/kernel"}
    assert set(choose_ranks(model, {"params": 0.25})) == every
    assert set(choose_ranks(model, {"params": 0.6}, exclude="^a")) == every - {"a/kernel"}
    found = choose_ranks(model, {"params": 0.7}, where=model.get_layer("b"), exclude=["y|c", "^a"])
    assert set(found) == {"b/kernel"}
    wide = fill(keras.Sequential([keras.Input((20,)), layers.Dense(20, name="only")]))
    with pytest.raises(ValueError, match="cannot be met"):
        choose_ranks(wide, {"params": 0.5})  # it is the head
    assert set(choose_ranks(wide, {"params": 0.5}, where=layers.Dense)) == {"only/kernel"}


def test_kernels_that_are_not_of_one_layer_stay_whole():
    inputs = keras.Input((6, 12))
    x = layers.TimeDistributed(layers.Dense(12), name="steps")(inputs)
    x = layers.Dense(12, name="own")(x)
    x = layers.LSTM(8, name="recurrent")(x)
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(16, name="deep")], name="inner")
    model = fill(keras.Model(inputs, layers.Dense(2, name="head")(inner(x))))
    ranks = choose_ranks(model, {"params": 0.9})
    assert set(ranks) <= {"own/kernel", "inner/deep/kernel"}
    small = factorised(model, ranks)
    assert measure.parameters(small) == cost_of_ranks(model, ranks, "params")


def test_open_sizes_have_parameters_but_no_macs():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(16, 3, strides=2, name="a")(inputs)
    x = layers.Conv2D(16, 3, strides=2, name="b")(x)
    model = fill(keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x)))
    ranks = choose_ranks(model, {"params": 0.5}, split="spatial")
    assert measure.parameters(factorised(model, ranks)) == cost_of_ranks(model, ranks, "params")
    with pytest.raises(ValueError, match="undefined dimensions"):
        choose_ranks(model, {"macs": 0.5})


# ---- what is refused --------------------------------------------------------------------------

REFUSED = {
    "no mapping": ({"budget": 0.5}, TypeError, "choose_ranks: `budget` must be a mapping with one"),
    "channels": ({"budget": {"channels": 0.5}}, ValueError, r"one of the keys 'params', 'macs'"),
    "two": ({"budget": {"macs": 0.5, "params": 0.5}}, ValueError, "exactly one of the keys"),
    "zero": ({"budget": {"macs": 0.0}}, ValueError, r"`budget\['macs'\]` must be in \(0, 1\]"),
    "split": ({"split": "tucker"}, ValueError, "`split` must be one of 'channel', 'spatial'"),
    "round_to": ({"round_to": 0}, ValueError, "`round_to` must be at least 1"),
    "min_rank": ({"min_rank": 1.5}, TypeError, "`min_rank` must be an integer"),
    "max_ratio": ({"max_ratio": 0}, ValueError, r"`max_ratio` must be in \(0, 1\]"),
    "where": ({"where": "q"}, ValueError, r"`where` \('q'\) matches no kernel\. Those.*: a/kern"),
    "where of no kind": ({"where": 3}, TypeError, "choose_ranks: `where` must be a regular expr"),
    "no match": ({"exclude": "q"}, ValueError, "pattern 'q' of `exclude` matches no kernel"),
    "no pattern": ({"exclude": "("}, ValueError, "not a valid regular expression"),
    "too small": (
        {"budget": {"macs": 0.1}},
        ValueError,
        # (12 + 8) + (8 + 6) + 6 * 3 of 12 * 8 + 8 * 6 + 6 * 3
        r"0\.1 of the MACs cannot be met\. At least 0\.3210 \(52 of 162\) is left with round_to=1, "
        r"min_rank=1, max_ratio=1\.0 and split='channel'; kernels that may be factorised: 2\. R",
    ),
    "too small for the floor": (
        {"budget": {"params": 0.5}, "min_rank": 3},
        ValueError,
        r"0\.5 of the parameters cannot be met\. At least 0\.7654 \(137 of 179\) is left with",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        choose_ranks(dense(8, 6), **{"budget": {"macs": 0.8}, **arguments})


def test_other_refusals():
    class Net(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="has no static graph"):
        choose_ranks(Net(), {"macs": 0.5})
    model = dense(8, 6)
    with pytest.raises(TypeError, match="budget"):
        choose_ranks(model)
    model.get_layer("b").kernel.assign(np.full((8, 6), np.nan))
    with pytest.raises(ValueError, match="the kernel 'b/kernel' is not finite"):
        choose_ranks(model, {"macs": 0.9})
    with pytest.raises(
        ValueError, match=r"no kernel 'x' that could be factorised\. Those of the m"
    ):
        cost_of_ranks(model, {"x": kc.LowRank(rank=1)}, "macs")
    with pytest.raises(TypeError, match="'a/kernel' needs a LowRank"):
        cost_of_ranks(model, {"a/kernel": kc.MagnitudePruning(0.5)}, "macs")
    for compressor in (kc.LowRank(rank=1, tile=2), kc.LowRank(energy=0.5)):
        with pytest.raises(ValueError, match="needs a LowRank of a rank or ratio, without tiles"):
            cost_of_ranks(model, {"a/kernel": compressor}, "macs")
