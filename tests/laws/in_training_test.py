"""Compressors where they are used: compiled, in every step of `fit`, again and again."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import MagnitudePruning, UniformQuantization
from keras_compaware._math.backend import compiled
from keras_compaware.base import axes_by_rank
from tests.laws.cases import COMPRESSORS
from tests.laws.helpers import array, compiled_map, eagerly, norm
from tests.marks import slow_on_jax

SIMPLE = [case for case in COMPRESSORS if not case.compressor.needs_decomposition]
DECOMPOSING = [case for case in COMPRESSORS if case.compressor.needs_decomposition]


@slow_on_jax
def test_they_are_constraints_of_a_compiled_fit():
    """One layer for each; after `fit` a kernel is a fixed point of an idempotent one."""
    inputs = keras.Input((8,))
    outputs = [
        keras.layers.Dense(6, kernel_constraint=case.compressor, name=f"layer{number}")(inputs)
        for number, case in enumerate(SIMPLE)
    ]
    model = keras.Model(inputs, keras.layers.Concatenate()(outputs))
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    random = np.random.default_rng(0)
    x = random.normal(size=(32, 8)).astype("float32")
    y = random.normal(size=(32, 6 * len(SIMPLE))).astype("float32")
    before = [array(model.get_layer(f"layer{n}").kernel) for n in range(len(SIMPLE))]
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for number, case in enumerate(SIMPLE):
        w = array(model.get_layer(f"layer{number}").kernel)
        assert np.any(w != before[number])
        if case.idempotent:
            again = array(compiled_map(case.compressor, axes_by_rank(2))(ops.convert_to_tensor(w)))
            limit = 0 if case.exact else 1e-6
            np.testing.assert_allclose(again, w, rtol=0, atol=limit, err_msg=case.name)
        if isinstance(case.compressor, MagnitudePruning):
            assert np.sum(w != 0) == case.compressor.num_kept(w.shape)


@pytest.mark.parametrize("case", DECOMPOSING, ids=lambda case: case.id)
def test_decompositions_are_refused_as_constraints(case):
    layer = keras.layers.Dense(6, kernel_constraint=case.compressor, name="wide")
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile("sgd", "mse")
    x, y = np.zeros((4, 8), "float32"), np.zeros((4, 6), "float32")
    with eagerly():  # a tensor, by hand, is welcome
        assert array(case.compressor(layer.kernel.value)).shape == (8, 6)
    name = type(case.compressor).__name__
    message = rf"{name} needs a matrix decomposition[\s\S]*OccasionalCompression\({name}"
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scale_does_not_ratchet(bits):
    """Quantize, disturb by 1 % of the standard deviation, 200 times over."""
    random = np.random.default_rng(0)
    w = random.normal(size=1000).astype("float32")
    quantize = compiled_map(UniformQuantization(bits), axes_by_rank(1))
    ours, start = w, None
    for _ in range(200):
        ours = array(quantize(ops.convert_to_tensor(ours)))
        start = norm(ours) if start is None else start
        ours = ours + (0.01 * ours.std() * random.normal(size=1000)).astype("float32")
    assert 1 / 1.3 < norm(ours) / start < 1.3


def test_a_scale_anchored_at_the_largest_magnitude_would_ratchet():
    """What the test above guards against, shown to be seen by it."""
    random = np.random.default_rng(0)
    for bits in (2, 3):
        levels = 2 ** (bits - 1) - 1
        w = random.normal(size=1000)
        start = None
        for _ in range(200):
            scale = np.abs(w).max() / levels
            w = scale * np.round(w / scale)
            start = np.linalg.norm(w) if start is None else start
            w = w + 0.01 * w.std() * random.normal(size=1000)
        assert np.linalg.norm(w) / start > 1.3


def test_a_ramped_sparsity_prunes_as_many_as_the_argument():
    """Exactly for numbers that float32 holds, else to one entry where the product is a tie."""
    for size in (60, 77):
        w = np.random.default_rng(2).normal(size=(1, size)).astype("float32")
        count = compiled(lambda w, s: ops.count_nonzero(MagnitudePruning(0.5)(w, budget=s)))
        for percent in range(0, 100, 3):
            for sparsity in (percent / 100, round(percent * 1.28) / 128):
                found = int(
                    count(ops.convert_to_tensor(w), ops.convert_to_tensor(np.float32(sparsity)))
                )
                expected = MagnitudePruning(sparsity).num_kept(w.shape)
                exact = float(np.float32(sparsity)) == sparsity
                assert abs(found - expected) <= (0 if exact else 1), (size, sparsity)
