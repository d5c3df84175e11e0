"""Heads of attention are removed: the law, files, training, dead heads, the optimizer."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware import (
    AtEnd,
    Every,
    GroupPruning,
    LowRank,
    PartialGroupLasso,
    Proximal,
    Recipe,
    Rule,
    UniformQuantization,
    compact,
    compress,
    export,
    find_targets,
)
from keras_compaware.compaction.dead_channels import live_channels
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import analyse, channel_spaces
from tests.coupling import networks
from tests.coupling.helpers import array, check_law, inputs_of, outputs_of, randomise
from tests.marks import needs_gates, slow_on_jax

BACKEND = keras.backend.backend()
TOLERANCE = {"tensorflow": 1e-9, "torch": 1e-5, "jax": 1e-3}[BACKEND]  # as in shrink_test.py
HEADS = "attention/heads"


def called_twice():
    inputs = keras.Input((5, 6))
    attention = layers.MultiHeadAttention(4, 3, dropout=0.1, name="attention")
    return keras.Model(inputs, attention(attention(inputs, inputs), inputs))


def over_one_axis_of_two():
    inputs, other = keras.Input((3, 5, 6)), keras.Input((3, 4, 2))
    attention = layers.MultiHeadAttention(
        4, 3, value_dim=2, use_gate=True, use_bias=False, attention_axes=(2,), output_shape=(3, 2),
        name="attention",
    )  # fmt: skip
    return keras.Model([inputs, other], attention(inputs, other))


def masked_tokens():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 6, mask_zero=True)(tokens)
    attention = layers.MultiHeadAttention(4, 3, output_shape=(3, 2), name="attention")
    return keras.Model(tokens, attention(x, x, use_causal_mask=True))


def scores_read_by_heads():
    inputs = keras.Input((5, 6))
    attention = layers.MultiHeadAttention(4, 3, name="attention")
    x, scores = attention(inputs, inputs, return_attention_scores=True)
    scores = layers.Dense(3, name="z")(layers.Permute((2, 3, 1))(scores))
    return keras.Model(inputs, [x, scores])


def grouped_scores_read_by_heads():
    inputs = keras.Input((5, 6))
    attention = layers.GroupQueryAttention(2, 8, 4, use_gate=True, name="attention")
    x, scores = attention(inputs, inputs, return_attention_scores=True)
    scores = layers.Dense(3, name="z")(ops.transpose(scores, (0, 2, 3, 1)))
    return keras.Model(inputs, [x, scores])


@slow_on_jax
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "make",
    [
        called_twice,
        pytest.param(over_one_axis_of_two, marks=needs_gates),
        masked_tokens,
        scores_read_by_heads,
        pytest.param(grouped_scores_read_by_heads, marks=needs_gates),
    ],
    ids=lambda make: make.__name__,
)
def test_law(make):
    spaces, keep, small = check_law(make(), TOLERANCE)
    assert (spaces[HEADS].size, np.count_nonzero(keep[HEADS])) == (4, 3)
    assert channel_spaces(small)[HEADS].size == 3


@slow_on_jax
def test_law_in_float32():
    spaces, keep, _ = check_law(networks.encoder(), 1e-3)
    assert HEADS in keep
    assert spaces[HEADS].frozen is None


def test_kept_heads_in_every_weight():
    model = randomise(networks.encoder())
    small = shrink(model, {HEADS: [0, 2]})
    before, after = model.get_layer("attention"), small.get_layer("attention")
    assert type(after) is layers.MultiHeadAttention
    config = before.get_config() | {"num_heads": 2}
    assert after.get_config() == config
    for part in ("query_dense", "key_dense", "value_dense"):
        old, new = getattr(before, part), getattr(after, part)
        np.testing.assert_array_equal(array(new.kernel), array(old.kernel)[:, [0, 2]])
        np.testing.assert_array_equal(array(new.bias), array(old.bias)[[0, 2]])
    old, new = before.output_dense, after.output_dense
    np.testing.assert_array_equal(array(new.kernel), array(old.kernel)[[0, 2]])
    np.testing.assert_array_equal(array(new.bias), array(old.bias))
    with pytest.raises(ValueError, match=r"attention/heads'\]` is empty; at least one channel"):
        shrink(model, {HEADS: []})


@slow_on_jax
def test_groups_of_queries_keep_their_number():
    attention = layers.GroupQueryAttention(2, 6, 3, name="attention")
    model = randomise(networks.encoder(attention))
    small = shrink(model, {HEADS: [1]}).get_layer("attention")
    assert (small.num_query_heads, small.num_key_value_heads) == (2, 1)
    query, old = small.weights[0], attention.weights[0]
    assert query.path.endswith("query/kernel")
    np.testing.assert_array_equal(array(query), array(old)[:, [2, 3]])


def test_one_head_cannot_be_removed():
    model = randomise(networks.encoder(layers.MultiHeadAttention(1, 3, name="attention")))
    assert channel_spaces(model)[HEADS].size == 1
    small = shrink(model, {HEADS: [0]})
    assert small.get_layer("attention").num_heads == 1
    with pytest.raises(ValueError, match="is empty; at least one channel"):
        shrink(model, {HEADS: [False]})


@slow_on_jax
def test_the_file_needs_only_keras_and_training_goes_on(tmp_path):
    model = randomise(networks.encoder())
    small = shrink(model, {HEADS: [1, 3], "up": [0, 4, 5]})
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    inputs = inputs_of(model)
    np.testing.assert_allclose(
        outputs_of(loaded, inputs)[0], outputs_of(small, inputs)[0], rtol=1e-6
    )
    before = [np.array(array(weight)) for weight in loaded.trainable_weights]
    loaded.compile(keras.optimizers.SGD(0.1), "mse")
    assert np.isfinite(loaded.train_on_batch(inputs, np.ones((2, 2))))
    for weight, value in zip(loaded.trainable_weights, before, strict=True):
        if "key/bias" not in weight.path:  # softmax does not see it
            assert np.any(array(weight) != value), weight.path


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "attention",
    [
        lambda: layers.MultiHeadAttention(4, 3, value_dim=2, name="attention"),
        lambda: layers.GroupQueryAttention(2, 8, 4, name="attention"),
    ],
)
def test_litert(attention, tmp_path):
    model = randomise(networks.encoder(attention()))
    sizes = []
    for number, network in enumerate((model, shrink(model, {HEADS: [1, 2]}))):
        path = tmp_path / f"{number}.tflite"
        assert export.to_litert(network, path).max_error < 1e-4
        sizes.append(path.stat().st_size)
    assert sizes[1] < sizes[0]


# ---- dead heads ---------------------------------------------------------------------------------


def kill(attention, heads, silent=False):
    """Nothing is read from these heads; `silent`: they do not write anything either."""
    kernel = np.array(array(attention.output_dense.kernel))
    kernel[heads] = 0
    attention.output_dense.kernel.assign(kernel)
    if silent:
        for weight, axis in ((attention.value_dense.kernel, 1), (attention.value_dense.bias, 0)):
            values = np.array(array(weight))
            np.moveaxis(values, axis, 0)[heads] = 0
            weight.assign(values)


def live(model):
    masks = live_channels(analyse(model))
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


def compacted(model):
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    result = compact(model)
    for a, b in zip(outputs_of(result.model, inputs), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    return result


def test_heads_that_nothing_reads_are_removed():
    model = randomise(networks.encoder())
    assert live(model) == {}
    kill(model.get_layer("attention"), [0, 3])
    result = compacted(model)
    assert [(row.name, row.before, row.after) for row in result.channels] == [(HEADS, 4, 2)]
    assert result.whole.get_layer("attention").num_heads == 2
    assert "attention/heads                          4 -> 2" in str(result)


@slow_on_jax
def test_a_group_is_dead_when_all_its_queries_are():
    attention = layers.GroupQueryAttention(2, 6, 3, name="attention")
    model = randomise(networks.encoder(attention))
    kernel = attention._output_dense.kernel
    values = np.array(array(kernel))
    values[[0, 1, 2]] = 0  # both heads of the first group, one of the second
    kernel.assign(values)
    assert live(model) == {HEADS: [1, 2]}
    assert compacted(model).whole.get_layer("attention").num_query_heads == 4


@slow_on_jax
def test_of_heads_that_are_all_dead_the_first_stays():
    model = randomise(networks.encoder())
    kill(model.get_layer("attention"), [0, 1, 2, 3])
    assert live(model) == {HEADS: [0]}
    assert compacted(model).whole.get_layer("attention").num_heads == 1


@slow_on_jax
def test_heads_die_in_training_with_a_rule_for_channels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5, 6)).astype("float32")
    y = x.mean(axis=1)[:, :2]
    model = networks.encoder()
    lasso = PartialGroupLasso(2.0, fraction=0.5)
    recipe = Recipe(channels=[Rule("heads", Proximal(lasso))])
    model.compile(recipe.optimizer(keras.optimizers.Adam(0.01)), "mse")
    model.fit(x, y, batch_size=16, epochs=6, verbose=0, callbacks=recipe.callbacks(model))
    result = compacted(model)
    assert [(row.name, row.before, row.after) for row in result.channels] == [(HEADS, 4, 2)]


def test_pruned_heads_are_removed():
    model = randomise(networks.encoder())
    rule = Rule(layers.MultiHeadAttention, AtEnd(GroupPruning(0.5)))
    pruned = compress(model, Recipe(channels=[rule]))
    attention = model.get_layer("attention")
    norms = sum(
        np.sum(np.moveaxis(array(m.variable), m.axis, 0).reshape(4, -1) ** 2, axis=1)
        for m in channel_spaces(model)[HEADS].members
    )
    best = np.sort(np.argsort(-norms)[:2])
    small = compacted(pruned).whole.get_layer("attention")
    np.testing.assert_array_equal(
        array(small.query_dense.kernel), array(attention.query_dense.kernel)[:, best]
    )


@slow_on_jax
def test_quantized_factors_of_projections_are_cut():
    model = randomise(networks.encoder())
    kill(model.get_layer("attention"), [1])
    recipe = Recipe([Rule("attention", Every(100, LowRank(rank=2)), AtEnd(UniformQuantization(8)))])
    (callback,) = recipe.callbacks(model)
    callback.finish(model)
    heads = {"query": 1, "key": 1, "value": 1, "attention_output": 0}
    assert set(callback.codes) == {f"attention/{part}/kernel" for part in heads}
    result = compact(model, callback.codes)
    kernels = {t.name: array(t.read()) for t in find_targets(result.whole)[0]}
    for part in heads:
        parts = result.codes[f"attention/{part}/kernel"].parts
        left, right = (array(parts[name])[0] for name in ("left", "right"))
        kernel = kernels[f"attention/{part}/kernel"]
        assert 3 in kernel.shape
        np.testing.assert_allclose((left @ right).reshape(kernel.shape), kernel, atol=1e-6)


# ---- the optimizer ------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
}


@slow_on_jax
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_after_dead_heads_are_cut(make):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 5, 6)).astype("float32")
    y = x.mean(axis=1)[:, :2]
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model = networks.encoder()
    attention = model.get_layer("attention")
    kill(attention, [0, 2], silent=True)
    model.compile(make(), "mse")
    model.fit(x, y, **fit)
    small = shrink(model, {HEADS: [1, 3]}, optimizer=True)
    assert int(array(small.optimizer.iterations)) == 4
    model.fit(x, y, **fit)
    small.fit(x, y, **fit)
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    np.testing.assert_allclose(
        array(small.get_layer("attention").value_dense.kernel),
        array(attention.value_dense.kernel)[:, [1, 3]],
        atol=1e-5,
    )
