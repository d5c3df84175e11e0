"""EinsumDense and Embedding layers of low rank."""

import re

import keras
import numpy as np
import pytest

from keras_compaware import compact, export
from keras_compaware.compaction.factorise import find_factorisation
from keras_compaware.measure import macs_by_layer
from tests.compaction.helpers import (
    check_compact,
    check_same,
    check_training,
    data,
    lower_rank,
    outputs_of,
)
from tests.marks import slow_on_jax

layers = keras.layers
IDS = np.array([[3, 7, 1, 0, 0], [11, 2, 9, 4, 0]], "int32")


def einsum(shape, equation, output_shape, **arguments):
    layer = layers.EinsumDense(equation, output_shape, name="a", **arguments)
    return keras.Sequential([keras.Input(shape), layer])


EINSUMS = {
    "dense": ((5, 16), "abc,cd->abd", (None, 20), "d"),
    "kernel transposed": ((5, 16), "abc,dc->abd", (None, 20), "d"),
    "outputs before positions": ((5, 16), "abc,cd->adb", (20, None), None),
    "two axes to two": ((5, 4, 6), "abcd,dcef->abfe", (None, 3, 8), "fe"),
    "an axis of matrices": ((5, 16), "abc,bcd->abd", (5, 20), "bd"),
    "ellipsis before": ((3, 5, 16), "...x,xy->...y", 20, "y"),
    "ellipsis behind": ((16, 5), "ab...,bc->ac...", 20, None),
}


@pytest.mark.parametrize(
    ("shape", "equation", "output_shape", "bias_axes"), EINSUMS.values(), ids=EINSUMS
)
def test_einsum_dense(shape, equation, output_shape, bias_axes, tmp_path):
    model = einsum(shape, equation, output_shape, bias_axes=bias_axes, activation="tanh")
    result = check_compact(lower_rank(model), data(shape), tmp_path / "small.keras")
    (row,) = result.rows
    assert row.note.startswith("rank 2 of ")
    (pair,) = result.model.layers
    assert pair.name == "a"
    assert [inner.name for inner in pair.layers] == ["a_left", "a_right"]
    assert {type(inner) for inner in pair.layers} == {layers.EinsumDense}
    assert [inner.activation.__name__ for inner in pair.layers] == ["linear", "tanh"]
    assert pair.layers[0].bias is None
    assert (pair.layers[1].bias is None) == (bias_axes is None)


REFUSED = {
    "high rank": ((5, 16), "abc,cd->abd", (None, 20), r"rank 16 of 16 \(channel\) saves nothing"),
    "no outputs": ((5, 16), "abc,c->ab", (None,), "rank 1 of 1 .* saves nothing"),
    "examples": ((4, 5, 16), "abcd,ade->abce", (4, 5, 20), "the example's place in the batch"),
}


@pytest.mark.parametrize(
    ("shape", "equation", "output_shape", "note"), REFUSED.values(), ids=REFUSED
)
def test_equations_that_stay(shape, equation, output_shape, note):
    layer = layers.EinsumDense(equation, output_shape, name="a")
    model = keras.Sequential([keras.Input(batch_shape=(2, *shape)), layer])
    (row,) = compact(model).rows
    assert row.before == row.after
    assert row.note.startswith("as it is: ")
    assert re.search(note, row.note)


def test_the_factors_are_those_of_the_kernel():
    layer = einsum((5, 4, 6), "abcd,dcef->abfe", (None, 3, 8)).layers[0]
    left, right = data((4, 3), 6), data((8, 3), 3, 1)
    kernel = np.einsum("dcr,ref->dcef", left, right)
    found = find_factorisation(layer, kernel)
    assert (found.ranks, found.full_ranks) == ((3,), (24,))
    product = np.einsum("dcr,ref->dcef", *found.kernels.values())
    np.testing.assert_allclose(product, kernel, atol=1e-5)


def test_a_shared_layer_on_sequences_of_different_lengths():
    layer = layers.EinsumDense("...x,xy->...y", 16, bias_axes="y", name="a")
    one, two = keras.Input((3, 16)), keras.Input((5, 16))
    model = lower_rank(keras.Model([one, two], [layer(one), layer(two)]))
    result = check_compact(model, [data((3, 16)), data((5, 16))])
    assert len(result.rows) == 1


def test_a_shared_layer_on_different_ranks_stays():
    layer, one, two = layers.Dense(16), keras.Input((16,)), keras.Input((5, 16))
    model = lower_rank(keras.Model([one, two], [layer(one), layer(two)]))
    result = compact(model)
    assert result.rows[0].note == "as it is: it is called on tensors of different ranks"
    check_same(model, result.model, [data((16,)), data((5, 16))])


def text_model(*more, mask_zero=True, **arguments):
    table = layers.Embedding(12, 10, mask_zero=mask_zero, name="table", **arguments)
    return keras.Sequential([keras.Input((5,), dtype="int32"), table, *more])


def test_embedding(tmp_path):
    model = lower_rank(text_model(mask_zero=False))
    result = check_compact(model, IDS, tmp_path / "small.keras", saves_macs=False)
    (row,) = result.rows
    assert (row.before, row.after, row.note) == (120, 44, "rank 2 of 10")
    (pair,) = result.model.layers
    assert [type(inner) for inner in pair.layers] == [layers.Embedding, layers.Dense]
    assert macs_by_layer(result.model) == {"table/table_left": 0, "table/table_right": 100}
    check_training(result.model, IDS)


@slow_on_jax
def test_masks_of_an_embedding_go_on(tmp_path):
    """In a Sequential and in a functional model; the masked steps count for nothing."""
    sequence = text_model(layers.LSTM(4, return_sequences=True), layers.GRU(3))
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(12, 10, mask_zero=True)(inputs)
    functional = keras.Model(inputs, layers.GRU(3)(layers.LSTM(4, return_sequences=True)(x)))
    other = np.where(IDS == 0, 5, IDS)
    for model in (sequence, functional):
        lower_rank(model)
        result = check_compact(model, IDS, tmp_path / "small.keras", saves_macs=False)
        (masked,), (unmasked,) = outputs_of(result.model, IDS), outputs_of(result.model, other)
        assert np.max(np.abs(masked - unmasked)) > 1e-3
        np.testing.assert_allclose(result.model.predict(IDS, verbose=0), masked, atol=1e-5)


def test_ids_are_not_rounded_in_mixed_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential(
            [keras.Input((2,), dtype="int32"), layers.Embedding(1000, 8, name="table")]
        )
        model.layers[0].embeddings.assign(np.outer(np.arange(1000.0), np.ones(8)) / 1000)
        small = compact(model).model
        assert small.layers[0].layers[0].output_dim == 1
        (received,) = outputs_of(small, np.array([[513, 999]], "int32"))
        np.testing.assert_allclose(received[0, :, 0].astype("float32"), [0.513, 0.999], rtol=0.02)
    finally:
        keras.config.set_dtype_policy(previous)


def test_what_an_embedding_keeps():
    model = lower_rank(text_model(embeddings_regularizer="l2", embeddings_constraint="max_norm"))
    model.layers[0].trainable = False
    left, right = compact(model).model.layers[0].layers
    assert left.embeddings_regularizer is None
    assert left.embeddings_constraint is None
    assert left.mask_zero
    assert not left.trainable
    assert not right.trainable


def test_an_embedding_that_is_read_in_reverse_stays():
    inputs = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(12, 10, name="table")
    model = lower_rank(keras.Model(inputs, table(table(inputs), reverse=True)))
    result = compact(model)
    assert result.rows[0].note == "as it is: its table is read in both directions"
    check_same(model, result.model, IDS)


def test_two_inputs_of_ids_with_tables_of_different_sizes():
    """The comparison of the models uses ids that are in the tables."""
    one, two = (keras.Input((3,), dtype="int32", name=name) for name in "ab")
    x = layers.Embedding(40, 10)(one) + layers.Embedding(2, 10)(two)
    model = lower_rank(keras.Model([one, two], x))
    check_compact(model, [IDS[:, :3], IDS[:, :3] % 2], saves_macs=False)


@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", ["embedding", "einsum"])
def test_litert(kind, tmp_path):
    if kind == "embedding":
        model = text_model(layers.Flatten(), layers.Dense(3), mask_zero=False)
    else:
        model = einsum((5, 16), "abc,cd->abd", (None, 20), bias_axes="d", activation="relu")
    small = compact(lower_rank(model)).model
    assert export.to_litert(small, tmp_path / "small.tflite").max_error < 1e-5
