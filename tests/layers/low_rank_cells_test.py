"""Cells of low rank against those of Keras with the product of the two thin kernels."""

import itertools

import keras
import numpy as np
import pytest

from keras_compaware import LowRank, UniformQuantization, compress, find_targets
from keras_compaware.layers import LowRankGRUCell, LowRankLSTMCell, LowRankSimpleRNNCell
from keras_compaware.measure import macs, parameters
from tests.marks import slow_on_jax

layers = keras.layers
BACKEND = keras.backend.backend()
PAIRS = {
    "LSTM": (LowRankLSTMCell, layers.LSTMCell, 4),
    "GRU": (LowRankGRUCell, layers.GRUCell, 3),
    "SimpleRNN": (LowRankSimpleRNNCell, layers.SimpleRNNCell, 1),
}
OPTIONS = {
    "plain": {},
    "without bias": {"use_bias": False},
    "another activation": {"activation": "relu"},
    "dropout of the inputs": {"dropout": 0.3},
    "dropout of the state": {"recurrent_dropout": 0.3},
    "both dropouts": {"dropout": 0.3, "recurrent_dropout": 0.3},
}
CASES = [
    *itertools.product(PAIRS, OPTIONS.values()),
    *itertools.product(["GRU"], [{**option, "reset_after": False} for option in OPTIONS.values()]),
    ("LSTM", {"implementation": 1}),
    ("GRU", {"implementation": 1}),
]


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pair_of_cells(kind, options, units=6, rank=2):
    thin, plain, _ = PAIRS[kind]
    thin = thin(units, rank=rank, seed=3, **options)
    plain = plain(units, seed=3, **options)
    for cell in (thin, plain):
        cell.build((2, 4))
    plain.kernel.assign(array(thin.kernel))
    product = array(thin.recurrent_projection) @ array(thin.recurrent_kernel)
    plain.recurrent_kernel.assign(product)
    if thin.use_bias:
        for cell in (thin, plain):
            cell.bias.assign(data(*cell.bias.shape, seed=1))
    return thin, plain


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{kind}-{options}" for kind, options in CASES]
)
def test_the_product_of_the_kernels(kind, options):
    """One step, also with the dropout masks of training, which are drawn alike."""
    cells = pair_of_cells(kind, options)
    states = [data(2, 6, seed=number) for number in range(2 if kind == "LSTM" else 1)]
    for training in (False, True):
        steps = [keras.tree.flatten(c(data(2, 4), states, training=training)) for c in cells]
        assert len(steps[0]) == len(steps[1]) == len(states) + 1
        for received, expected in zip(*steps, strict=True):
            np.testing.assert_allclose(array(received), array(expected), atol=1e-5)
    if any("dropout" in name for name in options):
        still = keras.tree.flatten(cells[0](data(2, 4), states, training=False))
        assert np.max(np.abs(array(still[0]) - array(steps[0][0]))) > 1e-3


@pytest.mark.parametrize("kind", PAIRS)
def test_sequences_files_and_measures(kind, tmp_path):
    thin, plain = pair_of_cells(kind, {})
    models = [
        keras.Sequential([keras.Input((5, 4)), layers.RNN(cell, return_sequences=True)])
        for cell in (thin, plain)
    ]
    outputs = [array(model(data(2, 5, 4))) for model in models]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    gates = PAIRS[kind][2]
    saved = 6 * gates * 6 - 2 * (6 + gates * 6)
    assert parameters(models[1]) - parameters(models[0]) == saved
    assert macs(models[1]) - macs(models[0]) == 5 * saved
    models[0].save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0].cell) is type(thin)
    assert loaded.layers[0].cell.rank == 2
    np.testing.assert_allclose(array(loaded(data(2, 5, 4))), outputs[0], atol=1e-6)


def test_a_reset_gate_before_the_product_multiplies_more():
    thin, _ = pair_of_cells("GRU", {"reset_after": False})
    after, _ = pair_of_cells("GRU", {})
    assert thin.recurrent_macs - after.recurrent_macs == 6 * 2


def test_fresh_kernels_are_orthogonal():
    cell, _ = pair_of_cells("LSTM", {})
    values = np.linalg.svd(
        array(cell.recurrent_projection) @ array(cell.recurrent_kernel), compute_uv=False
    )
    np.testing.assert_allclose(values, [1, 1, 0, 0, 0, 0], atol=1e-5)


@slow_on_jax
@pytest.mark.parametrize("kind", PAIRS)
def test_training_and_compressing_further(kind):
    cell = PAIRS[kind][0](8, rank=4)
    model = keras.Sequential([keras.Input((3, 5)), layers.RNN(cell), layers.Dense(2)])
    targets = [t.name.split("/")[-1] for t in find_targets(model)[0] if t.layer is cell]
    assert targets == ["kernel", "recurrent_projection", "recurrent_kernel"]
    before = [array(variable).copy() for variable in model.trainable_variables]
    model.compile("sgd", "mse", run_eagerly=BACKEND == "tensorflow")
    model.fit(data(4, 3, 5), data(4, 2), verbose=0)
    for old, variable in zip(before, model.trainable_variables, strict=True):
        assert np.any(old != array(variable))
    thin = compress(model, LowRank(rank=1)).layers[0].cell
    assert np.linalg.matrix_rank(array(thin.recurrent_projection), tol=1e-5) == 1
    coarse = compress(model, UniformQuantization(2)).layers[0].cell
    assert len(np.unique(array(coarse.recurrent_kernel))) <= 4


@pytest.mark.parametrize("rank", [0, 7, 1.5, None])
def test_ranks_out_of_range(rank):
    for thin, _, _ in PAIRS.values():
        with pytest.raises((TypeError, ValueError), match=f"{thin.__name__}.*rank"):
            thin(6, rank=rank)
