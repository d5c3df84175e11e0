"""The nuclear norm beyond a rank, and together with groups."""

import keras
import numpy as np
import pytest

from keras_compaware import (
    GroupLasso,
    LowRankGroupSparsity,
    NuclearNorm,
    Penalty,
    Proximal,
    Recipe,
    Rule,
    TruncatedNuclearNorm,
)
from keras_compaware.base import KernelAxes, axes_by_rank
from tests.laws.helpers import array, eagerly, value_and_gradient

PLAIN = axes_by_rank(2)


def prox(regularizer, w, step_size):
    with eagerly():
        return array(regularizer.prox(w, step_size))


def spectrum(w):
    return np.linalg.svd(w, compute_uv=False)


# ---- truncated nuclear norm -------------------------------------------------------------------


def test_truncated_by_hand():
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
    w = (turn @ np.diag([5.0, 3.0, 2.0])).astype("float32")
    regularizer = TruncatedNuclearNorm(0.5, target_rank=1)
    value, gradient = value_and_gradient(regularizer, w)
    assert value == pytest.approx(2.5, rel=1e-6)
    np.testing.assert_allclose(gradient, turn @ np.diag([0, 0.5, 0.5]), atol=1e-6)
    expected = turn @ np.diag([5.0, 0.5, 0.0])
    np.testing.assert_allclose(prox(regularizer, w, 5.0), expected, atol=1e-5)


def test_nothing_anywhere_is_better_than_the_truncated_map():
    """The penalty is not convex, so the search is not only near the result."""
    random = np.random.default_rng(0)
    w = random.normal(size=(3, 3)).astype("float32")
    values = spectrum(w)
    step_size = float(values[1] + values[2]) / 2
    z = random.normal(size=(20_000, 3, 3)) * random.choice([1e-2, 0.1, 0.5, 1, 3], (20_000, 1, 1))
    result = prox(TruncatedNuclearNorm(1.0, target_rank=1), w, step_size)
    z = np.concatenate([result + z, w + z, z])

    def objective(z):
        tails = np.linalg.svd(z, compute_uv=False)[..., 1:].sum(axis=-1)
        return 0.5 * np.sum((z - w) ** 2, axis=(-1, -2)) + step_size * tails

    assert objective(z).min() >= objective(result) - 1e-5
    assert objective(result) < objective(prox(NuclearNorm(1.0), w, step_size))


def test_a_low_rank_kernel_is_not_changed():
    random = np.random.default_rng(1)
    w = (random.normal(size=(8, 2)) @ random.normal(size=(2, 6))).astype("float32")
    regularizer = TruncatedNuclearNorm(1.0, target_rank=2)
    value, gradient = value_and_gradient(regularizer, w)
    assert value == 0.0  # rounding is not penalised
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_allclose(prox(regularizer, w, 100.0), w, atol=1e-5)
    with eagerly():
        assert int(regularizer.rank(w)) == 2


def test_it_is_refused_in_the_loss_of_a_layer():
    layer = keras.layers.Dense(4, kernel_regularizer=TruncatedNuclearNorm(0.1, target_rank=2))
    layer.build((None, 3))
    with pytest.raises(ValueError, match=r"cannot be a `kernel_regularizer=` .* Proximal\(Trunc"):
        _ = layer.losses


def test_it_acts_in_training():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="only")])
    regularizer = TruncatedNuclearNorm(1000.0, target_rank=2)
    recipe = Recipe([Rule("only", Proximal(regularizer, every=4))])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    model.fit(x, x[:, :5], batch_size=8, verbose=0, callbacks=recipe.callbacks(model))
    values = spectrum(array(model.get_layer("only").kernel))
    assert np.sum(values > 1e-5 * values[0]) == 2


def test_a_matrix_of_that_rank_is_left_alone():
    regularizer = TruncatedNuclearNorm(1.0, target_rank=3)
    reason = "a 3 x 8 matrix has no singular values beyond 3"
    assert regularizer.reason_to_skip((3, 8), PLAIN) == reason
    assert regularizer.reason_to_skip((4, 8), PLAIN) is None
    spatial = regularizer.replace(split="spatial")
    axes = KernelAxes((2,), (3,), (0, 1))
    assert regularizer.reason_to_skip((3, 3, 1, 3), axes) == "a 9 x 3" + reason[7:]
    assert spatial.reason_to_skip((3, 3, 1, 3), axes) == "a 3 x 9" + reason[7:]


# ---- nuclear norm and group lasso -------------------------------------------------------------


def soft(w, threshold):
    left, values, right = np.linalg.svd(w, full_matrices=False)
    return left * np.maximum(values - threshold, 0) @ right


def shrunk_rows(w, threshold):
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    return w * np.maximum(0, 1 - threshold / np.maximum(norms, 1e-300))


def by_dykstra(w, first, second, rounds=500):
    """The proximal map of the sum, by Dykstra's splitting, in float64."""
    x, p, q = w, np.zeros_like(w), np.zeros_like(w)
    for _ in range(rounds):
        y = soft(x + p, first)
        p = x + p - y
        x = shrunk_rows(y + q, second)
        q = y + q - x
    np.testing.assert_allclose(x, y, atol=1e-3)
    return x


@pytest.mark.parametrize(
    ("part", "first_gap", "groups_gap"), [(0.1, 1e-4, 5e-4), (0.5, 0.01, 0.015)]
)
def test_one_map_after_the_other_is_nearly_that_of_the_sum(part, first_gap, groups_gap):
    random = np.random.default_rng(0)
    gaps = []
    for shape in 4 * [(8, 12), (12, 8)]:
        w = random.normal(size=shape)
        first = part * spectrum(w)[0]
        second = part * np.linalg.norm(w, axis=1).mean()

        def objective(z, w=w, first=first, second=second):
            norms = np.linalg.norm(z, axis=1).sum()
            return 0.5 * np.sum((z - w) ** 2) + first * spectrum(z).sum() + second * norms

        best = objective(by_dykstra(w, first, second))
        regularizer = LowRankGroupSparsity(first, second, weighted=False)
        results = [
            prox(regularizer.replace(order=order), w.astype("float32"), 1.0).astype("float64")
            for order in ("singular_values_first", "groups_first")
        ]
        gaps.append([objective(result) / best - 1 for result in results])
    gaps = np.array(gaps)
    assert gaps.min() > -1e-5  # the oracle is the optimum
    np.testing.assert_array_less(gaps.max(axis=0), [first_gap, groups_gap])
    assert gaps[:, 0].mean() < gaps[:, 1].mean()


@pytest.mark.parametrize("order", ["singular_values_first", "groups_first"])
@pytest.mark.parametrize("axis", ["inputs", "outputs"])
def test_zeros_and_rank_are_exact(order, axis):
    random = np.random.default_rng(2)
    w = random.normal(size=(8, 12)) * np.geomspace(0.1, 3, 8)[:, None]
    w = (w if axis == "inputs" else w.T).astype("float32")
    regularizer = LowRankGroupSparsity(4.0, 0.5, axis=axis, weighted=False, order=order)
    result = prox(regularizer, w, 1.0)
    zero = np.all(result == 0, axis=1 if axis == "inputs" else 0)
    assert 2 <= np.sum(zero) < 8
    values = spectrum(result)
    rank = int(np.sum(values > 1e-5 * values[0]))
    assert rank < 8 - np.sum(zero)
    with eagerly():
        assert int(regularizer.rank(result)) == rank


def test_with_one_strength_it_is_the_other_alone():
    w = np.random.default_rng(3).normal(size=(6, 5)).astype("float32")
    result = prox(LowRankGroupSparsity(0.4, 0.0), w, 2.0)
    np.testing.assert_allclose(result, prox(NuclearNorm(0.4), w, 2.0), atol=1e-6)
    result = prox(LowRankGroupSparsity(1e-9, 0.4), w, 2.0)
    np.testing.assert_allclose(result, prox(GroupLasso(0.4), w, 2.0), atol=1e-5)


def test_half_precision_is_rounded_once():
    """Rounding between the maps would be seen at the thresholds that leave little of a row."""
    w = np.random.default_rng(4).normal(size=(6, 5)).astype("float16")
    regularizer = LowRankGroupSparsity(0.4, 0.3)
    expected = prox(regularizer, w.astype("float32"), 1.0).astype("float16")
    with eagerly():
        result = keras.ops.convert_to_numpy(regularizer.prox(keras.ops.convert_to_tensor(w), 1.0))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TruncatedNuclearNorm(-1.0, 2), ValueError, "`strength` must be in"),
        (lambda: TruncatedNuclearNorm(1.0, 0), ValueError, "`target_rank` must be at least 1"),
        (lambda: TruncatedNuclearNorm(1.0, 0.5), TypeError, "`target_rank` must be an integer"),
        (lambda: TruncatedNuclearNorm(1.0, 2, "rows"), ValueError, "`split` must be one of"),
        (lambda: LowRankGroupSparsity(-1.0, 1.0), ValueError, "`strength` must be in"),
        (lambda: LowRankGroupSparsity(1.0, -1.0), ValueError, "`group_strength` must be in"),
        (lambda: LowRankGroupSparsity(0.0, 1.0), ValueError, "for groups use GroupLasso"),
        (lambda: LowRankGroupSparsity(1.0, 1.0, "rows"), ValueError, "`split` must be one of"),
        (lambda: LowRankGroupSparsity(1.0, 1.0, axis="rows"), ValueError, "`axis` must be one of"),
        (lambda: LowRankGroupSparsity(1.0, 1.0, order="both"), ValueError, "`order` must be one"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_penalty_of_it_is_refused_when_it_is_evaluated():
    recipe = Recipe([Rule("only", Penalty(TruncatedNuclearNorm(0.1, target_rank=2)))])
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, name="only")])
    with pytest.raises(ValueError, match="cannot be a `kernel_regularizer=` or a Penalty"):
        _ = recipe.wrap(model).losses
