"""Codes of few values against closed forms, NumPy, and what they promise of masks and starts.

On JAX everything is compiled, since operation by operation these fits would take it minutes.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import (
    BinaryCodeQuantization,
    Chain,
    MagnitudePruning,
    TernaryQuantization,
    UniformQuantization,
    WeightClustering,
)
from keras_compaware._math.backend import compiled
from keras_compaware.base import axes_by_rank
from tests.laws.helpers import array, norm

# JAX compiles every fit for every size, which takes minutes; the laws try them on it as well.
pytestmark = [pytest.mark.slow] if keras.backend.backend() == "jax" else []


def quick(function):
    return compiled(function) if keras.backend.backend() == "jax" else function


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).normal(size=400_000).astype("float32")


def encoded(compressor, w, previous=None, mask=None):
    """The code of a kernel."""
    traced = []

    def function(w):
        traced.append(compressor.encode(w, previous=previous, mask=mask))
        return traced[-1].arrays()

    arrays = quick(function)(ops.convert_to_tensor(w))
    return traced[-1].with_arrays(arrays)


def decoded(compressor, code):
    return array(quick(lambda: compressor.decode(code))())


def compressed(compressor, w, **options):
    return decoded(compressor, encoded(compressor, w, **options))


def relative_error(compressor, w, **options):
    return np.sum((compressed(compressor, w, **options) - w) ** 2) / np.sum(w**2)


# ---- known errors -----------------------------------------------------------------------------


def test_one_plane_is_the_sign_times_the_mean_magnitude(gaussian):
    for fit in ("greedy", "refined", "alternating"):
        result = compressed(BinaryCodeQuantization(1, fit=fit), gaussian)
        expected = np.sign(gaussian) * np.mean(np.abs(gaussian.astype("float64")))
        np.testing.assert_allclose(result, expected, rtol=1e-5)
    error = np.sum((result - gaussian) ** 2) / np.sum(gaussian**2)
    assert error == pytest.approx(1 - 2 / np.pi, abs=0.001)


@pytest.mark.parametrize(
    ("bits", "greedy", "refined", "two_rounds", "many_rounds"),
    [
        (2, 0.1304, 0.1251, 0.1191, 0.1175),
        (3, 0.0584, 0.0506, 0.0435, 0.0370),
        (4, 0.0330, 0.0246, 0.0180, 0.0118),
    ],
)
def test_binary_codes_of_gaussian_weights(gaussian, bits, greedy, refined, two_rounds, many_rounds):
    """The known errors; each fit is better than the one before."""
    for fit, rounds, error in (
        ("greedy", 0, greedy),
        ("refined", 0, refined),
        ("alternating", 2, two_rounds),
        ("alternating", 15, many_rounds),
    ):
        compressor = BinaryCodeQuantization(bits, fit=fit, rounds=rounds)
        assert relative_error(compressor, gaussian) == pytest.approx(error, abs=5e-4), fit


def test_the_error_of_the_alternating_fit_never_rises():
    w = np.random.default_rng(0).standard_t(4, size=(40, 3)).astype("float32")
    errors = [
        np.sum((compressed(BinaryCodeQuantization(3, "outputs", "alternating", n), w) - w) ** 2, 0)
        for n in (0, 1, 2, 3, 7)
    ]
    assert np.all(np.diff(errors, axis=0) <= 1e-6)
    assert np.all(errors[-1] < 0.9 * errors[0])


def test_ternary_gaussian_weights(gaussian):
    result = compressed(TernaryQuantization(), gaussian)
    assert np.mean(result == 0) == pytest.approx(0.42, abs=0.005)
    error = np.sum((result - gaussian) ** 2) / np.sum(gaussian**2)
    assert error == pytest.approx(0.192, abs=0.001)


@pytest.mark.parametrize(("clusters", "error"), [(2, 0.3634), (4, 0.1175), (16, 0.009497)])
def test_clusters_of_gaussian_weights(gaussian, clusters, error):
    """The quantizers of Max (1960) for the Gaussian distribution."""
    found = relative_error(WeightClustering(clusters, rounds=15), gaussian)
    assert 0.99 * error <= found <= 1.02 * error


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clusters_are_no_worse_than_a_grid_of_as_many_levels(bits):
    random = np.random.default_rng(0)
    shapes = (random.normal, random.uniform, random.laplace)
    w = np.stack([draw(size=5000) - 0.2 for draw in shapes], axis=1).astype("float32")
    errors = [
        np.sum((compressed(compressor, w) - w) ** 2, axis=0)
        for compressor in (
            WeightClustering(2**bits - 1, "outputs", rounds=10),
            UniformQuantization(bits, "outputs"),
        )
    ]
    assert np.all(errors[0] <= errors[1])


# ---- repetition -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compressor", "low", "high"),
    [
        (BinaryCodeQuantization(2), 0.9999, 1.0001),
        (BinaryCodeQuantization(3), 0.9999, 1.0001),
        (BinaryCodeQuantization(4, fit="alternating", rounds=3), 0.9999, 1.0001),
        (BinaryCodeQuantization(2, fit="greedy"), 0.0, 0.001),
        (BinaryCodeQuantization(3, fit="greedy"), 0.1, 0.25),
    ],
    ids=str,
)
def test_a_hundred_applications_of_binary_codes(compressor, low, high):
    """Refitted scales stay; the plain greedy fit destroys the kernel."""
    w = np.random.default_rng(0).normal(size=1000).astype("float32")
    function = compiled(lambda w: compressor(w))
    once = repeated = function(ops.convert_to_tensor(w))
    for _ in range(100):
        repeated = function(repeated)
    assert low <= norm(repeated) / norm(once) <= high


def test_few_distinct_values_are_their_own_clusters():
    random = np.random.default_rng(0)
    values = random.standard_t(2, size=9).astype("float32")
    w = random.choice(values, size=(20, 15))
    for clusters in (9, 16, 600):
        np.testing.assert_array_equal(compressed(WeightClustering(clusters), w), w)
    once = compressed(WeightClustering(8), w)
    assert len(np.unique(once)) == 8
    np.testing.assert_array_equal(compressed(WeightClustering(8), once), once)


# ---- rows and masks ---------------------------------------------------------------------------

CODEBOOKS = (
    TernaryQuantization(),
    BinaryCodeQuantization(3),
    BinaryCodeQuantization(2, fit="alternating", rounds=3),
    WeightClustering(5, rounds=3),
)
codebooks = pytest.mark.parametrize("compressor", CODEBOOKS, ids=str)


@codebooks
def test_what_is_not_stored_has_no_influence(compressor):
    random = np.random.default_rng(0)
    w = random.normal(size=(12, 10)).astype("float32")
    mask = random.random(w.shape) < 0.6
    alone = compressed(compressor, w[mask])
    for outside in (0.0, 1e6):
        result = compressed(compressor, np.where(mask, w, np.float32(outside)), mask=mask)
        np.testing.assert_allclose(result[mask], alone, rtol=1e-5)


@codebooks
def test_every_output_has_a_codebook_of_its_own(compressor):
    w = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    w *= np.array([1e-3, 1.0, 1e3, 0.0], "float32")
    each = compressor.replace(axis="outputs")
    result = compressed(each, w)
    one = quick(lambda w: compressor(w))
    for column in range(4):
        alone = array(one(ops.convert_to_tensor(w[:, column])))
        np.testing.assert_allclose(result[:, column], alone, rtol=1e-5)
    mask = np.ones(w.shape, bool)
    mask[:, 1] = False  # nothing is stored of one output
    masked = compressed(each, np.where(mask, w, np.float32(0)), mask=mask)
    assert np.all(np.isfinite(masked))
    np.testing.assert_allclose(masked[:, [0, 2]], result[:, [0, 2]], rtol=1e-5)


@codebooks
def test_one_large_weight_and_many_equal_ones(compressor):
    w = np.full(50, 0.25, "float32")
    function = quick(lambda w: compressor(w))
    np.testing.assert_allclose(array(function(ops.convert_to_tensor(w))), w, rtol=1e-6)
    w[7] = 1e5
    result = array(function(ops.convert_to_tensor(w)))
    assert np.linalg.norm(result - w) < np.linalg.norm(w)
    assert len(np.unique(result)) <= 2  # equal weights stay equal
    if isinstance(compressor, WeightClustering):
        np.testing.assert_array_equal(result, w)


# ---- warm starts ------------------------------------------------------------------------------

WARM = (
    (BinaryCodeQuantization(3, fit="alternating"), "alphas"),
    (WeightClustering(16), "codebook"),
)


@pytest.mark.parametrize(("compressor", "part"), WARM, ids=["alternating", "clusters"])
def test_a_warm_start_needs_fewer_rounds(compressor, part):
    random = np.random.default_rng(0)
    before = random.normal(size=(1, 3000)).astype("float32")
    w = before + (0.02 * random.normal(size=before.shape)).astype("float32")
    previous = encoded(compressor, before)

    def error(rounds, previous):
        shorter = compressor.replace(rounds=rounds)
        return np.sum((compressed(shorter, w, previous=previous) - w) ** 2)

    assert compressor.warm_starts
    same = decoded(compressor, previous)
    nothing = np.sum(np.min(np.abs(w.T - np.unique(same)), axis=1) ** 2)
    warm = [error(rounds, previous) for rounds in (0, 1, 2)]
    assert warm[0] == pytest.approx(nothing, rel=1e-4)  # earlier values, new codes
    assert np.all(np.diff(warm) <= 1e-5 * nothing)
    assert warm[2] < error(2, None)
    assert warm[2] <= 1.01 * error(compressor.rounds, None)
    again = compressed(compressor, same, previous=previous)
    np.testing.assert_allclose(again, same, rtol=0, atol=1e-6)


def test_which_fits_start_warm():
    assert not TernaryQuantization().warm_starts
    assert not BinaryCodeQuantization(3).warm_starts
    assert Chain([MagnitudePruning(0.5), WeightClustering(4)]).warm_starts
    w = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    refined = BinaryCodeQuantization(2)
    previous = encoded(refined, 100 * w)
    np.testing.assert_array_equal(compressed(refined, w, previous=previous), compressed(refined, w))


@pytest.mark.parametrize(("compressor", "part"), WARM, ids=["alternating", "clusters"])
def test_a_code_of_another_kernel_is_refused(compressor, part):
    w = np.ones((4, 3), "float32")
    previous = encoded(compressor, w)
    message = rf"'{part}' of shape \(3, \d+\). Received: '{part}' of shape \(1, "
    with pytest.raises(ValueError, match=message):
        compressor.replace(axis="outputs").encode(w, previous=previous)


# ---- codes ------------------------------------------------------------------------------------


def test_a_chain_of_pruning_and_binary_codes_by_hand():
    w = np.array([[4.0, -0.1, 2.0, 0.2], [0.3, -3.0, 0.0, -1.0]], "float32")
    chain = Chain([MagnitudePruning(0.5), BinaryCodeQuantization(2)])
    code = encoded(chain, w)
    # 8 bits of mask, 2 signs for 4 of 8 weights, 2 scales
    assert code.num_bits == 8 + 2 * 4 + 2 * 32
    values = code.parts["values"].parts
    assert tuple(values["planes"].shape) == (2, 2, 4)
    # mean|w| = 2.5, then mean|r| = 1 of r = 1.5, -.5, -.5, 1.5; orthogonal planes
    np.testing.assert_allclose(array(values["alphas"]), [[2.5, 1.0]])
    expected = [[3.5, 0, 1.5, 0], [0, -3.5, 0, -1.5]]
    np.testing.assert_allclose(decoded(chain, code), expected, rtol=1e-6)


def test_a_chain_quantizes_the_codebook():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    chain = Chain([MagnitudePruning(0.5), WeightClustering(16), UniformQuantization(8)])
    code = encoded(chain, w)
    assert code.num_bits == 600 + 4 * 300 + 8 * 16 + 32
    entries = code.parts["values"].parts["codebook"].parts
    integers, scale = array(entries["codes"]), array(entries["scale"])
    assert integers.shape == (1, 16)
    result = decoded(chain, code)
    assert set(np.unique(result)) <= {0.0, *(integers * scale).reshape(-1).tolist()}
    unquantized = compressed(Chain([MagnitudePruning(0.5), WeightClustering(16)]), w)
    assert 0 < np.abs(result - unquantized).max() <= 0.51 * scale.item()
    again = compressed(chain, w, previous=code)
    assert np.linalg.norm(again - w) <= 1.01 * np.linalg.norm(result - w)


@pytest.mark.parametrize(
    ("clusters", "bits", "dtype"),
    [(2, 1, "uint8"), (5, 3, "uint8"), (256, 8, "uint8"), (257, 9, "int16"), (40000, 16, "int32")],
)
def test_codes_of_clusters_are_as_wide_as_they_must(clusters, bits, dtype):
    w = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    compressor = WeightClustering(clusters, rounds=1)
    code = encoded(compressor, w)
    assert ops.convert_to_numpy(code.parts["codes"]).dtype == dtype
    assert code.num_bits == 48 * bits + 32 * clusters
    if clusters > 48:
        np.testing.assert_array_equal(decoded(compressor, code), w)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BinaryCodeQuantization(0), ValueError, "`bits` must be at least 1"),
        (lambda: BinaryCodeQuantization(9), ValueError, r"`bits` must be in \[1, 8\]"),
        (lambda: BinaryCodeQuantization(2, fit="exact"), ValueError, "`fit` must be one of"),
        (lambda: BinaryCodeQuantization(2, rounds=-1), ValueError, "`rounds` must be at least 0"),
        (lambda: TernaryQuantization("inputs"), ValueError, "TernaryQuantization: `axis` must be"),
        (lambda: WeightClustering(1), ValueError, "`num_clusters` must be at least 2"),
        (lambda: WeightClustering(2**16 + 1), ValueError, r"must be in \[2, 65536\]"),
        (lambda: WeightClustering(4.0), TypeError, "`num_clusters` must be an integer"),
        (lambda: UniformQuantization(17), ValueError, r"`bits` must be in \[2, 16\]"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- inside a training step -------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor",
    [
        UniformQuantization(2),
        UniformQuantization(8, "outputs"),
        WeightClustering(4, "outputs"),
        WeightClustering(16),
        BinaryCodeQuantization(3, "outputs", "alternating"),
    ],
    ids=str,
)
def test_a_basis_serves_the_kernels_of_the_next_steps(compressor):
    """It repeats the kernel's own fit, and is hardly worse for one that has moved."""
    random = np.random.default_rng(0)
    w = random.normal(size=(500, 4)).astype("float32")
    axes = axes_by_rank(2)
    basis = compressor.basis(ops.convert_to_tensor(w))
    assert tuple(basis.shape) == compressor.basis_shape(w.shape, axes)

    def error(w, function):
        return np.sum((array(function(ops.convert_to_tensor(w))) - w) ** 2)

    def on_basis(w):
        return compressor.decode(compressor.encode_on(basis, w))

    assert error(w, on_basis) <= (1 + 1e-5) * error(w, compressor)
    moved = (1.05 * w + 0.1 * random.normal(size=w.shape)).astype("float32")
    assert error(moved, on_basis) <= 1.1 * error(moved, compressor)
    np.testing.assert_allclose(array(on_basis(np.zeros_like(w))), 0.0, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 10.0, 1e6])
def test_a_scale_follows_its_kernel(factor):
    w = np.random.default_rng(0).normal(size=(500, 4)).astype("float32")
    compressor = UniformQuantization(4)
    basis = compressor.basis(ops.convert_to_tensor(w))
    scaled = np.float32(factor) * w
    code = compressor.encode_on(basis, ops.convert_to_tensor(scaled))
    found = norm(array(compressor.decode(code)) - scaled)
    assert found <= (1 + 1e-5) * norm(array(compressor(scaled)) - scaled)
