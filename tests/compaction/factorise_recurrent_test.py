"""Recurrent layers whose input kernels, or recurrent ones, have low rank."""

import keras
import numpy as np
import pytest

import keras_compaware as kc
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
from keras_compaware.layers import LowRankGRUCell, LowRankLSTMCell, LowRankSimpleRNNCell
from tests.compaction.helpers import (
    array,
    check_compact,
    check_same,
    check_training,
    data,
    lower_rank,
    outputs_of,
)
from tests.marks import slow_on_jax

layers = keras.layers
BACKEND = keras.backend.backend()
KINDS = {"LSTM": LowRankLSTMCell, "GRU": LowRankGRUCell, "SimpleRNN": LowRankSimpleRNNCell}
SHAPE = (5, 16)
X = data(SHAPE)


def single(layer, shape=SHAPE):
    return keras.Sequential([keras.Input(shape), layer])


def recurrent(kind="LSTM", units=12, **arguments):
    return getattr(layers, kind)(units, name="a", **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_of_the_inputs(kind, tmp_path):
    model = lower_rank(single(recurrent(kind)))
    result = check_compact(model, X, tmp_path / "small.keras")
    (row,) = result.rows
    full = min(16, model.layers[0].cell.kernel.shape[1])
    assert row.note == (
        f"rank 2 of {full}; recurrent kernel as it is: rank 2 of 12 needs recurrent_kernels=True"
    )
    (pair,) = result.model.layers
    assert pair.name == "a"
    assert [type(inner).__name__ for inner in pair.layers] == ["Dense", kind]
    assert [inner.name for inner in pair.layers] == ["a_left", "a_right"]
    assert pair.layers[1].cell.kernel.shape[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_of_the_state(kind, tmp_path):
    model = lower_rank(single(recurrent(kind)))
    result = check_compact(model, X, tmp_path / "small.keras", recurrent_kernels=True)
    assert result.rows[0].note.endswith("; recurrent kernel rank 2 of 12")
    rnn = result.model.layers[0].layers[1]
    assert type(rnn) is layers.RNN
    assert type(rnn.cell) is KINDS[kind]
    assert rnn.cell.rank == 2
    again = compact(result.model, recurrent_kernels=True)
    assert again.rows[1].note.endswith("recurrent kernel as it is: of low rank already")
    assert again.model.count_params() == result.model.count_params()


def test_low_rank_of_the_state_only():
    model = lower_rank(single(recurrent("GRU")), only="recurrent")
    result = check_compact(model, X, recurrent_kernels=True)
    assert result.rows[0].note == (
        "input kernel as it is: rank 16 of 16 (channel) saves nothing; "
        "recurrent kernel rank 2 of 12"
    )
    assert type(result.model.layers[0]) is layers.RNN
    assert result.model.layers[0].name == "a"


def test_training_goes_on():
    small = compact(lower_rank(single(recurrent())), recurrent_kernels=True).model
    check_training(small, X)
    names = [target.name for target in kc.find_targets(small)[0]]
    assert [name.split("/")[-1] for name in names] == [
        "kernel", "kernel", "recurrent_projection", "recurrent_kernel"
    ]  # fmt: skip


VARIANTS = {
    "sequences, backwards": {"return_sequences": True, "go_backwards": True},
    "unrolled, without bias": {"unroll": True, "use_bias": False},
}


@slow_on_jax
@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("split", [False, True], ids=["inputs", "state too"])
def test_options_stay(arguments, split):
    for kind in KINDS:
        model = lower_rank(single(recurrent(kind, **arguments)))
        check_compact(model, X, recurrent_kernels=split)


@slow_on_jax
def test_a_reset_gate_before_the_product():
    """The state passes the thin factor twice: a rank that saves only parameters stays."""
    model = lower_rank(single(recurrent("GRU", reset_after=False)))
    check_compact(model, X, recurrent_kernels=True)
    model = single(recurrent("GRU", reset_after=False))
    lower_rank(model, rank=8)  # 8 * (12 + 36) = 384 of 432, but 480 multiply-accumulates
    (row,) = compact(model, recurrent_kernels=True).rows
    assert row.note.endswith(
        "recurrent kernel as it is: rank 8 of 12 saves no multiply-accumulates"
    )


def test_a_layer_of_cells():
    model = lower_rank(single(layers.RNN(layers.GRUCell(12, kernel_regularizer="l2"), name="a")))
    result = check_compact(model, X)
    rnn = result.model.layers[0].layers[1]
    assert type(rnn.cell) is layers.GRUCell
    assert rnn.cell.kernel_regularizer is None
    stacked = single(layers.RNN([layers.GRUCell(3), layers.GRUCell(3)], name="a"))
    assert compact(stacked).rows[0].note == (
        "as it is: its cell is of another kind (StackedRNNCells)"
    )


def test_high_ranks_and_states_of_a_batch_stay():
    assert compact(single(recurrent())).rows[0].note == (
        "as it is: rank 16 of 16 (channel) saves nothing; "
        "recurrent kernel as it is: rank 12 of 12 (channel) saves nothing"
    )
    model = keras.Sequential([keras.Input(batch_shape=(2, *SHAPE)), recurrent(stateful=True)])
    (row,) = compact(lower_rank(model)).rows
    assert row.note == "as it is: it is stateful: its states belong to a batch, not to the model"


@slow_on_jax
@pytest.mark.parametrize("split", [False, True], ids=["inputs", "state too"])
def test_states_in_and_out(split, tmp_path):
    """In a functional model, with the layers beside each other: a Sequential has one tensor."""
    inputs, state, carry = keras.Input(SHAPE), keras.Input((12,)), keras.Input((12,))
    outputs = recurrent(return_state=True)(inputs, initial_state=[state, carry])
    model = lower_rank(keras.Model([inputs, state, carry], outputs))
    xs = [X, data((12,), seed=1), data((12,), seed=2)]
    result = check_compact(model, xs, tmp_path / "small.keras", recurrent_kernels=split)
    assert result.model.get_layer("a_left").units == 2
    assert result.model.get_layer("a").cell.kernel.shape == (2, 48)


@slow_on_jax
@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_share_their_inputs(kind, tmp_path):
    layer = layers.Bidirectional(recurrent(kind, 30, return_sequences=True), name="both")
    model = lower_rank(single(layer, (5, 24)))
    x = data((5, 24))
    result = check_compact(model, x, tmp_path / "small.keras")
    assert result.rows[0].note.startswith("rank 4 of 24; forward recurrent kernel as it is: rank 2")
    left, right = result.model.layers[0].layers
    assert (left.name, left.units, right.name) == ("both_left", 4, "both_right")
    assert type(right) is layers.Bidirectional


@slow_on_jax
def test_both_directions_of_the_state():
    """Also where they are of different kinds, and the outputs are added."""
    backward = layers.GRU(30, go_backwards=True)
    layer = layers.Bidirectional(
        layers.LSTM(30), backward_layer=backward, merge_mode="sum", name="both"
    )
    model = lower_rank(single(layer, (5, 24)))
    result = check_compact(model, data((5, 24)), recurrent_kernels=True)
    assert result.rows[0].note == (
        "rank 4 of 24; forward recurrent kernel rank 2 of 30; "
        "backward recurrent kernel rank 2 of 30"
    )
    both = result.model.layers[0].layers[1]
    assert type(both.forward_layer.cell) is LowRankLSTMCell
    assert type(both.backward_layer.cell) is LowRankGRUCell


@slow_on_jax
def test_masks_reach_the_layer_and_go_on(tmp_path):
    x = X.copy()
    x[0, 3:] = 0
    x[1, 4:] = 0
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Masking(),
            recurrent(return_sequences=True),
            layers.Bidirectional(layers.GRU(9), name="b"),
        ]
    )
    result = check_compact(lower_rank(model), x, tmp_path / "small.keras")
    other = x.copy()
    other[0, 3:] = 1
    (masked,), (unmasked,) = outputs_of(result.model, x), outputs_of(result.model, other)
    assert np.max(np.abs(masked - unmasked)) > 1e-3
    np.testing.assert_allclose(result.model.predict(x, verbose=0), masked, atol=1e-5)


@slow_on_jax
def test_dropout_of_the_inputs_stays_where_it_was():
    """Entries of the inputs, the same at all steps, not of what the Dense layer makes of them."""
    model = lower_rank(single(recurrent(dropout=0.5, seed=1, return_sequences=True)))
    dropout, _, rnn = compact(model).model.layers[0].layers
    assert rnn.cell.dropout == 0
    dropped = array(dropout(np.ones((1, 4, 1000), "float32"), training=True))
    assert np.all(dropped == dropped[:, :1])
    assert abs(np.mean(dropped == 0) - 0.5) < 0.1
    model = lower_rank(single(recurrent(dropout=0.5, recurrent_dropout=0.1)))
    assert (
        compact(model)
        .rows[0]
        .note.startswith("as it is: its inputs are dropped for each gate by itself")
    )
    check_same(model, compact(model, recurrent_kernels=True).model, X)


def test_a_layer_of_another_kind_inside_both_directions():
    class Own(layers.LSTM):
        pass

    with keras.saving.custom_object_scope({"Own": Own}):
        model = lower_rank(single(layers.Bidirectional(Own(4), name="both")))
        assert compact(model).rows[0].note == ("as it is: it runs a layer of another kind (Own)")


@slow_on_jax
@pytest.mark.parametrize("both", [False, True], ids=["one direction", "both"])
def test_the_factors_of_codes_are_taken(both):
    layer = recurrent("GRU", 30)
    layer = layers.Bidirectional(layer, name="a") if both else layer
    model = single(layer, (5, 24))
    model.compile("sgd", "mse")
    rule = Rule(lambda target: True, Every(2, LowRank(rank=2)), AtEnd(UniformQuantization(4)))
    callback = Recipe([rule]).callbacks(model)[0]
    y = data((60 if both else 30,), 4, 1)
    model.fit(data((5, 24), 4), y, batch_size=2, callbacks=[callback], verbose=0)
    result = compact(model, callback.codes, recurrent_kernels=True)
    assert result.max_error < 1e-5
    left, right = result.model.layers[0].layers
    directions = [right.forward_layer, right.backward_layer] if both else [right]
    kernels = [left.kernel]
    for direction in directions:
        cell = direction.cell
        kernels += [cell.kernel, cell.recurrent_projection, cell.recurrent_kernel]
    # Codes of the two directions lie on grids of their own; side by side they take both.
    levels = [len(np.unique(array(kernel))) for kernel in kernels]
    assert levels[0] <= 15 * len(directions)
    assert max(levels[1:]) <= 16
    found = compact(model).model.layers[0].layers[0].kernel
    assert len(np.unique(array(found))) > 30


@pytest.mark.tensorflow
@pytest.mark.parametrize("split", [False, True], ids=["inputs", "state too"])
def test_litert(split, tmp_path):
    model = lower_rank(single(recurrent(unroll=True)))
    small = compact(model, recurrent_kernels=split).model
    assert export.to_litert(small, tmp_path / "small.tflite").max_error < 1e-5
