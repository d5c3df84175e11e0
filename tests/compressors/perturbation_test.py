"""Weight decay and weight noise: hand values, moments, and where training settles with them."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import WeightDecay, WeightNoise
from keras_compaware._math.backend import compiled
from keras_compaware.base import Compressor, Perturbation


def array(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def test_decay_by_hand():
    w = np.array([[2.0, -1.0], [0.0, 0.5]], "float32")
    np.testing.assert_allclose(array(WeightDecay(0.25)(w)), [[1.5, -0.75], [0, 0.375]])
    np.testing.assert_array_equal(array(WeightDecay(0.0)(w)), w)
    np.testing.assert_allclose(array(WeightDecay(0.25)(w, budget=0.5)), 0.5 * w)
    decay = compiled(lambda w, rate: WeightDecay(0.0)(w, budget=rate))
    traced = decay(ops.convert_to_tensor(w), ops.convert_to_tensor(np.float32(0.5)))
    np.testing.assert_allclose(array(traced), 0.5 * w)


@pytest.mark.parametrize(
    ("curvature", "period", "strength", "settled"),
    [
        (0.05, 1, 0.05, 0.501), (0.05, 10, 0.5, 0.507), (0.05, 100, 5.0, 0.566),
        (0.5, 1, 0.05, 0.913), (0.5, 10, 0.5, 0.931), (0.5, 100, 5.0, 0.997),
    ],
)  # fmt: skip
def test_where_gradient_descent_with_occasional_decay_settles(curvature, period, strength, settled):
    """Equal strength per step; w0 = 1, so that a plain L2 penalty would end at h / (h + .05)."""
    step_size = 0.1
    decay = compiled(WeightDecay(step_size * strength))
    w = np.ones(1, "float32")
    for _ in range(1000 // period + 20):
        for _ in range(period):
            w = w - step_size * curvature * (w - 1)
        before = w
        w = array(decay(ops.convert_to_tensor(w)))
    assert before[0] == pytest.approx(settled, abs=6e-4)
    assert w[0] == pytest.approx((1 - step_size * strength) * before[0], rel=1e-5)


@pytest.mark.parametrize(("distribution", "kurtosis"), [("uniform", 1.8), ("normal", 3.0)])
def test_the_moments_of_the_noise(distribution, kurtosis):
    w = np.full((500, 400), 0.5, "float32")
    noise = array(WeightNoise(0.2, distribution)(w, key=3)).astype("float64") - 0.5
    assert noise.mean() == pytest.approx(0, abs=0.002)
    assert noise.std() == pytest.approx(0.2, rel=0.01)
    assert np.mean(noise**4) / noise.var() ** 2 == pytest.approx(kurtosis, rel=0.03)
    assert np.corrcoef(noise[:, ::2].ravel(), noise[:, 1::2].ravel())[0, 1] == pytest.approx(
        0, abs=0.02
    )
    largest = np.abs(noise).max() / 0.2
    assert (largest <= 3**0.5 + 1e-4) == (distribution == "uniform")
    assert largest > 1.73


def test_the_noise_is_that_of_seed_and_key():
    w = np.zeros((100, 100), "float32")

    def noise(seed=0, key=0):
        return array(WeightNoise(1.0, seed=seed)(w, key=key))

    np.testing.assert_array_equal(noise(5, 7), noise(5, 7))
    np.testing.assert_array_equal(noise(5, 0), array(WeightNoise(1.0, seed=5)(w)))
    assert np.all(np.isfinite(noise(2**40, 2**32 - 1)))
    several = [noise(s, k).ravel() for s, k in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))]
    correlations = np.corrcoef(several) - np.eye(len(several))
    assert np.abs(correlations).max() < 0.05
    scaled = array(WeightNoise(1.0)(w, budget=0.25))
    np.testing.assert_allclose(scaled, 0.25 * noise(), rtol=1e-6)


@pytest.mark.parametrize(("period", "variance"), [(1, 9.2e-2), (10, 5.6e-3)])
def test_the_spread_that_occasional_noise_leaves(period, variance):
    """Variance before the next application: s^2 q^2 / (1 - q^2) with q = (1 - .1 * .5)^p."""
    w = np.zeros(20_000, "float32")
    for firing in range(100 // period):
        w = array(WeightNoise(0.1)(w, key=firing)) * np.float32(0.95**period)
    assert w.var() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("map_", [WeightDecay(0.5), WeightNoise(0.1), WeightNoise(0.1, "normal")])
def test_shape_dtype_and_configuration_are_kept(map_):
    w = ops.cast(np.ones((3, 4), "float32"), "bfloat16")
    result = map_(w)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    assert tuple(result.shape) == (3, 4)
    text = json.dumps(keras.saving.serialize_keras_object(map_))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert restored == map_
    assert isinstance(map_, Perturbation)
    assert not isinstance(map_, Compressor)
    assert map_.is_random == isinstance(map_, WeightNoise)
    assert getattr(map_, map_.budget) in (0.5, 0.1)


def test_decay_can_be_a_constraint_but_noise_cannot():
    def network(constraint):
        layer = keras.layers.Dense(3, use_bias=False, kernel_constraint=constraint, name="wide")
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    model = network(WeightDecay(0.5))
    before = array(model.layers[0].kernel)
    model.fit(x, y, batch_size=4, verbose=0)
    np.testing.assert_allclose(array(model.layers[0].kernel), before / 4, rtol=1e-6)
    message = r"WeightNoise cannot be a `kernel_constraint=`(.|\n)*OccasionalCompression"
    with pytest.raises(ValueError, match=message):
        network(WeightNoise(0.1)).fit(x, y, verbose=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightDecay(1.0), ValueError, "`rate` must be below 1"),
        (lambda: WeightDecay(-0.1), ValueError, r"`rate` must be in \[0, 1\]"),
        (lambda: WeightNoise(-1.0), ValueError, r"`stddev` must be in \[0, inf\)"),
        (lambda: WeightNoise(0.1, "laplace"), ValueError, "one of 'uniform', 'normal'"),
        (lambda: WeightNoise(0.1, seed=-1), ValueError, "`seed` must be at least 0"),
        (lambda: WeightNoise(0.1, seed=0.5), TypeError, "`seed` must be an integer"),
        (lambda: WeightNoise(0.1)(np.ones(3, "float32"), key="a"), TypeError, "`key` must be an"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
