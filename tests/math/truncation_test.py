"""Truncation without a full decomposition, against NumPy's optimum."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware._math import truncation
from keras_compaware._math.backend import compiled
from keras_compaware._math.truncation import (
    COLD,
    WARM,
    attempt_from,
    certified,
    krylov_space,
    leading,
    truncated,
)

EIGENVALUES = {
    "exponential": lambda n: np.exp(-np.arange(n) / (n / 10)),
    "slow exponential": lambda n: np.exp(-np.arange(n) / (n / 6)),
    "harmonic": lambda n: 1 / np.arange(1.0, n + 1),
    "square root": lambda n: np.arange(1.0, n + 1) ** -0.5,
    "steps": lambda n: np.repeat([100.0, 1.0, 0.01], [20, 80, n - 100]),
}


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def with_values(rows, columns, values, seed=0):
    random = np.random.default_rng(seed)
    smaller = min(rows, columns)
    left, right = (np.linalg.qr(random.normal(size=(n, smaller)))[0] for n in (rows, columns))
    return ((left * values) @ right.T).astype("float32")


def least_error(matrix, rank):
    values = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    return np.sqrt(np.sum(values[rank:] ** 2))


def error(matrix, factors):
    left, right = (array(factor).astype("float64") for factor in factors)
    return np.linalg.norm(matrix - left @ right, axis=(-2, -1))


def assert_best(matrix, rank, factors, allowed=1e-3):
    """At most 0.1 % above the optimum, or rounding."""
    found, least = error(matrix[None], factors)[0], least_error(matrix, rank)
    assert found <= (1 + allowed) * least + 2e-5 * np.linalg.norm(matrix), (found, least)


class Counted:
    """Counts how often the full decomposition is computed."""

    def __init__(self, monkeypatch):
        self.count = 0
        self._svd = truncation.svd
        monkeypatch.setattr(truncation, "svd", self)

    def __call__(self, matrix, number):
        self.count += 1
        return self._svd(matrix, number)


@pytest.fixture
def decompositions(monkeypatch):
    return Counted(monkeypatch)


def eagerly(function, *args):
    """Only the branch that is taken runs."""
    if keras.backend.backend() == "jax":
        import jax

        with jax.disable_jit():
            return function(*args)
    return function(*args)


def drifted(matrix, rank, drift, seed=1):
    """A matrix of that rank, and what a few steps of training have made of it."""
    left, values, right = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
    before = (left[:, :rank] * values[:rank]) @ right[:rank]
    noise = np.random.default_rng(seed).normal(size=matrix.shape)
    noise *= drift * np.linalg.norm(before) / np.linalg.norm(noise)
    return before.astype("float32"), (before + noise).astype("float32")


# ---- warm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(80, 64), (64, 80), (576, 64)])
@pytest.mark.parametrize("drift", [1e-6, 1e-5, 3e-5, 1e-4, 1e-3, 0.02, 0.1])
def test_a_matrix_that_has_drifted_takes_no_decomposition(decompositions, rows, columns, drift):
    matrix = np.random.default_rng(0).normal(size=(rows, columns)).astype("float32")
    before, after = drifted(matrix, 16, drift)
    factors = eagerly(truncated, ops.convert_to_tensor(before[None]), 16)
    assert decompositions.count == 1
    warm = eagerly(truncated, ops.convert_to_tensor(after[None]), 16, factors)
    assert decompositions.count == 1
    assert_best(after, 16, warm)
    left, right = map(array, warm)
    assert (left.shape, right.shape) == ((1, rows, 16), (1, 16, columns))
    np.testing.assert_allclose(  # each singular value is shared evenly
        np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=2), rtol=1e-4
    )


@pytest.mark.parametrize("values", EIGENVALUES)
@pytest.mark.parametrize("drift", [0.01, 0.3])
def test_the_optimum_is_met_from_any_start(values, drift):
    matrix = with_values(150, 130, EIGENVALUES[values](130))
    before, after = drifted(matrix, 20, drift)
    start = truncated(ops.convert_to_tensor(before[None]), 20)
    for w in (after, matrix):
        assert_best(w, 20, compiled(lambda w: truncated(w, 20, start))(w[None]))


def adversaries():
    random = np.random.default_rng(0)
    matrix = with_values(96, 80, EIGENVALUES["steps"](110)[:80])
    left, _, right = np.linalg.svd(matrix)
    wrong = left[:, 30:40], right[30:40]
    one = left[:, 1:11], right[1:11]  # misses only the first direction
    nothing = np.zeros((96, 10)), np.zeros((10, 80))
    noise = random.normal(size=(96, 10)), random.normal(size=(10, 80))
    return matrix, {"orthogonal": wrong, "one missing": one, "zero": nothing, "noise": noise}


@pytest.mark.parametrize("case", ["orthogonal", "one missing", "zero", "noise"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_wrong_start_is_refused(decompositions, case, turned):
    matrix, starts = adversaries()
    left, right = (factor.astype("float32") for factor in starts[case])
    if turned:
        matrix, left, right = matrix.T.copy(), right.T, left.T
    start = ops.convert_to_tensor(left[None]), ops.convert_to_tensor(right[None])
    factors = eagerly(truncated, ops.convert_to_tensor(matrix[None]), 10, start)
    assert decompositions.count == 1
    assert_best(matrix, 10, factors, allowed=1e-5)


def products(matrix):
    """W and its transpose, as functions of what they are multiplied with."""
    w = ops.convert_to_tensor(matrix[None])
    return lambda x: ops.matmul(w, x), lambda y: ops.matmul(ops.swapaxes(w, -1, -2), y)


POLYNOMIALS = {"warm": WARM, "short": COLD[0][1], "long": COLD[1][1]}


@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@pytest.mark.parametrize("more", [0, 5])
def test_what_is_certified_is_the_optimum(polynomial, more):
    """A subspace turned away from the best one by and by: never held beyond 0.1 %."""
    random = np.random.default_rng(0)
    matrix = with_values(90, 80, np.repeat([1.0, 0.3], [10, 70]))
    right = np.linalg.svd(matrix)[2][: 10 + more].T
    away = np.linalg.qr(np.eye(80) - right @ right.T)[0][:, : 10 + more]
    away = away @ random.normal(size=(10 + more, 10 + more))

    @compiled
    def judge(basis):
        return certified(*products(matrix), basis, 10, POLYNOMIALS[polynomial])

    held = []
    for angle in np.geomspace(1e-4, 1, 25):
        basis = np.linalg.qr(right + angle * away)[0].astype("float32")
        holds, image, basis = map(array, judge(ops.convert_to_tensor(basis[None])))
        excess = error(matrix[None], (image, np.swapaxes(basis, 1, 2)))[0] / least_error(matrix, 10)
        held.append(bool(holds[0]))
        assert excess <= 1.001 or not held[-1], angle
    assert held[0]
    assert held == sorted(held, reverse=True)
    assert not held[-1]


@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@pytest.mark.parametrize("number", [10, 15])
@pytest.mark.parametrize("missed", [0, 5, 9])
def test_what_misses_a_direction_is_refused(polynomial, number, missed):
    """The other vectors are exact, so that nothing that they are mapped to tells of it."""
    matrix = with_values(90, 80, 0.9 ** np.arange(80))
    right = np.linalg.svd(matrix)[2].T
    basis = np.delete(right, missed, axis=1)[:, :number].astype("float32")
    holds, *_ = certified(
        *products(matrix), ops.convert_to_tensor(basis[None]), 10, POLYNOMIALS[polynomial]
    )
    assert not array(holds)[0]


def test_a_hundred_firings_do_not_drift_away():
    random = np.random.default_rng(0)
    w = random.normal(size=(96, 72)).astype("float32")
    factors = compiled(lambda w: truncated(w, 12))(w[None])
    again = compiled(lambda w, *factors: attempt_from(w, 12, factors))
    size = np.linalg.norm(array(factors[0]) @ array(factors[1]))
    for _ in range(100):
        w = (array(factors[0]) @ array(factors[1]))[0]
        noise = random.normal(size=w.shape)
        w = (w + 0.03 * np.linalg.norm(w) * noise / np.linalg.norm(noise)).astype("float32")
        holds, *factors = again(w[None], *factors)
        assert array(holds)
    assert_best(w, 12, factors)
    assert 0.9 < np.linalg.norm(array(factors[0]) @ array(factors[1])) / size < 2.0


def test_repeated_it_stays():
    w = drifted(with_values(80, 70, EIGENVALUES["harmonic"](70)), 10, 0.05)[1]
    function = compiled(lambda w, left, right: truncated(w, 10, (left, right)))
    factors = compiled(lambda w: truncated(w, 10))(w[None])
    first = array(factors[0]) @ array(factors[1])
    for _ in range(100):
        factors = function(ops.matmul(*factors), *factors)
    np.testing.assert_allclose(array(factors[0]) @ array(factors[1]), first, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_dead_rows_and_columns_stay_zero(decompositions, scale):
    w = drifted(np.random.default_rng(0).normal(size=(90, 80)), 10, 0.02)[1]
    w[[0, 7, 30]] = 0
    w[:, [0, 5, 50]] = 0
    for matrix in (w, w.T.copy()):
        decompositions.count = 0
        matrix = np.float32(scale) * matrix
        start = eagerly(truncated, ops.convert_to_tensor(matrix[None]), 10)
        left, right = map(array, eagerly(truncated, ops.convert_to_tensor(matrix[None]), 10, start))
        assert decompositions.count == 1
        assert np.all(np.isfinite(left))
        assert np.all(np.isfinite(right))
        result = (left.astype("float64") @ right)[0]
        assert not result[matrix == 0].any()
        least = least_error(matrix / np.float32(scale), 10)
        assert np.linalg.norm(result / scale - matrix / scale) <= 1.001 * least


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_less_rank_than_asked_for(decompositions, rank):
    random = np.random.default_rng(0)
    w = (random.normal(size=(90, rank)) @ random.normal(size=(rank, 80))).astype("float32")
    start = eagerly(truncated, ops.convert_to_tensor(w[None]), 10)
    factors = eagerly(truncated, ops.convert_to_tensor(w[None]), 10, start)
    assert decompositions.count == 1  # of which the start is one
    assert error(w[None], factors)[0] <= 1e-5 * np.linalg.norm(w)
    if rank == 0:
        assert not array(factors[0]).any()


def test_a_stack_holds_as_a_whole(decompositions):
    random = np.random.default_rng(0)
    pairs = [drifted(random.normal(size=(90, 80)), 10, 0.02, seed) for seed in range(3)]
    before, after = (np.stack(stack) for stack in zip(*pairs, strict=True))
    start = eagerly(truncated, ops.convert_to_tensor(before), 10)
    factors = eagerly(truncated, ops.convert_to_tensor(after), 10, start)
    assert decompositions.count == 1
    after[1] = random.normal(size=(90, 80))
    factors = eagerly(truncated, ops.convert_to_tensor(after), 10, start)
    assert decompositions.count == 2
    for found, w in zip(error(after, factors), after, strict=True):
        assert found <= 1.001 * least_error(w, 10)


@pytest.mark.parametrize(("shape", "rank"), [((63, 90), 4), ((90, 80), 21)])
def test_where_it_does_not_pay_the_decomposition_is_computed(decompositions, shape, rank):
    w = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(1, *shape)).astype("float32"))
    start = eagerly(truncated, w, rank)
    eagerly(truncated, w, rank, start)
    assert decompositions.count == 2


# ---- cold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(512, 512), (512, 700)], ids=str)
@pytest.mark.parametrize("values", ["exponential", "slow exponential", "harmonic"])
def test_from_a_random_start(decompositions, shape, values):
    w = with_values(*shape, EIGENVALUES[values](512))
    factors = eagerly(truncated, ops.convert_to_tensor(w[None]), 40)
    assert decompositions.count == 0
    assert_best(w, 40, factors)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_from_a_random_start_for_any_rank(decompositions, rank):
    w = with_values(520, 512, 0.98 ** np.arange(512))
    w[:, [0, 100]] = w[[0, 100]] = 0
    left, right = eagerly(truncated, ops.convert_to_tensor(w[None]), rank)
    assert decompositions.count == 0
    assert_best(w, rank, (left, right))
    assert not array(left)[0, [0, 100]].any()
    assert not array(right)[0, :, [0, 100]].any()


@pytest.mark.parametrize("signal", [0, 7])
def test_a_random_start_on_few_directions_or_none(decompositions, signal):
    random = np.random.default_rng(0)
    w = (random.normal(size=(512, signal)) @ random.normal(size=(signal, 512))).astype("float32")
    factors = eagerly(truncated, ops.convert_to_tensor(w[None]), 20)
    assert error(w[None], factors)[0] <= 1e-5 * np.linalg.norm(w)
    assert np.all(np.isfinite(array(factors[0])))


@pytest.mark.parametrize("shape", [(512, 512), (512, 600)], ids=str)
def test_a_spectrum_of_noise_takes_a_longer_space(decompositions, monkeypatch, shape):
    w = np.random.default_rng(0).normal(size=shape).astype("float32")
    factors = eagerly(truncated, ops.convert_to_tensor(w[None]), 40)
    assert decompositions.count == 0
    assert_best(w, 40, factors)
    monkeypatch.setattr(truncation, "COLD", (COLD[0], COLD[0]))
    eagerly(truncated, ops.convert_to_tensor(w[None]), 40)
    assert decompositions.count == 1


def test_equal_singular_values_are_decomposed(decompositions):
    """Of singular values that are equal, a Krylov space finds as many as its blocks are wide."""
    w = with_values(512, 512, EIGENVALUES["steps"](512))
    factors = eagerly(truncated, ops.convert_to_tensor(w[None]), 40)
    assert decompositions.count == 1
    assert_best(w, 40, factors, allowed=1e-5)


def test_a_space_is_orthonormal_and_the_same_when_it_is_continued():
    w = with_values(120, 110, EIGENVALUES["harmonic"](110))
    forward, backward = products(w)
    start = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(1, 110, 8)), "float32")
    whole = krylov_space(forward, backward, start, 6)
    parts = krylov_space(forward, backward, krylov_space(forward, backward, start, 2), 6)
    for space in (whole, parts):
        basis, gram, following = (array(part)[0] for part in space)
        assert (basis.shape, gram.shape, following.shape) == ((110, 48), (48, 48), (110, 8))
        both = np.concatenate([basis, following], axis=1)
        np.testing.assert_allclose(both.T @ both, np.eye(56), atol=1e-5)
        np.testing.assert_allclose(gram, basis.T @ w.T @ w @ basis, atol=1e-5)
    np.testing.assert_allclose(array(whole[0]), array(parts[0]), atol=1e-5)


def test_the_leading_vectors_of_a_space():
    w = with_values(120, 110, EIGENVALUES["exponential"](110))
    start = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(1, 110, 16)), "float32")
    basis, gram, _ = krylov_space(*products(w), start, 5)
    found = array(leading(basis, gram, 8))[0]
    best = np.linalg.svd(w)[2][:8]
    np.testing.assert_allclose(np.abs(best @ found), np.eye(8), atol=1e-3)


def test_the_probability_that_all_probes_miss_is_as_stated():
    """P(x^2 < pi / 8) <= 1/2 for a normal variable x."""
    assert math.erf(math.sqrt(math.pi / 8 / 2)) <= 0.5
