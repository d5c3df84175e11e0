"""Compressors against optima that are found by brute force or known in closed form."""

import numpy as np
import pytest

from keras_compaware import (
    Chain,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    NMPruning,
    Tucker2,
    UniformQuantization,
)
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


@pytest.mark.parametrize(
    ("keep", "block", "removed"),
    # From the densities of order statistics; the first is (1 - 2 / pi) / 2.
    [(1, 2, 0.1817), (2, 4, 0.1324)],
)
def test_energy_that_blocks_remove_from_gaussian_weights(gaussian, keep, block, removed):
    result = array(NMPruning(keep=keep, block=block)(gaussian.reshape(-1, 1)))
    assert np.all(np.sum(result.reshape(-1, block) != 0, axis=1) == keep)
    energy = np.sum((result[:, 0] - gaussian) ** 2) / np.sum(gaussian**2)
    assert energy == pytest.approx(removed, abs=0.002)


def test_blocks_run_over_the_inputs_of_one_output():
    w = np.zeros((2, 1, 2, 2), "float32")
    w[..., 0] = np.array([4, 3, 2, 1], "float32").reshape(2, 1, 2)
    w[..., 1] = np.array([1, -2, 3, -4], "float32").reshape(2, 1, 2)
    result = array(NMPruning(keep=2, block=4)(w))
    np.testing.assert_array_equal(result[..., 0].ravel(), [4, 3, 0, 0])
    np.testing.assert_array_equal(result[..., 1].ravel(), [0, 0, 3, -4])


def test_the_code_of_blocks_is_filled_up_at_the_end():
    w = np.array([[1.0, 0.0, -3.0, 2.0, 5.0]], "float32").T
    compressor = NMPruning(keep=2, block=4)
    code = compressor.encode(w)
    values, positions = (array(code.parts[name]).ravel() for name in ("values", "positions"))
    np.testing.assert_array_equal(values, [-3, 2, 5, 0])
    np.testing.assert_array_equal(positions, [2, 3, 0, 1])
    assert code.num_bits == 4 * (32 + 2)
    assert code.payload["values"].batch(4) == (0,)
    np.testing.assert_array_equal(array(compressor.decode(code)).ravel(), [0, 0, -3, 2, 5])


@pytest.mark.parametrize(
    ("compressor", "stays"),
    [
        (GroupPruning(0.5), [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]),
        (GroupPruning(0.34, axis="outputs"), [[1, 0, 1]] * 4),
        (GroupPruning(0.75, block=(2, 2)), [[0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]]),
        (GroupPruning(0.99, block=(3, 9)), [[1, 1, 1]] * 3 + [[0, 0, 0]]),
    ],
)
def test_groups_by_hand(compressor, stays):
    w = np.array([[1, 1, 2], [3, 1, 2], [4, 2, 5], [4, 1, 1]], "float32")
    np.testing.assert_array_equal(array(compressor(w)), w * stays)


def test_half_the_groups_of_a_matrix_of_ones_are_the_first():
    w = np.ones((4, 6), "float32")
    np.testing.assert_array_equal(array(GroupPruning(0.5)(w)).sum(axis=1), [6, 6, 0, 0])
    np.testing.assert_array_equal(array(GroupPruning(0.9, axis="outputs")(w)).sum(0), [4] + [0] * 5)


def test_the_stored_groups_keep_the_roles_of_their_axes():
    """3 bits for each output of the kept groups are 3 bits for each output that is left."""
    axes = KernelAxes((2,), (3,), (0, 1))
    w = np.random.default_rng(0).normal(size=(3, 3, 8, 6)).astype("float32")
    w *= np.geomspace(1e-2, 1e2, 6).astype("float32")
    outputs = GroupPruning(0.5, axis="outputs").encode(w, axes=axes)
    assert outputs.parts["values"].shape == (3, 3, 3, 8)
    assert outputs.payload["values"] == KernelAxes((3,), (0,), (1, 2))
    inputs = GroupPruning(0.5, axis="inputs").encode(w, axes=axes)
    assert inputs.parts["values"].shape == (4, 3, 3, 6)
    assert inputs.payload["values"] == KernelAxes((0,), (3,), (1, 2))
    pruned = array(GroupPruning(0.5)(w))
    chain = Chain([GroupPruning(0.5), UniformQuantization(3, axis="outputs")])
    result = array(chain(w))
    for output in range(6):
        alone = array(UniformQuantization(3)(pruned[..., output]))
        np.testing.assert_allclose(result[..., output], alone, rtol=1e-5, atol=1e-9)


def test_pruning_that_removes_nothing_is_told():
    assert "of blocks of 4 weights all are kept (its matrix has 3 rows)" in (
        NMPruning(keep=4, block=8).reason_to_skip((3, 5), PLAIN)
    )
    assert NMPruning(keep=2, block=4).reason_to_skip((3, 5), PLAIN) is None
    assert GroupPruning(0.1).reason_to_skip((3, 5), PLAIN) == (
        "a sparsity of 0.1 removes none of its groups (3)"
    )
    assert GroupPruning(0.5).reason_to_skip((3, 5), PLAIN) is None
    tiles = GroupPruning(0.5, block=(2, 2))
    assert (tiles.num_groups((3, 5), PLAIN), tiles.num_kept((3, 5), PLAIN)) == (6, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NMPruning(keep=4, block=4), ValueError, "`keep` must be below `block`"),
        (lambda: NMPruning(keep=0, block=4), ValueError, "`keep` must be at least 1"),
        (lambda: NMPruning(2, 4), TypeError, "positional"),
        (lambda: GroupPruning(1.0), ValueError, "GroupPruning: `sparsity` must be below 1"),
        (lambda: GroupPruning(0.5, axis="rows"), ValueError, "`axis` must be one of"),
        (lambda: GroupPruning(0.5, "inputs", (2, 2)), ValueError, "`axis`.*or `block`.*not both"),
        (lambda: GroupPruning(0.5, block=4), TypeError, "`block` must be a pair"),
        (lambda: GroupPruning(0.5, block=(0, 4)), ValueError, "`block` must be at least 1"),
        (lambda: LowRank(rank=1, tile=1), ValueError, "`tile` must be at least 2"),
        (lambda: Tucker2(), ValueError, "exactly one of `ranks`, `ratio` and `energy`"),
        (lambda: Tucker2(ranks=(2, 2), ratio=0.5), ValueError, "exactly one of"),
        (lambda: Tucker2(ranks=3), TypeError, "`ranks` must be a pair"),
        (lambda: Tucker2(ranks=(0, 3)), ValueError, "`ranks` must be at least 1"),
        (lambda: Tucker2(ratio=0.0), ValueError, r"`ratio` must be in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


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


@pytest.mark.parametrize("size", [64, 32, 16, 8])
@pytest.mark.parametrize("factor", [2, 4])
def test_tiles_of_size_t_at_rank_r_shrink_a_kernel_by_t_over_2r(size, factor):
    """The tiled decompositions of 64 x 576 matrices in Lee et al. (2019)."""
    axes, shape = axes_by_rank(4), (3, 3, 64, 64)
    rank = {2: {64: 16, 32: 8, 16: 4, 8: 2}, 4: {64: 8, 32: 4, 16: 2, 8: 1}}[factor][size]
    compressor = LowRank(ratio=1 / factor, tile=size)
    assert compressor.rank_of(shape, axes) == rank
    number, columns, _ = compressor.basis_shape(shape, axes)
    assert number * rank * (size + columns) * factor == 3 * 3 * 64 * 64
    assert compressor.reason_to_skip(shape, axes) is None


@pytest.mark.parametrize(("size", "lost"), [(64, 0.622), (8, 0.616)])
def test_energy_that_tiles_remove_from_a_gaussian_matrix(gaussian, size, lost):
    w = gaussian[: 256 * 256].reshape(256, 256)
    compressor = LowRank(ratio=0.25, tile=size)
    code = compressor.encode(w)
    result = array(compressor.decode(code))
    assert code.num_bits * 4 == 32 * w.size
    assert code.split is None
    energy = np.sum((result - w).astype("float64") ** 2) / np.sum(w.astype("float64") ** 2)
    assert energy == pytest.approx(lost, abs=0.01)


def test_one_tile_is_the_matrix():
    w = np.random.default_rng(0).normal(size=(9, 12)).astype("float32")
    whole, one = LowRank(rank=2), LowRank(rank=2, tile=12)
    np.testing.assert_array_equal(array(one(w)), array(whole(w)))
    assert one.encode(w).split == "channel"  # two layers can stand in for it


def test_energy_counts_all_tiles_together():
    w = np.zeros((4, 4), "float32")
    np.fill_diagonal(w, [4, 1, 2, 2])  # tiles of singular values (4, 1) and (2, 2): 20 of 25
    for energy, rank in ((0.8, 1), (0.81, 2)):
        compressor = LowRank(energy=energy, tile=2)
        assert compressor.settle(w) == LowRank(rank=rank, tile=2)
        assert compressor.encode(w).num_bits == 32 * 4 * rank * 4


def test_tiles_that_save_nothing_are_told():
    assert LowRank(rank=1, tile=4).reason_to_skip((8, 8), PLAIN) is None
    assert "rank 2 saves nothing on a 8 x 8 matrix in tiles of 4 x 4 (64 parameters instead of" in (
        LowRank(rank=2, tile=4).reason_to_skip((8, 8), PLAIN)
    )
    padded = LowRank(rank=1, tile=4).reason_to_skip((5, 5), PLAIN)  # 4 tiles, 3 of them padding
    assert padded == "a 5 x 5 matrix in tiles of 4 x 4 has no smaller factors, even at rank 1"
    with pytest.raises(ValueError, match="matrix is cut into tiles of 4 x 4"):
        LowRank(rank=5, tile=4).reason_to_skip((8, 8), PLAIN)


# ---- Tucker-2 ---------------------------------------------------------------------------------


def tucker_kernel(first, second, noise=0.0):
    random = np.random.default_rng(0)
    left, right = random.normal(size=(8, first)), random.normal(size=(second, 6))
    core = random.normal(size=(3, 3, first, second))
    w = left @ core @ right
    return (w + noise * random.normal(size=w.shape)).astype("float32")


def test_a_kernel_of_low_ranks_is_found_again():
    w = tucker_kernel(2, 3)
    code = Tucker2(ranks=(2, 3)).encode(w)
    assert {name: tuple(part.shape) for name, part in code.parts.items()} == {
        "input": (1, 8, 2), "core": (1, 9, 2, 3), "output": (1, 3, 6)
    }  # fmt: skip
    np.testing.assert_allclose(array(Tucker2(ranks=(2, 3)).decode(code)), w, rtol=0, atol=1e-5)
    p, q = array(code.parts["input"])[0], array(code.parts["output"])[0]
    np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-6)
    assert norm(array(Tucker2(ranks=(2, 2))(w)) - w) > 0.01 * norm(w)


def test_the_error_is_between_the_bound_of_the_unfoldings_and_their_sum():
    """Neither mode can do better alone; their singular vectors together do not worse."""
    w = np.random.default_rng(1).normal(size=(3, 3, 8, 6)).astype("float32")
    by_input = np.linalg.svd(np.moveaxis(w, 2, 0).reshape(8, -1), compute_uv=False)
    by_output = np.linalg.svd(np.moveaxis(w, 3, 0).reshape(6, -1), compute_uv=False)
    for ranks in ((3, 2), (8, 3), (8, 6)):
        error = norm(array(Tucker2(ranks=ranks)(w)) - w) ** 2
        tails = np.sum(by_input[ranks[0] :] ** 2), np.sum(by_output[ranks[1] :] ** 2)
        assert max(tails) - 1e-3 <= error <= sum(tails) * (1 + 1e-5) + 1e-3
        if min(tails) > 0:
            assert error < sum(tails) * 0.999  # what alternating has gained


def test_the_ranks_for_a_ratio():
    def ranks_and_share(shape, ratio):
        first, second = Tucker2(ratio=ratio).ranks_of(shape, axes_by_rank(4))
        inputs, outputs = shape[-2:]
        window = shape[0] * shape[1]
        cost = inputs * first + window * first * second + outputs * second
        return (first, second), cost / np.prod(shape)

    for shape in ((3, 3, 64, 64), (3, 3, 64, 128), (5, 5, 32, 8), (1, 7, 20, 30)):
        for ratio in (0.05, 0.1, 0.25, 0.5, 0.9):
            (first, second), share = ranks_and_share(shape, ratio)
            assert share <= ratio
            assert abs(first / shape[2] - second / shape[3]) <= 1 / min(shape[2:]) + 1e-9
            one_more = shape[2] + shape[3] + shape[0] * shape[1] * (first + second + 1)
            assert share + one_more / np.prod(shape) > ratio
    assert ranks_and_share((3, 3, 4, 4), 0.01)[0] == (1, 1)
    # Not above twice the other one, as the window has two positions; (4, 2) would save nothing.
    assert ranks_and_share((1, 2, 64, 2), 1.0)[0] == (2, 1)


@pytest.mark.parametrize(
    ("rank", "factor"), [(16, 8.5), (24, 4.5), (32, 2.8), (38, 2.1), (44, 1.6)]
)
def test_how_much_ranks_shrink_a_kernel(rank, factor):
    """3 x 3 windows and 64 x 64 units."""
    axes, full = axes_by_rank(4), 9 * 64 * 64
    cost = 64 * rank + 9 * rank * rank + rank * 64
    assert full / cost == pytest.approx(factor, rel=0.04)
    assert Tucker2(ratio=cost / full).ranks_of((3, 3, 64, 64), axes) == (rank, rank)
    assert Tucker2(ratio=(cost - 1) / full).ranks_of((3, 3, 64, 64), axes) == (rank, rank - 1)


def test_tucker_that_saves_nothing_is_told():
    axes = axes_by_rank(4)
    assert Tucker2(ranks=(2, 2)).reason_to_skip((3, 3, 8, 8), axes) is None
    assert Tucker2(ranks=(8, 8)).reason_to_skip((3, 3, 8, 8), axes) == (
        "ranks 8 and 8 save nothing on 8 x 8 units and a window of 9 "
        "(704 parameters instead of 576)"
    )
    assert "no window: LowRank" in Tucker2(ratio=0.5).reason_to_skip((1, 1, 8, 8), axes)
    assert "no window: LowRank" in Tucker2(ranks=(9, 9)).reason_to_skip((8, 8), PLAIN)
    for ranks in ((9, 2), (2, 9), (8, 1)):
        with pytest.raises(ValueError, match=r"ranks=.* do not fit a kernel of shape \(1, 3, 8, 8"):
            Tucker2(ranks=ranks).reason_to_skip((1, 3, 8, 8), axes)


def test_the_projection_on_two_bases():
    """Within a step: the other factors stay, the core is that of the present kernel."""
    random = np.random.default_rng(0)
    w, other = random.normal(size=(2, 3, 3, 8, 6)).astype("float32")
    axes = axes_by_rank(4)
    for compressor in (Tucker2(ranks=(2, 3)), Tucker2(ratio=0.4)):
        basis = compressor.basis(w)
        assert tuple(basis.shape) == compressor.basis_shape(w.shape, axes)
        projected = array(compressor.decode(compressor.encode_on(basis, w)))
        np.testing.assert_allclose(projected, array(compressor(w)), atol=1e-5)
        p, q = array(basis)[0, :8], array(basis)[0, 8:]
        expected = np.einsum("xyst,sa,ua,tb,vb->xyuv", other, p, p, q, q)
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


def test_a_chain_of_three_factors_keeps_the_ranks():
    w = tucker_kernel(4, 4, noise=0.1)
    chain = Chain([Tucker2(ranks=(2, 3)), UniformQuantization(8)])
    result = array(chain(w))
    assert np.linalg.matrix_rank(np.moveaxis(result, 2, 0).reshape(8, -1), tol=1e-4) == 2
    assert np.linalg.matrix_rank(np.moveaxis(result, 3, 0).reshape(6, -1), tol=1e-4) == 3
    assert 1e-4 < norm(result - array(Tucker2(ranks=(2, 3))(w))) / norm(w) < 0.02
    assert chain.encode(w).num_bits == 8 * (16 + 54 + 18) + 3 * 32


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
