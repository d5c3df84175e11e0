"""The choice of channels: budgets, limits, ties, and what is refused."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from keras_compaware import measure, scores
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import analyse, channel_spaces
from keras_compaware.scores import choose_channels
from tests.coupling import networks as coupled
from tests.coupling.helpers import randomise
from tests.marks import slow_on_jax
from tests.scores import networks

BACKEND = keras.backend.backend()


def chain(*sizes):
    """Hidden layers "a", "b", ... of these sizes, and an output layer "z"."""
    hidden = [layers.Dense(n, name=name) for n, name in zip(sizes, "abcdef", strict=False)]
    return keras.Sequential([keras.Input((3,)), *hidden, layers.Dense(2, name="z")])


def lists(keep):
    return {name: channels.tolist() for name, channels in keep.items()}


def numbers(keep):
    return {name: len(channels) for name, channels in keep.items()}


FALLING = {"a": -np.arange(8.0), "b": -np.arange(6.0)}


def test_half_of_every_space_by_default():
    model = chain(4, 6)
    weights = {"a": [0.1, 0.9, 0.3, 0.5], "b": [6, 5, 4, 3, 2, 1]}
    assert lists(choose_channels(model, weights)) == {"a": [1, 3], "b": [0, 1, 2]}
    assert choose_channels(model, weights)["a"].dtype.kind == "i"


def test_global_scope_takes_the_best_wherever_they_are():
    model = chain(4, 4)
    weights = {"a": [9, 8, 7, 1], "b": [2, 3, 6, 0]}
    keep = choose_channels(model, weights, {"channels": 0.5}, scope="global")
    assert lists(keep) == {"a": [0, 1, 2], "b": [2]}
    keep = choose_channels(model, weights, {"channels": 0.9}, scope="global")
    assert lists(keep) == {"b": [0, 1, 2]}  # 'a' stays whole: seven of eight are left
    keep = choose_channels(model, {"a": [9, 8, 7, 6], "b": [1, 2, 3, 0]}, scope="global")
    assert lists(keep) == {"a": [0, 1, 2], "b": [2]}  # every space keeps one


def test_of_equal_scores_the_first_wins():
    model = chain(4, 4)
    equal = {"a": [1, 1, 1, 1], "b": [1, 2, 1, 2]}
    assert lists(choose_channels(model, equal, {"channels": 0.75})) == {
        "a": [0, 1, 2],
        "b": [0, 1, 3],
    }
    keep = choose_channels(model, equal, scope="global")
    assert lists(keep) == {"a": [0, 1], "b": [1, 3]}


def test_the_largest_choice_that_meets_the_budget():
    # With n_a and n_b channels kept: 3 n_a + n_a n_b + 2 n_b MACs, of 24 + 48 + 12 = 84.
    model = chain(8, 6)
    for fraction, expected in ((1.0, (8, 6)), (0.99, (7, 6)), (0.5, (5, 3)), (0.15, (2, 1))):
        keep = choose_channels(model, FALLING, {"macs": fraction})
        assert tuple(numbers(keep).get(name, n) for name, n in (("a", 8), ("b", 6))) == expected
    # With one channel more than these 5 and 3, the next step, there would be 43 MACs.
    # 4 n_a + (n_a + 1) n_b + 2 n_b + 2 parameters, of 100: 46, or 54 with one more.
    assert numbers(choose_channels(model, FALLING, {"params": 0.5})) == {"a": 5, "b": 3}
    assert numbers(choose_channels(model, FALLING, {"params": 0.54})) == {"a": 5, "b": 4}


@slow_on_jax
@pytest.mark.parametrize("scope", ["space", "global"])
@pytest.mark.parametrize(("kind", "measured"), [("macs", "macs"), ("params", "parameters")])
@pytest.mark.parametrize(
    "make", [coupled.residual, coupled.squeeze_and_excite, coupled.grouped, coupled.reshapes]
)
def test_budgets_are_met_after_shrinking(make, kind, measured, scope):
    model = randomise(make())
    count = getattr(measure, measured)
    for fraction in (0.4, 0.8):
        keep = choose_channels(model, "l1", {kind: fraction}, scope=scope)
        assert 0.5 * fraction * count(model) < count(shrink(model, keep)) <= fraction * count(model)


@pytest.mark.parametrize("scope", ["space", "global"])
def test_smaller_budgets_keep_subsets(scope):
    model = randomise(chain(9, 7, 12))
    before = {name: np.arange(n) for name, n in (("a", 9), ("b", 7), ("c", 12))}
    total = 28
    for fraction in (0.9, 0.7, 0.5, 0.3, 0.2):
        keep = choose_channels(model, "l2", {"channels": fraction}, scope=scope)
        now = {name: keep.get(name, before[name]) for name in before}
        assert all(set(now[name]) <= set(before[name]) for name in now)
        left = sum(map(len, now.values()))
        assert fraction * total - 3 < left <= fraction * total
        before = now


@pytest.mark.parametrize(
    ("size", "round_to", "fraction", "expected"),
    [
        (16, 8, 0.5, 8),
        (16, 8, 0.75, 8),  # 16 would be too many
        (16, 8, 0.99, 8),
        (20, 8, 0.9, 16),
        (20, 8, 1.0, 20),  # what is not cut need not be a multiple
        (32, 8, 0.7, 16),  # 24 would be too many
        (32, 8, 0.75, 24),
        (9, 4, 0.5, 4),
        (9, 4, 0.95, 8),
    ],
)
def test_round_to(size, round_to, fraction, expected):
    model = chain(size)
    budget = {"channels": fraction}
    keep = choose_channels(model, {"a": -np.arange(size)}, budget, round_to=round_to)
    assert keep.get("a", np.arange(size)).tolist() == list(range(expected))


def test_round_to_is_the_nearest_multiple_and_leaves_small_spaces_whole():
    # At the fraction 0.6 the spaces should keep 24, 12 and 1.8; 0.7, for 32, would be too much.
    model = chain(40, 20, 3)
    keep = choose_channels(model, "l1", {"channels": 0.7}, round_to=8)
    assert numbers(keep) == {"a": 24, "b": 16}
    keep = choose_channels(model, "l1", {"channels": 0.7}, round_to=8, scope="global")
    assert all(len(channels) % 8 == 0 for channels in keep.values())
    assert "c" not in keep


@pytest.mark.parametrize("scope", ["space", "global"])
def test_min_channels(scope):
    model = chain(8, 3)
    weights = {"a": -np.arange(8.0), "b": 9 - np.arange(3.0)}
    limits = {"scope": scope, "min_channels": 4}
    keep = choose_channels(model, weights, {"channels": 0.7}, **limits)
    assert numbers(keep) == {"a": 4}  # 'b' has three channels only, and keeps them
    with pytest.raises(ValueError, match=r"At least 0\.6364 \(7 of 11\) is left with round_to=1"):
        choose_channels(model, weights, {"channels": 0.6}, **limits)
    # Limits that are no multiple of round_to are rounded up.
    keep = choose_channels(chain(12), "l1", {"channels": 0.7}, min_channels=5, round_to=4)
    assert numbers(keep) == {"a": 8}


def test_max_ratio():
    # 3 n_a + n_a n_b + 2 n_b MACs, of 84; at most a quarter of 8 and of 6 channels may go.
    model = chain(8, 6)
    assert numbers(choose_channels(model, FALLING, {"macs": 0.6}, scope="global")) == {
        "a": 5,
        "b": 5,
    }
    limits = {"scope": "global", "max_ratio": 0.25}
    assert numbers(choose_channels(model, FALLING, {"macs": 0.7}, **limits)) == {"a": 6, "b": 5}
    with pytest.raises(ValueError, match=r"At least 0\.6905 \(58 of 84\) is left.*ratio=0\.25"):
        choose_channels(model, FALLING, {"macs": 0.6}, **limits)
    assert choose_channels(model, FALLING, {"macs": 1.0}, max_ratio=0.0) == {}
    # 0.29 * 100 is a little less than 29 in floating point.
    keep = choose_channels(chain(100), "l1", {"channels": 0.71}, max_ratio=0.29)
    assert numbers(keep) == {"a": 71}


def test_exclude():
    model = chain(8, 6, 12)
    assert numbers(choose_channels(model, "l1", {"channels": 0.5}, exclude="a|c")) == {"b": 3}
    keep = choose_channels(model, "l1", {"channels": 0.5}, exclude=["^a$", "z"])
    assert numbers(keep) == {"b": 3, "c": 6}
    # Scores of what is excluded are not asked for.
    assert numbers(choose_channels(model, {"b": -np.arange(6)}, exclude=("a", "c"))) == {"b": 3}
    norm = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, name="a"),
            layers.BatchNormalization(),
            layers.Dense(4, name="b"),
            layers.Dense(2, name="z"),
        ]
    )
    with pytest.raises(ValueError, match="exclude='\\^b\\$'"):
        choose_channels(norm, "batch_norm_scale")
    assert numbers(choose_channels(norm, "batch_norm_scale", exclude="^b$")) == {"a": 2}


@pytest.mark.parametrize("scope", ["space", "global"])
def test_no_tensor_is_left_without_a_channel(scope):
    model = networks.concatenation(joined=True)
    weights = {"a": [0.2, 0.1, 5.0]}  # the last one is b's, the others are a's
    keep = choose_channels(model, weights, {"channels": 0.7}, scope=scope)
    assert lists(keep) == {"a": [0, 2]}
    assert shrink(model, keep).get_layer("a").units == 1
    with pytest.raises(ValueError, match=r"At least 0\.6667 \(2 of 3\) is left"):
        choose_channels(model, weights, {"channels": 0.5}, scope=scope)


@pytest.mark.parametrize("scope", ["space", "global"])
def test_a_needed_channel_takes_the_place_of_a_better_one(scope):
    inputs = keras.Input((3,))
    a, b, c = (layers.Dense(n, name=name)(inputs) for name, n in (("a", 2), ("b", 6), ("c", 8)))
    x = layers.Add()([layers.Concatenate()([a, b]), c])
    model = keras.Model(inputs, layers.Dense(1, name="z")(x))
    keep = choose_channels(model, {"a": np.arange(8.0)}, {"channels": 0.5}, scope=scope, round_to=4)
    assert lists(keep) == {"a": [1, 5, 6, 7]}
    shrink(model, keep)


def test_a_tensor_with_frozen_channels_needs_no_others():
    inputs = keras.Input((3,))
    a, b = layers.Dense(4, name="a")(inputs), layers.Dense(4, name="b")(inputs)
    joined = layers.Concatenate()([a, b])
    halves = keras.ops.split(joined, [2], axis=-1)
    outputs = [layers.Dense(1, name=f"z{i}")(half) for i, half in enumerate(halves)]
    model = keras.Model(inputs, outputs)
    keep = choose_channels(model, {"a": [1, 2, 4, 3]}, {"channels": 0.25}, exclude="^b$")
    # Channels 2 and 3 of 'a' stand beside those of 'b', which stay; 0 and 1 stand alone.
    assert lists(keep) == {"a": [1]}
    assert shrink(model, keep).get_layer("a").units == 1


def test_kinds_of_scores():
    model = networks.planted()
    expected = np.setdiff1d(np.arange(6), networks.USELESS).tolist()
    budget = {"channels": 0.7}
    for score in (
        "l1",
        "l2",
        "batch_norm_scale",
        "geometric_median",
        scores.L1(normalize=None),
        lambda model, spaces: scores.L2()(model, spaces),
        scores.L1()(model),
        scores.Activation([np.random.default_rng(0).normal(size=(64, 5))]),
    ):
        assert lists(choose_channels(model, score, budget)) == {"a": expected}
    random = choose_channels(model, scores.Random(1), budget)
    assert lists(random) == lists(choose_channels(model, scores.Random(1), budget))


def test_nothing_to_cut():
    assert choose_channels(chain(8, 6), budget={"params": 1}) == {}
    assert choose_channels(networks.dense_pair(), "l1", {"channels": 1.0}, exclude="^a$") == {}
    for kind in ("channels", "params"):
        with pytest.raises(ValueError, match=r"no channel space that may be cut \(2 of 3 are froz"):
            choose_channels(networks.dense_pair(), "l1", {kind: 0.9}, exclude="^a$")


def test_under_a_layer_normalization():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(4, name="a"),
            layers.LayerNormalization(),
            layers.Dense(1, name="z"),
        ]
    )
    with pytest.raises(ValueError, match="no channel space that may be cut"):
        choose_channels(model)
    keep = choose_channels(model, scores.Activation([np.ones((3, 2))]), allow_inexact=True)
    assert numbers(keep) == {"a": 2}
    small = kc.shrink(model, keep, allow_inexact=True)
    assert tuple(small.layers[1].gamma.shape) == (2,)


def test_the_model_is_left_as_it_is():
    model = chain(8, 6)
    config, weights = model.get_config(), model.get_weights()
    kc.choose_channels(model, budget={"macs": 0.5}, scope="global")
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


REFUSED = {
    "unknown score": ({"score": "l3"}, ValueError, "`score` must be one of 'l1', 'l2', 'batch"),
    "a class": ({"score": scores.L1}, TypeError, "`score` must be a ChannelScore, a function"),
    "no score": ({"score": 3}, TypeError, r"Received: 3\."),
    "missing": ({"score": {"a": [1] * 4}}, ValueError, r"no entry for the channel space 'b'\. Add"),
    "unknown space": ({"score": {"y": [1]}}, ValueError, "names 'y', which is no channel space"),
    "wrong size": (
        {"score": {"a": [1] * 4, "b": [1] * 5}},
        ValueError,
        r"of 'b' must be 6 numbers, one for each channel\. Received the shape \(5,\)",
    ),
    "not finite": ({"score": {"a": [np.inf] * 4}}, ValueError, "of 'a' are not all finite"),
    "budget of no kind": ({"budget": 0.5}, TypeError, "`budget` must be a mapping with one entry"),
    "unknown budget": ({"budget": {"flops": 0.5}}, ValueError, "'channels', 'macs', 'params'"),
    "two budgets": (
        {"budget": {"macs": 0.5, "params": 0.5}},
        ValueError,
        "exactly one of the keys",
    ),
    "zero": ({"budget": {"macs": 0.0}}, ValueError, r"`budget\['macs'\]` must be in \(0, 1\]"),
    "scope": ({"scope": "all"}, ValueError, "`scope` must be one of 'space', 'global'"),
    "round_to": ({"round_to": 0}, ValueError, "`round_to` must be at least 1"),
    "min_channels": ({"min_channels": 1.0}, TypeError, "`min_channels` must be an integer"),
    "max_ratio": ({"max_ratio": 1.5}, ValueError, r"`max_ratio` must be in \[0, 1\]"),
    "no match": ({"exclude": ["a", "q"]}, ValueError, "the pattern 'q' of `exclude` matches no"),
    "no pattern": ({"exclude": "("}, ValueError, r"not a valid regular expression: '\('"),
    "patterns of no kind": ({"exclude": [1]}, TypeError, r"or a sequence of them\. Received: 1"),
    "too small": (
        {"budget": {"macs": 0.05}},
        ValueError,
        # 3 * 1 + 1 * 1 + 1 * 2 of 3 * 4 + 4 * 6 + 6 * 2
        r"0\.05 of the MACs cannot be met\. At least 0\.1250 \(6 of 48\) is left with.*2 of 4 chan",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        choose_channels(chain(4, 6), **arguments)


def test_models_without_a_graph_are_refused():
    class Net(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="has no static graph"):
        choose_channels(Net())
    with pytest.raises(TypeError, match=r"keras\.Model"):
        choose_channels("model")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["space", "global"])
def test_applications(scope):
    model = keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3))
    keep = choose_channels(model, budget={"macs": 0.5}, scope=scope, round_to=8, max_ratio=0.9)
    small = shrink(model, keep)
    assert 0.45 * measure.macs(model) < measure.macs(small) <= 0.5 * measure.macs(model)
    spaces = channel_spaces(small)
    assert all(spaces[name].size % 8 == 0 for name in keep)
    assert analyse(small).spaces.coverage() >= 0.95
