"""Scores of the heads of attention, and their choice for a budget."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import measure
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import analyse, channel_spaces
from keras_compaware.scores import (
    L1,
    L2,
    Activation,
    GeometricMedian,
    Random,
    Taylor,
    choose_channels,
    cost,
)
from tests.coupling import networks
from tests.coupling.helpers import array, inputs_of, randomise
from tests.marks import slow_on_jax

HEADS = "attention/heads"
BACKEND = keras.backend.backend()


def kernels(attention):
    """The kernels as (heads, ...); heads of queries that go together are one."""
    parts = [part for part in attention._flatten_layers(include_self=False) if part.weights]
    values = [array(part.kernel).astype("float64") for part in parts]
    groups = min(value.shape[1] for value in values[:-1])
    values = [np.moveaxis(value, 1, 0) for value in values[:-1]] + values[-1:]
    return [value.reshape(groups, -1) for value in values]


KINDS = {
    "all": lambda: layers.MultiHeadAttention(4, 3, value_dim=2, name="attention"),
    "grouped": lambda: layers.GroupQueryAttention(2, 6, 3, name="attention"),
}


@slow_on_jax
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_from_weights_biases_aside(make):
    model = randomise(networks.encoder(make()))
    rows = kernels(model.get_layer("attention"))
    everything, written = np.concatenate(rows, axis=1), np.concatenate(rows[:-1], axis=1)
    distances = np.linalg.norm(written[:, None] - written[None], axis=2).sum(axis=1)
    for score, expected in (
        (L1, np.abs(everything).sum(axis=1)),
        (L2, np.linalg.norm(everything, axis=1)),
        (GeometricMedian, distances),
    ):
        found = score(normalize=None)(model)[HEADS]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert Random()(model)[HEADS].shape == expected.shape


@slow_on_jax
def test_taylor_finds_heads_that_do_not_matter():
    model = randomise(networks.encoder())
    attention = model.get_layer("attention")
    for weight, axis in (
        (attention.output_dense.kernel, 0),
        (attention.value_dense.kernel, 1),
        (attention.value_dense.bias, 0),
    ):
        values = np.array(array(weight))
        np.moveaxis(values, axis, 0)[[0, 2]] = 0
        weight.assign(values)
    model.compile(loss="mse")
    found = Taylor([(inputs_of(model), np.ones((2, 2)))])(model)[HEADS]
    assert (found[[0, 2]] == 0).all()
    assert (found[[1, 3]] > 0).all()


def contexts(attention, inputs, x):
    """What the last projection reads: it is replaced by the identity."""
    config = attention.get_config()
    heads, width = config["num_heads"], config["value_dim"]
    same = type(attention).from_config({**config, "output_shape": (heads, width)})
    model = keras.Model(inputs, same(attention.input[0], attention.input[0]))
    size = heads * width
    identity = np.eye(size).reshape(heads, width, heads, width)
    same.set_weights([*map(array, attention.weights[:-2]), identity, np.zeros((heads, width))])
    return array(model(x, training=False))


@slow_on_jax
@pytest.mark.parametrize("masked", [False, True])
def test_activation_is_that_of_what_the_last_projection_reads(masked):
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 6, mask_zero=masked, name="embedding")(tokens)
    x = layers.MultiHeadAttention(4, 3, name="attention")(x, x)
    model = randomise(keras.Model(tokens, layers.Dense(2, name="z")(x)))
    attention = model.get_layer("attention")
    rows = np.array([[1, 2, 3, 4, 1, 0, 0], [4, 3, 0, 0, 0, 0, 0]])
    expected = np.abs(contexts(attention, tokens, rows)).mean(axis=(0, 1, 3))
    found = Activation([rows[:1], rows[1:]], normalize=None)(model)
    np.testing.assert_allclose(found[HEADS], expected, rtol=1e-4)
    assert "call" not in vars(attention.output_dense)


@slow_on_jax
def test_activation_of_grouped_heads_is_that_of_all_their_queries():
    attention = layers.GroupQueryAttention(2, 4, 2, name="attention")
    inputs = keras.Input((5, 6))
    model = randomise(keras.Model(inputs, attention(attention(inputs, inputs), inputs)))
    x = inputs_of(model)
    found = Activation([x], normalize=None)(model)[HEADS]
    # Values that are constant are the context, whatever the queries are.
    dense = attention._value_dense
    dense.kernel.assign(np.zeros(dense.kernel.shape))
    dense.bias.assign([[1.0, -3.0], [5.0, 0.0]])
    constant = Activation([x], normalize=None)(model)[HEADS]
    np.testing.assert_allclose(constant, [2.0, 2.5], rtol=1e-5)
    assert np.abs(found - constant).min() > 1e-3


def twice():
    attention = layers.MultiHeadAttention(4, 3, name="attention")
    inputs = keras.Input((5, 6))
    return keras.Model(inputs, attention(attention(inputs, inputs), inputs))


def wide():
    """Its last bias has two axes and no heads."""
    inputs = keras.Input((5, 6))
    attention = layers.MultiHeadAttention(4, 3, output_shape=(3, 2), name="attention")
    return keras.Model(inputs, attention(inputs, inputs))


def grouped():
    return networks.encoder(layers.GroupQueryAttention(2, 8, 4, name="attention"))


@slow_on_jax
@pytest.mark.parametrize("make", [networks.encoder, grouped, twice, wide])
def test_costs_equal_what_is_measured(make):
    model = make()
    analysis = analyse(model)
    for number in (4, 3, 1):
        masks = {HEADS: np.arange(4) < number}
        small, kept = shrink(model, masks), analysis.keep(masks)
        assert cost.parameters(model, analysis)(kept) == measure.parameters(small)
        assert cost.macs(model, analysis)(kept) == measure.macs(small)


@slow_on_jax
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("scope", ["space", "global"])
def test_a_budget_is_met(kind, scope):
    model = randomise(networks.encoder())
    measured = {"macs": measure.macs, "params": measure.parameters}[kind]
    keep = choose_channels(model, "l2", {kind: 0.6}, scope=scope)
    assert 0.4 * measured(model) < measured(shrink(model, keep)) <= 0.6 * measured(model)
    assert set(keep) == {HEADS, "up"}


def test_the_best_heads_stay():
    model = networks.encoder()
    keep = choose_channels(model, {HEADS: [1, 4, 2, 3]}, {"channels": 0.5}, exclude="up")
    assert {name: channels.tolist() for name, channels in keep.items()} == {HEADS: [1, 3]}
    assert channel_spaces(shrink(model, keep))[HEADS].size == 2


@pytest.mark.parametrize("scope", ["space", "global"])
def test_numbers_of_heads_are_not_rounded(scope):
    model = randomise(networks.encoder(layers.MultiHeadAttention(6, 3, name="attention")))
    spaces = channel_spaces(model)
    assert {space.name for space in spaces if space.is_wide} == {HEADS}
    scores = {HEADS: -np.arange(6.0), "up": -np.arange(7.0)}
    keep = choose_channels(model, scores, {"channels": 0.6}, scope=scope, round_to=4)
    # At the fraction 4/7 or so: 3 of 6 heads, and 4 of 7 units of the MLP.
    assert {name: len(kept) for name, kept in keep.items()} == {HEADS: 3, "up": 4}
