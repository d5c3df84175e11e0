"""Compressors against optima that are found by brute force or known in closed form."""

import numpy as np
import pytest

from keras_compaware import Chain, LowRank, MagnitudePruning, UniformQuantization
from keras_compaware.base import KernelAxes, axes_by_rank
from tests.laws.helpers import array, eagerly, norm

PLAIN = axes_by_rank(2)


@pytest.fixture(autouse=True)
def _eagerly():
    with eagerly():
        yield


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).normal(size=400_000).astype("float32")


# ---- pruning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "removed"), [(0.5, 0.072), (0.7, 0.217), (0.8, 0.351), (0.9, 0.561), (0.95, 0.721)]
)
def test_energy_that_pruning_removes_from_gaussian_weights(gaussian, sparsity, removed):
    result = array(MagnitudePruning(sparsity)(gaussian))
    assert np.sum(result != 0) == 400_000 - round(sparsity * 400_000)
    assert np.sum((result - gaussian) ** 2) / np.sum(gaussian**2) == pytest.approx(
        removed, abs=0.002
    )


def test_ties_go_to_the_lower_index():
    w = np.array([[1.0, -2.0, 2.0], [-1.0, 2.0, 1.0]], "float32")
    kept = {
        1 / 6: [[1, -2, 2], [-1, 2, 0]],
        2 / 6: [[1, -2, 2], [0, 2, 0]],
        4 / 6: [[0, -2, 2], [0, 0, 0]],
        5 / 6: [[0, -2, 0], [0, 0, 0]],
    }
    for sparsity, expected in kept.items():
        np.testing.assert_array_equal(array(MagnitudePruning(sparsity)(w)), expected)


def test_many_ties_against_a_stable_sort():
    random = np.random.default_rng(1)
    w = random.integers(-4, 5, size=(37, 29)).astype("float32") * np.float32(0.37)
    for sparsity in (0.1, 0.33, 0.5, 0.77, 0.99):
        order = np.argsort(-np.abs(w.reshape(-1)), kind="stable")
        expected = np.zeros(w.size, "float32")
        keep = order[: w.size - round(sparsity * w.size)]
        expected[keep] = w.reshape(-1)[keep]
        result = array(MagnitudePruning(sparsity)(w))
        np.testing.assert_array_equal(result.reshape(-1), expected)


def test_the_code_of_pruning_stores_k_values_of_a_kernel_full_of_zeros():
    w = np.zeros((4, 5), "float32")
    w[1, 2] = 3.0
    code = MagnitudePruning(0.5).encode(w)
    assert int(np.sum(array(code.parts["mask"]))) == 10
    assert code.num_bits == 20 + 10 * 32


# ---- low rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["channel", "spatial"])
def test_the_error_is_the_tail_of_the_singular_values(split):
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype("float32")
    spatial = w.transpose(0, 2, 1, 3).reshape(12, 18)
    matrix = w.reshape(36, 6) if split == "channel" else spatial
    values = np.linalg.svd(matrix.astype("float64"), compute_uv=False)
    for rank in range(1, len(values) + 1):
        result = array(LowRank(rank=rank, split=split)(w))
        error = np.sqrt(np.sum(values[rank:] ** 2))
        assert np.linalg.norm(result - w) == pytest.approx(error, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [
        ((64, 64), 0.25, 8),  # .25 * 4096 / 128
        ((64, 64), 0.5, 16),
        ((3, 3, 64, 128), 0.25, 26),  # .25 * 576 * 128 / 704 = 26.18
        ((10, 40), 1.0, 8),  # 400 / 50
        ((10, 40), 0.01, 1),
        ((1, 1), 1.0, 1),
        ((6, 3), 0.5, 1),  # exactly .5 * 18 / 9 = 1
        ((30, 60), 0.15, 3),  # exactly .15 * 1800 / 90 = 3, though not in floating point
        ((30, 60), 0.3, 6),
    ],
)
def test_the_rank_for_a_ratio(shape, ratio, rank):
    axes = axes_by_rank(len(shape))
    assert LowRank(ratio=ratio).rank_of(shape, axes) == rank


def test_the_rank_for_a_ratio_of_a_spatial_split():
    axes = axes_by_rank(4)  # (3 * 16) x (5 * 32) = 48 x 160: .5 * 7680 / 208 = 18.46
    assert LowRank(ratio=0.5, split="spatial").rank_of((3, 5, 16, 32), axes) == 18
    grouped = KernelAxes((2,), (3,), (0, 1), groups=4)  # 4 blocks of (9 * 8) x 8: 576 / 80 / 2
    assert LowRank(ratio=0.5).rank_of((3, 3, 8, 32), grouped) == 3


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_energy_takes_the_smallest_rank_that_suffices(scale):
    w = np.zeros((8, 6), "float32")
    np.fill_diagonal(w, [4, 3, 2, 1, 1, 0])  # squares 16, 9, 4, 1, 1: shares .516 .806 .935 .968
    w *= np.float32(scale)
    for energy, rank in [
        (0.5, 1), (0.51, 1), (0.52, 2), (0.8, 2), (0.81, 3), (0.93, 3), (0.94, 4), (0.97, 5), (1, 5)
    ]:  # fmt: skip
        assert LowRank(energy=energy).settle(w) == LowRank(rank=rank), energy
        assert np.linalg.matrix_rank(array(LowRank(energy=energy)(w)) / scale, tol=1e-5) == rank
        assert LowRank(energy=energy).encode(w).parts["left"].shape == (1, 8, rank)


def test_energy_of_a_kernel_of_zeros_needs_rank_one():
    assert LowRank(energy=0.9).settle(np.zeros((4, 5), "float32")) == LowRank(rank=1)


def test_settled_energy_does_not_erode():
    """.9 of the energy taken again and again loses rank; the settled compressor does not."""
    w = np.random.default_rng(0).normal(size=(40, 30)).astype("float32")
    eroding, settled = LowRank(energy=0.9), LowRank(energy=0.9).settle(w)
    first = int(settled.rank)
    eroded, kept = w, w
    for _ in range(6):
        eroded, kept = array(eroding(eroded)), array(settled(kept))
    assert np.linalg.matrix_rank(kept, tol=1e-3) == first
    assert np.linalg.matrix_rank(eroded, tol=1e-3) < first - 5


def test_the_projection_on_a_basis():
    """Within a step: W V V^T; with the basis of W itself, the truncated SVD."""
    random = np.random.default_rng(0)
    w = random.normal(size=(3, 3, 4, 6)).astype("float32")
    for compressor in (LowRank(rank=2), LowRank(ratio=0.4), LowRank(energy=0.6)):
        basis = compressor.basis(w)
        assert tuple(basis.shape) == compressor.basis_shape(w.shape, axes_by_rank(4))
        projected = array(compressor.decode(compressor.encode_on(basis, w)))
        np.testing.assert_allclose(projected, array(compressor(w)), atol=1e-5)
        other = random.normal(size=w.shape).astype("float32")
        v = array(basis)[0]
        expected = (other.reshape(36, 6) @ v @ v.T).reshape(w.shape)
        found = array(compressor.decode(compressor.encode_on(basis, other)))
        np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- quantization -----------------------------------------------------------------------------


def best_uniform_error(w, levels):
    """The least relative squared error of any scale, by trying 1000 of them on a histogram."""
    counts, edges = np.histogram(w, 8192)
    centres = (edges[1:] + edges[:-1]) / 2
    scales = np.geomspace(0.1 / levels, 1.0, 1000) * np.abs(w).max()
    errors = [
        np.sum(counts * (centres - s * np.clip(np.round(centres / s), -levels, levels)) ** 2)
        for s in scales
    ]
    return min(errors) / np.sum(counts * centres**2)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_gaussian_weights_are_quantized_almost_optimally(gaussian, bits):
    levels = 2 ** (bits - 1) - 1
    code = UniformQuantization(bits).encode(gaussian)
    codes = array(code.parts["codes"])
    assert np.abs(codes).max() <= levels
    np.testing.assert_array_equal(codes, np.round(codes))
    result = array(UniformQuantization(bits).decode(code))
    assert len(np.unique(result)) <= 2**bits - 1
    error = np.sum((result - gaussian) ** 2) / np.sum(gaussian**2)
    best = best_uniform_error(gaussian, levels)
    assert best * 0.99 <= error <= best * 1.03


def test_two_bits_of_gaussian_weights_are_the_known_ternary_optimum(gaussian):
    """Symmetric ternary values of a unit Gaussian: threshold .612, relative error .190."""
    result = array(UniformQuantization(2)(gaussian))
    assert np.sum((result - gaussian) ** 2) / np.sum(gaussian**2) == pytest.approx(0.190, abs=0.002)


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_on_a_grid_stay(bits, seed):
    w = np.random.default_rng(seed).standard_t(4, size=3000).astype("float32")
    compressor = UniformQuantization(bits)
    once = array(compressor(w))
    np.testing.assert_allclose(
        array(compressor(once)), once, rtol=0, atol=1e-6 * np.abs(once).max()
    )


def test_a_scale_for_each_output_adapts_to_its_size():
    w = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    w *= np.array([1e-3, 1.0, 1e3, 0.0], "float32")
    one = array(UniformQuantization(4)(w))
    each = UniformQuantization(4, axis="outputs")
    result = array(each(w))
    assert not one[:, :2].any()  # nothing is left of the small ones
    for column in range(3):
        alone = array(UniformQuantization(4)(w[:, column : column + 1]))[:, 0]
        np.testing.assert_allclose(result[:, column], alone, rtol=1e-6)
        assert np.linalg.norm(alone - w[:, column]) < 0.2 * np.linalg.norm(w[:, column])
    np.testing.assert_array_equal(result[:, 3], 0)
    assert each.encode(w).parts["scale"].shape == (4, 1)


# ---- chains -----------------------------------------------------------------------------------


def test_a_chain_quantizes_only_what_pruning_keeps():
    w = np.random.default_rng(0).normal(size=(40, 30)).astype("float32")
    chain = Chain([MagnitudePruning(0.75), UniformQuantization(3)])
    result, pruned = array(chain(w)), array(MagnitudePruning(0.75)(w))
    assert not np.any(result[pruned == 0])
    kept = pruned != 0
    alone = array(UniformQuantization(3)(pruned[kept]))
    np.testing.assert_allclose(result[kept], alone, rtol=1e-5)


def test_a_chain_of_factors_keeps_the_rank():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    chain = Chain([LowRank(rank=3), UniformQuantization(8)])
    assert np.linalg.matrix_rank(array(chain(w)), tol=1e-4) == 3
    error = norm(array(chain(w)) - array(LowRank(rank=3)(w))) / norm(w)
    assert 1e-4 < error < 0.02
    assert chain.encode(w).num_bits == 8 * 3 * (20 + 30) + 2 * 32
    in_turn = array(UniformQuantization(8)(LowRank(rank=3)(w)))
    assert np.linalg.matrix_rank(in_turn, tol=1e-4) == 20  # what composing kernels would do


def test_a_chain_of_three():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    chain = Chain([LowRank(rank=3), MagnitudePruning(0.5), UniformQuantization(4)])
    code = chain.encode(w)
    # left 20 x 3, right 3 x 30: mask, half of the values at 4 bits, a scale
    assert code.num_bits == (60 + 30 * 4 + 32) + (90 + 45 * 4 + 32)
    np.testing.assert_allclose(array(chain.decode(code)), array(chain(w)), atol=1e-6)
    assert chain.needs_decomposition


def test_a_chain_settles_its_members():
    w = np.zeros((8, 6), "float32")
    np.fill_diagonal(w, [4, 3, 2, 1, 1, 0])
    chain = Chain([LowRank(energy=0.8), UniformQuantization(8)])
    assert chain.settle(w) == Chain([LowRank(rank=2), UniformQuantization(8)])
    assert chain.settle(w).reason_to_skip((8, 6), PLAIN) is None
    assert chain.budget is None
