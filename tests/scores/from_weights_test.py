"""Scores of weights: values computed by hand, equivariance, what is refused."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware.coupling import ChannelSpace, Member, channel_spaces
from keras_compaware.scores import L1, L2, BatchNormScale, GeometricMedian, Random
from tests.scores import networks

ROOT = np.sqrt
VALUES = {
    # Slices that write the channel, and slices that read it.
    "dense, l1": (networks.dense_pair, L1, {"a": [3 + 4, 1 + 2, 3 + 2]}),
    "dense, l2": (networks.dense_pair, L2, {"a": [5, ROOT(1 + 2), ROOT(5 + 4)]}),
    "convolutions, l1": (
        networks.convolutions,
        L1,
        {"a": [2 + 2, 3 + 5], "b": [1 + 10, 6 + 20]},
    ),
    "convolutions, gamma": (
        lambda: keras.Model((m := networks.convolutions()).inputs, m.get_layer("b").output),
        BatchNormScale,
        {"a": [0.5, 4.0]},
    ),
    # Channel c owns row c and column c of b, and their common entry once.
    "residual, l1": (
        networks.residual,
        L1,
        {"a": [1 + (3 + 5 + 7) + 13, 2 + (5 + 7 + 11) + 17]},
    ),
    "residual, l2": (
        networks.residual,
        L2,
        {"a": [ROOT(1 + 9 + 25 + 49 + 169), ROOT(4 + 25 + 49 + 121 + 289)]},
    ),
    "concatenation, l1": (networks.concatenation, L1, {"a": [1 + 10, 2 + 20], "b": [4 + 30]}),
    "joined concatenation, l1": (
        lambda: networks.concatenation(joined=True),
        L1,
        {"a": [1 + 2 + 10, 2 + 2 + 20, 4 + 2 + 30]},
    ),
    # Columns (3, 0), (0, -1), (1, -2).
    "dense, geometric median": (
        networks.dense_pair,
        GeometricMedian,
        {"a": [ROOT(10) + ROOT(8), ROOT(10) + ROOT(2), ROOT(8) + ROOT(2)]},
    ),
    # Columns of a and b behind each other: (1, 3, 7) and (2, 5, 11).
    "residual, geometric median": (networks.residual, GeometricMedian, {"a": [ROOT(21)] * 2}),
    # What a, b and c hold: (1, 0, 2), (-2, 0, 2), (0, 4, 2).
    "joined concatenation, geometric median": (
        lambda: networks.concatenation(joined=True),
        GeometricMedian,
        {"a": [3 + ROOT(17), 3 + ROOT(20), ROOT(17) + ROOT(20)]},
    ),
}


@pytest.mark.parametrize(("make", "score", "expected"), VALUES.values(), ids=VALUES)
def test_values(make, score, expected):
    found = score(normalize=None)(make())
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_normalized():
    model = networks.dense_pair()
    np.testing.assert_allclose(L1()(model)["a"], np.array([7, 3, 5]) / 5)
    np.testing.assert_allclose(L1("max")(model)["a"], np.array([7, 3, 5]) / 7)
    model.set_weights([np.zeros(w.shape) for w in model.get_weights()])
    for score in (L1(), L1("max"), GeometricMedian()):
        np.testing.assert_array_equal(score(model)["a"], [0, 0, 0])


def test_several_entries_of_one_channel():
    # Two groups of two: the filters 0, 1 and 2, 3 of `a` are one channel each.
    inputs = keras.Input((2, 2, 1))
    x = layers.Conv2D(4, 1, use_bias=False, name="a")(inputs)
    x = layers.Conv2D(2, 1, groups=2, use_bias=False, name="grouped")(x)
    x = layers.Dense(1, use_bias=False, name="z")(layers.Flatten()(x))
    model = keras.Model(inputs, x)
    model.get_layer("a").kernel.assign(np.array([1.0, -2.0, 3.0, 5.0]).reshape(1, 1, 1, 4))
    model.get_layer("z").kernel.assign(np.arange(8.0)[:, None])
    # Of z, the even entries read the first channel and the odd ones the second.
    np.testing.assert_allclose(L1(None)(model)["a"], [3 + 12, 8 + 16])
    # Channels (1, -2) and (3, 5).
    np.testing.assert_allclose(GeometricMedian(None)(model)["a"], [ROOT(4 + 49)] * 2)


def test_geometric_median_finds_what_others_stand_in_for():
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(30, name="a"), layers.Dense(1, name="z")]
    )
    kernel = rng.normal(size=(6, 30)) + 100.0  # far from zero: norms say nothing
    kernel[:, 7] = np.mean(np.delete(kernel, 7, axis=1), axis=1)
    model.get_layer("a").kernel.assign(kernel)
    scores = GeometricMedian(None)(model)["a"]
    assert np.argmin(scores) == 7
    distances = np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)
    np.testing.assert_allclose(scores, distances.sum(axis=1), rtol=1e-4)


def test_batch_norm_scale_takes_the_mean_of_several():
    inputs = keras.Input((1,))
    x = layers.BatchNormalization(name="first")(layers.Dense(2, name="a")(inputs))
    y = layers.BatchNormalization(name="second")(layers.Dense(2, name="b")(x))
    model = keras.Model(inputs, layers.Dense(1, name="z")(layers.Add()([x, y])))
    model.get_layer("first").gamma.assign([1.0, -2.0])
    model.get_layer("second").gamma.assign([3.0, 0.0])
    np.testing.assert_allclose(BatchNormScale(None)(model)["a"], [2.0, 1.0])


def without_scale():
    norm = layers.BatchNormalization(scale=False)
    return keras.Sequential([keras.Input((3,)), layers.Dense(2, name="a"), norm, layers.Dense(1)])


def another_normalization():
    norm = layers.GroupNormalization(2)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, name="a"), norm, layers.Dense(1)])


def on_a_part():
    inputs = keras.Input((1,))
    a = layers.BatchNormalization()(layers.Dense(2, name="a")(inputs))
    x = layers.Concatenate()([a, layers.Dense(1, name="b")(inputs)])
    x = layers.Add()([x, layers.Dense(3, name="c")(inputs)])
    return keras.Model(inputs, layers.Dense(1, name="z")(x))


@pytest.mark.parametrize(
    ("make", "which"),
    [
        (networks.dense_pair, "the channels"),
        (without_scale, "the channels"),
        (another_normalization, "the channels"),
        (on_a_part, "1 of the 3 channels"),
    ],
)
def test_batch_norm_scale_needs_a_scale(make, which):
    with pytest.raises(ValueError, match=rf"{which} of the space 'a' pass.*exclude='\^a\$'"):
        BatchNormScale()(make())


def test_random():
    model = networks.convolutions()
    scores = Random(3)(model)
    again = Random(3)(model, [channel_spaces(model)["b"]])
    np.testing.assert_array_equal(scores["b"], again["b"])
    assert not np.array_equal(scores["a"], scores["b"])
    assert not np.array_equal(scores["b"], Random(4)(model)["b"])
    assert scores["a"].mean() == pytest.approx(1.0)


@pytest.mark.parametrize("score", [L1(), L2(), BatchNormScale(), GeometricMedian()], ids=str)
def test_planted_and_permuted(score):
    model = networks.planted()
    scores = score(model)["a"]
    assert set(np.argsort(scores)[:2]) == set(networks.USELESS)
    order = np.array([3, 0, 5, 1, 4, 2])
    permuted = [w[..., order] if w.shape[-1] == 6 else w for w in model.get_weights()]
    permuted[-2] = permuted[-2][order]
    model.set_weights(permuted)
    np.testing.assert_allclose(score(model)["a"], scores[order], rtol=1e-6)


def test_spaces():
    model = networks.convolutions()
    spaces = channel_spaces(model)
    assert list(L1()(model, spaces)) == ["a", "b"]  # the frozen ones are left out
    assert list(L1()(model, [spaces["b"]])) == ["b"]
    assert L1()(model, []) == {}
    with pytest.raises(TypeError, match=r"`spaces` must be channel spaces.*Received one str"):
        L1()(model, ["a"])


@pytest.mark.parametrize("score", [L1(), L2(), GeometricMedian()], ids=str)
def test_a_space_without_kernels_is_refused(score):
    model = networks.planted()
    gamma = model.get_layer("norm").gamma
    space = ChannelSpace("a.b", 6, (Member("norm/gamma", gamma, 0, np.arange(6), "carrier"),))
    with pytest.raises(ValueError, match=r"'a.b' has no kernel as.*exclude='\^a\\\.b\$'"):
        score(model, [space])


def test_arguments_and_configurations():
    with pytest.raises(ValueError, match="`normalize` must be one of 'mean', 'max', None"):
        L2(normalize="sum")
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        Random(-1)
    with pytest.raises(TypeError, match=r"keras\.Model"):
        L1()("model")
    for score in (L1("max"), L2(), BatchNormScale(None), GeometricMedian(), Random(5, "max")):
        saved = keras.saving.serialize_keras_object(score)
        assert keras.saving.deserialize_keras_object(saved) == score


def test_weights_that_are_not_finite_are_refused():
    model = networks.dense_pair()
    model.get_layer("a").bias.assign([np.nan] * 3)  # of no score
    L1()(model)
    model.get_layer("a").kernel.assign([[1.0, np.nan, 1.0]] * 2)
    with pytest.raises(ValueError, match="the scores of the channel space 'a' are not finite"):
        L1()(model)
