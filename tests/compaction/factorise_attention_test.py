"""Attention layers whose projections have low rank."""

import keras
import numpy as np
import pytest

from keras_compaware import (
    AtEnd,
    Every,
    LowRank,
    Recipe,
    Rule,
    UniformQuantization,
    compact,
    export,
)
from tests.compaction.helpers import (
    array,
    check_compact,
    check_same,
    check_training,
    data,
    lower_rank,
    outputs_of,
)
from tests.marks import needs_gates, slow_on_jax

layers = keras.layers
BACKEND = keras.backend.backend()
ALL = "query rank 2 of 16; key rank 2 of 16; value rank 2 of 16; output rank 2 of 16"


def self_attention(shape=(6, 16), call=None, **arguments):
    layer = layers.MultiHeadAttention(4, 8, name="att", **arguments)
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs, inputs, **(call or {})))


VARIANTS = {
    "plain": ({}, {}),
    "without bias": ({"use_bias": False}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "wide values": ({"value_dim": 12, "dropout": 0.1}, {}),
    "outputs of another width": ({"output_shape": 20}, {}),
    "scores": ({}, {"return_attention_scores": True}),
}


@pytest.mark.parametrize(("arguments", "call"), VARIANTS.values(), ids=VARIANTS)
def test_self_attention(arguments, call, tmp_path):
    model = lower_rank(self_attention(call=call, **arguments))
    result = check_compact(model, data((6, 16)), tmp_path / "small.keras")
    (row,) = result.rows
    assert row.note.startswith(ALL.removesuffix("16"))
    att = result.model.get_layer("att")
    assert type(att) is layers.MultiHeadAttention
    assert (att.num_heads, att.key_dim) == (4, 8)
    names = {layer.name for layer in result.model.layers[1:]}
    assert names == {"att_query", "att_key", "att_value", "att", "att_output"}
    assert att.query_dense.kernel.shape == (2, 4, 8)
    assert result.model.get_layer("att_output").use_bias == arguments.get("use_bias", True)


def test_training_goes_on():
    small = compact(lower_rank(self_attention())).model
    check_training(small, data((6, 16)))


@needs_gates
@slow_on_jax
def test_a_gate_reads_the_narrow_query_too():
    model = lower_rank(self_attention(use_gate=True))
    result = check_compact(model, data((6, 16)))
    assert result.rows[0].note.startswith("query rank 4 of 16; key rank 2")


@slow_on_jax
@pytest.mark.parametrize("only", ["query", "key", "value", "attention_output"])
def test_each_projection_by_itself(only):
    """The others stay, with the reason; key and value are one tensor no longer."""
    model = lower_rank(self_attention(), only=only)
    result = check_compact(model, data((6, 16)))
    part = "output" if only == "attention_output" else only
    rest = [name for name in ("query", "key", "value", "output") if name != part]
    assert result.rows[0].note == (
        f"{part} rank 2 of 16; the rest as it is: {', '.join(rest)}: "
        "rank 16 of 16 (channel) saves nothing"
    )
    assert [layer.name for layer in result.model.layers if "att_" in layer.name] == [f"att_{part}"]


def test_high_ranks_stay():
    (row,) = compact(self_attention()).rows
    assert row.before == row.after
    assert row.note == (
        "as it is: query, key, value, output: rank 16 of 16 (channel) saves nothing"
    )


@slow_on_jax
def test_cross_attention_with_widths_and_masks_of_its_own():
    query, value, key = keras.Input((5, 16)), keras.Input((7, 12)), keras.Input((7, 10))
    mask = keras.Input((5, 7), dtype="bool")
    layer = layers.MultiHeadAttention(4, 8, value_dim=6, name="att")
    model = keras.Model(
        [query, value, key, mask], layer(query, value, key=key, attention_mask=mask)
    )
    allowed = np.random.default_rng(0).uniform(size=(2, 5, 7)) > 0.4
    allowed[..., 0] = True
    inputs = [data((5, 16)), data((7, 12)), data((7, 10)), allowed]
    result = check_compact(lower_rank(model), inputs)
    assert result.rows[0].note == (
        "query rank 2 of 16; key rank 2 of 10; value rank 2 of 12; output rank 2 of 16"
    )


@slow_on_jax
def test_masks_of_an_embedding_reach_the_attention_and_go_on(tmp_path):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(12, 16, mask_zero=True, name="table")(inputs)
    x = layers.MultiHeadAttention(4, 8, name="att")(x, x)
    model = lower_rank(keras.Model(inputs, layers.GRU(6, name="gru")(x)))
    ids = np.array([[3, 7, 1, 0, 0], [11, 2, 9, 4, 0]], "int32")
    result = check_compact(model, ids, tmp_path / "small.keras", saves_macs=False)
    assert result.rows[1].note == ALL
    (masked,) = outputs_of(result.model, ids)
    (unmasked,) = outputs_of(result.model, np.where(ids == 0, 5, ids))
    assert np.max(np.abs(masked - unmasked)) > 1e-3


@slow_on_jax
def test_a_shared_layer_in_nested_models():
    """Called twice, in a functional model inside a Sequential one; names stay unique."""
    inputs = keras.Input((6, 16))
    layer = layers.MultiHeadAttention(4, 8, name="att")
    x = layers.LayerNormalization()(inputs + layer(inputs, inputs))
    x = layers.Dense(16, name="att_query")(layer(x, x))
    block = keras.Model(inputs, x, name="block")
    model = keras.Sequential([keras.Input((6, 16)), block, layers.Dense(3, name="head")])
    result = check_compact(lower_rank(model), data((6, 16)))
    block = result.model.get_layer("block")
    assert isinstance(block.get_layer("att_query"), keras.Sequential)
    assert type(block.get_layer("att_query_2")) is layers.Dense
    assert sum(row.layer == "MultiHeadAttention" for row in result.rows) == 1


@slow_on_jax
def test_attention_over_two_axes_and_outputs_of_two_axes():
    inputs = keras.Input((3, 4, 16))
    layer = layers.MultiHeadAttention(2, 8, attention_axes=(1, 2), output_shape=(4, 5), name="att")
    model = lower_rank(keras.Model(inputs, layer(inputs, inputs)))
    result = check_compact(model, data((3, 4, 16)))
    assert result.rows[0].note.endswith(
        "the rest as it is: output: its outputs have more than one axis"
    )


def test_regularized_outputs_stay():
    model = lower_rank(self_attention(activity_regularizer="l2", kernel_regularizer="l2"))
    result = compact(model)
    assert result.rows[0].note.endswith("the rest as it is: output: its outputs are regularized")
    check_same(model, result.model, data((6, 16)))
    att = result.model.get_layer("att")
    assert att.query_dense.kernel_regularizer is None
    assert att.output_dense.activity_regularizer is not None


@pytest.mark.parametrize("rank", [2, 16])
def test_frozen_layers_stay_frozen(rank):
    model = lower_rank(self_attention(), rank=rank)
    model.get_layer("att").trainable = False
    assert compact(model).model.trainable_variables == []


@slow_on_jax
def test_grouped_queries(tmp_path):
    inputs = keras.Input((6, 16))
    layer = layers.GroupQueryAttention(8, 4, 2, name="att")
    model = lower_rank(keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True)))
    result = check_compact(model, data((6, 16)), tmp_path / "small.keras")
    assert result.rows[0].note == (
        "key rank 2 of 16; the rest as it is: query, value, output: the layer wants them of one "
        "width"
    )


def test_the_factors_of_codes_are_taken():
    model = self_attention()
    model.compile("sgd", "mse")
    rule = Rule(lambda target: True, Every(2, LowRank(rank=2)), AtEnd(UniformQuantization(4)))
    callback = Recipe([rule]).callbacks(model)[0]
    model.fit(data((6, 16), 4), data((6, 16), 4, 1), batch_size=2, callbacks=[callback], verbose=0)
    assert len(callback.codes) == 4
    result = compact(model, callback.codes)
    assert result.max_error < 1e-5
    att = result.model.get_layer("att")
    kernels = [part.kernel for part in (att.query_dense, att.key_dense, att.value_dense)]
    kernels += [att.output_dense.kernel]
    names = ("query", "key", "value", "output")
    kernels += [result.model.get_layer(f"att_{name}").kernel for name in names]
    assert max(len(np.unique(array(kernel))) for kernel in kernels) <= 15
    found = compact(model).model.get_layer("att_query").kernel
    assert len(np.unique(array(found))) > 15


@pytest.mark.tensorflow
def test_litert(tmp_path):
    small = compact(lower_rank(self_attention(call={"use_causal_mask": True}))).model
    assert export.to_litert(small, tmp_path / "small.tflite").max_error < 1e-5
