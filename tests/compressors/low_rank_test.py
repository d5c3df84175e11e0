"""How the ranks of one and of two modes are chosen, rounded and limited."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware import (
    Chain,
    Compressed,
    LowRank,
    OccasionalCompression,
    Tucker2,
    UniformQuantization,
)
from keras_compaware._math.backend import compiled
from keras_compaware.base import KernelAxes, axes_by_rank
from tests.laws.helpers import array, norm
from tests.marks import slow_on_jax

PLAIN = KernelAxes((0,), (1,))


def diagonal(*values, shape=None):
    w = np.zeros(shape or (len(values), len(values)), "float32")
    np.fill_diagonal(w, values)
    return w


def planted(shape, rank, noise=0.1, seed=0):
    """Of that rank as the channel matrix (window and inputs by outputs), plus noise."""
    random = np.random.default_rng(seed)
    rows = int(np.prod(shape[:-1]))
    w = random.normal(size=(rows, rank)) @ random.normal(size=(rank, shape[-1]))
    return (w + noise * random.normal(size=w.shape)).reshape(shape).astype("float32")


def planted_modes(first, second, noise=0.1, shape=(3, 3, 30, 20)):
    random = np.random.default_rng(0)
    core = random.normal(size=(*shape[:2], first, second))
    left, right = random.normal(size=(shape[2], first)), random.normal(size=(second, shape[3]))
    w = left @ core @ right
    return (w + noise * w.std() * random.normal(size=w.shape)).astype("float32")


def rank_of(compressor, w, axes=None):
    """The rank chosen, which the map, the code and the settled compressor have in common."""
    settled = compressor.settle(w, axes)
    assert not settled.settles
    matrix = array(compressor.encode(w, axes=axes).parts["left"])
    assert matrix.shape[-1] == settled.rank
    result, again = array(compressor(w, axes=axes)), array(settled(w, axes=axes))
    np.testing.assert_allclose(result, again, atol=1e-5 * np.abs(w).max())
    return settled.rank


# ---- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LowRank(rank="vb"), ValueError, r"an integer of at least 1, or \"vbmf\"\. Rec"),
        (lambda: LowRank(rank="vbmf", energy=0.5), ValueError, "exactly one of `rank`, `ratio`"),
        (lambda: LowRank(rank=0), ValueError, "`rank` must be at least 1"),
        (lambda: LowRank(rank=2.0), TypeError, "`rank` must be an integer"),
        (lambda: LowRank(energy=0.5, energy_of="cubes"), ValueError, "one of 'squares', 'sums'"),
        (lambda: LowRank(rank=2, energy_of="sums"), ValueError, r"`energy_of`.*Received:.*rank=2"),
        (lambda: LowRank(ratio=0.5, energy_of="sums"), ValueError, "is not given"),
        (lambda: LowRank(rank=2, min_rank=2), ValueError, "`rank` is given. Leave them out"),
        (lambda: LowRank(rank=2, max_ratio=0.5), ValueError, "limit a rank that is chosen"),
        (lambda: LowRank(ratio=0.5, max_ratio=0.5), ValueError, "leave out `max_ratio`"),
        (lambda: LowRank(rank=6, round_to=4), ValueError, "must be a multiple of `round_to`"),
        (lambda: LowRank(energy=0.5, min_rank=0), ValueError, "`min_rank` must be at least 1"),
        (lambda: LowRank(energy=0.5, round_to=0), ValueError, "`round_to` must be at least 1"),
        (lambda: LowRank(energy=0.5, max_ratio=0.0), ValueError, r"`max_ratio` must be in \(0, 1"),
        (lambda: LowRank(energy=0.5, max_ratio="1"), TypeError, "`max_ratio` must be a number"),
        (lambda: LowRank(2, None, None, "channel", None, "sums"), TypeError, "positional"),
        (lambda: Tucker2(ranks="vb"), ValueError, r"a pair of integers, or \"vbmf\"\. Received"),
        (lambda: Tucker2(ranks="vbmf", ratio=0.5), ValueError, "exactly one of `ranks`, `ratio`"),
        (lambda: Tucker2(ratio=0.5, energy=0.5), ValueError, "exactly one of `ranks`, `ratio`"),
        (lambda: Tucker2(energy=1.5), ValueError, r"`energy` must be in \(0, 1\]"),
        (lambda: Tucker2(ranks=(2, 2), min_rank=2), ValueError, "`ranks` is given. Leave them"),
        (lambda: Tucker2(ratio=0.5, max_ratio=0.5), ValueError, "leave out `max_ratio`"),
        (lambda: Tucker2(ranks=(4, 6), round_to=4), ValueError, "must be multiples of `round_to`"),
        (lambda: Tucker2(energy=0.5, round_to=1.5), TypeError, "`round_to` must be an integer"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_settles_has_no_budget():
    for compressor in (LowRank(rank="vbmf"), LowRank(energy=0.5), Tucker2(ranks="vbmf")):
        assert compressor.settles
        assert compressor.budget is None
    assert LowRank(rank=8, round_to=8).budget == "rank"
    assert Tucker2(energy=0.5).budget is None
    assert LowRank(rank="vbmf").rank_of((8, 6), PLAIN) is None
    assert Tucker2(energy=0.5).ranks_of((3, 3, 8, 6), axes_by_rank(4)) is None


# ---- one mode ---------------------------------------------------------------------------------


def test_energy_of_squares_and_of_sums():
    w = diagonal(4, 3, 2, 1, 0)  # squares 16, 25, 29, 30 of 30; sums 4, 7, 9, 10 of 10
    for energy, of_squares, of_sums in (
        (0.4, 1, 1), (0.53, 1, 2), (0.54, 2, 2), (0.71, 2, 3), (0.9, 3, 3), (0.97, 4, 4)
    ):  # fmt: skip
        assert rank_of(LowRank(energy=energy), w) == of_squares
        assert rank_of(LowRank(energy=energy, energy_of="sums"), w) == of_sums
    assert rank_of(LowRank(energy=1.0, energy_of="sums"), np.zeros((4, 5), "float32")) == 1


@pytest.mark.parametrize(
    ("shape", "ratio", "limits", "rank"),
    [
        ((64, 64), 0.3, {}, 9),
        ((64, 64), 0.3, {"round_to": 8}, 8),
        ((64, 64), 0.2, {"round_to": 8}, 6),  # no multiple fits: as it is
        ((64, 64), 0.3, {"min_rank": 12}, 12),
        ((64, 64), 1.0, {"round_to": 5}, 30),
        ((9, 64), 1.0, {"round_to": 4, "min_rank": 16}, 9),  # not above the full rank
    ],
)
def test_ranks_for_a_ratio(shape, ratio, limits, rank):
    assert LowRank(ratio=ratio, **limits).rank_of(shape, PLAIN) == rank


@pytest.mark.parametrize(
    ("energy", "limits", "rank"),
    [
        (0.5, {}, 10),
        (0.5, {"round_to": 4}, 12),
        (0.5, {"round_to": 10}, 10),
        (0.5, {"round_to": 16}, 16),
        (0.05, {"min_rank": 3}, 3),
        (0.95, {"round_to": 8}, 20),  # the full rank is no multiple
        (1.0, {"max_ratio": 1.0}, 10),  # 20 * 20 / 40
        (1.0, {"max_ratio": 1.0, "round_to": 4}, 8),
        (1.0, {"max_ratio": 0.35, "round_to": 4}, 3),  # not one multiple fits
        (1.0, {"max_ratio": 0.2, "min_rank": 5}, 5),  # the floor counts
        (0.1, {"max_ratio": 0.01}, 1),
    ],
)
def test_ranks_for_an_energy(energy, limits, rank):
    w = diagonal(*np.ones(20))
    assert rank_of(LowRank(energy=energy, **limits), w) == rank


@pytest.mark.parametrize(("shape", "split"), [((40, 60), "channel"), ((3, 3, 8, 40), "channel")])
def test_variational_bayes_finds_a_planted_rank(shape, split):
    w = planted(shape, 5)
    assert rank_of(LowRank(rank="vbmf", split=split), w) == 5
    assert rank_of(LowRank(rank="vbmf", round_to=4), w) == 8
    assert rank_of(LowRank(rank="vbmf", min_rank=7), w) == 7
    largest = LowRank(rank="vbmf", max_ratio=0.1).settle(w).rank
    assert largest == LowRank(ratio=0.1).rank_of(shape, axes_by_rank(len(shape))) < 5
    noise = np.random.default_rng(1).normal(size=shape).astype("float32")
    assert rank_of(LowRank(rank="vbmf"), noise) == 1  # a kernel has one rank at least


def test_variational_bayes_of_the_spatial_matrix():
    random = np.random.default_rng(0)
    columns, rows = random.normal(size=(5, 12, 4)), random.normal(size=(4, 5, 16))
    w = np.einsum("kcr,rls->klcs", columns, rows) + 0.1 * random.normal(size=(5, 5, 12, 16))
    assert rank_of(LowRank(rank="vbmf", split="spatial"), w.astype("float32")) == 4
    assert LowRank(rank="vbmf").settle(w.astype("float32")).rank > 4


def test_of_a_stack_the_largest_rank_is_taken():
    w = np.concatenate([planted((40, 30), rank, seed=rank) for rank in (2, 6, 1)], axis=1)
    grouped = KernelAxes((0,), (1,), groups=3)
    assert rank_of(LowRank(rank="vbmf"), w, grouped) == 6


def test_removed_channels_and_padding_are_no_noise():
    """Zeros would lower the estimated noise, above which everything stands out then."""
    w = planted((40, 30), 3, noise=1.0)
    removed = np.zeros((90, 80), "float32")
    removed[:80:2, :60:2] = w
    assert rank_of(LowRank(rank="vbmf"), removed) == rank_of(LowRank(rank="vbmf"), w) == 3
    tall = np.random.default_rng(0).normal(size=(65, 64)).astype("float32")
    tiled = LowRank(rank="vbmf", tile=32)  # the last tiles have one row
    assert tiled.settle(tall) == LowRank(rank=1, tile=32)


def test_settled_it_does_not_erode():
    w = planted((40, 60), 5, noise=2.0)
    settled = LowRank(rank="vbmf").settle(w)
    kept = w
    for _ in range(5):
        kept = array(settled(kept))
    assert np.linalg.matrix_rank(kept, tol=1e-3) == settled.rank


def test_a_ramp_rounds_like_the_argument():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    tensor = ops.convert_to_tensor(w)

    def ramped(compressor):
        return compiled(lambda w, budget: compressor(w, budget=budget))

    def rank(result):
        return np.linalg.matrix_rank(array(result), tol=1e-3)

    by_ratio = LowRank(ratio=0.2, round_to=4, min_rank=2)
    function = ramped(by_ratio)
    for ratio in (1.0, 0.83, 0.5, 0.3, 0.1):  # 12, 9.96, 6, 3.6, 1.2
        result = function(tensor, ops.convert_to_tensor(np.float32(ratio)))
        expected = by_ratio.replace(ratio=ratio).rank_of(w.shape, PLAIN)
        assert rank(result) == expected == {1.0: 12, 0.83: 8, 0.5: 4, 0.3: 3, 0.1: 2}[ratio]
    function = ramped(LowRank(rank=8, round_to=8))
    for budget, expected in ((20.0, 16), (15.7, 16), (15.4, 8), (8.0, 8)):
        assert rank(function(tensor, ops.convert_to_tensor(np.float32(budget)))) == expected


def test_no_gain_from_the_least_rank_is_told():
    assert LowRank(energy=0.5, min_rank=3).reason_to_skip((8, 6), PLAIN) is None
    assert LowRank(rank="vbmf", min_rank=4).reason_to_skip((8, 6), PLAIN) == (
        "a 8 x 6 matrix has no smaller factors, even at rank 4"
    )
    assert "rank 4 saves nothing" in LowRank(ratio=0.5, min_rank=4).reason_to_skip((8, 6), PLAIN)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no values to hide")
@pytest.mark.parametrize("compressor", [LowRank(rank="vbmf"), Tucker2(energy=0.5)])
def test_values_that_are_not_known_are_asked_for(compressor):
    function = compiled(lambda w: compressor(w))
    with pytest.raises(ValueError, match=r"are not known while a function is being compiled. Set"):
        function(ops.ones((3, 3, 4, 4)))


def test_straight_through_refuses_a_rank_of_the_values():
    for compressor in (LowRank(rank="vbmf"), Chain([Tucker2(ranks="vbmf")])):
        with pytest.raises(ValueError, match="takes its rank from the kernel's values"):
            Compressed(layers.Dense(3), compressor)


def test_the_callback_keeps_the_rank_of_the_first_firing():
    model = keras.Sequential([keras.Input((40,)), layers.Dense(30, name="a"), layers.Dense(1)])
    model.layers[0].kernel.assign(planted((40, 30), 3, noise=0.5))
    callback = OccasionalCompression(LowRank(rank="vbmf"), every=1, where="^a")
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    x = np.random.default_rng(0).normal(size=(16, 40)).astype("float32")
    model.fit(x, x[:, :1], batch_size=4, verbose=0, callbacks=[callback])
    assert callback.compressors == {"a/kernel": LowRank(rank=3)}
    assert np.linalg.matrix_rank(array(model.layers[0].kernel), tol=1e-3) == 3


# ---- two modes --------------------------------------------------------------------------------


def ranks_of(compressor, w, axes=None):
    settled = compressor.settle(w, axes)
    assert not settled.settles
    shapes = {n: p.shape[1:] for n, p in compressor.encode(w, axes=axes).parts.items()}
    first, second = settled.ranks
    assert (shapes["input"][1], shapes["output"][0]) == (first, second)
    assert tuple(shapes["core"][1:]) == (first, second)
    result, again = array(compressor(w, axes=axes)), array(settled(w, axes=axes))
    np.testing.assert_allclose(result, again, atol=1e-4 * np.abs(w).max())
    return settled.ranks


@slow_on_jax
def test_variational_bayes_finds_both_planted_ranks():
    w = planted_modes(4, 6)
    assert ranks_of(Tucker2(ranks="vbmf"), w) == (4, 6)
    assert ranks_of(Tucker2(ranks="vbmf", round_to=4), w) == (4, 8)
    assert ranks_of(Tucker2(ranks="vbmf", min_rank=5), w) == (5, 6)
    noise = np.random.default_rng(1).normal(size=w.shape).astype("float32")
    assert ranks_of(Tucker2(ranks="vbmf"), noise) == (1, 1)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95, 1.0])
def test_energy_of_two_modes_bounds_the_error(energy):
    w = planted_modes(6, 9, noise=0.7)
    ranks = ranks_of(Tucker2(energy=energy), w)
    for axis, rank in zip((2, 3), ranks, strict=True):
        unfolding = np.moveaxis(w.astype("float64"), axis, 0).reshape(w.shape[axis], -1)
        shares = np.cumsum(np.linalg.svd(unfolding, compute_uv=False) ** 2)
        shares /= shares[-1]
        assert shares[rank - 1] >= energy - 1e-5
        assert rank == 1 or shares[rank - 2] < energy
    error = norm(array(Tucker2(energy=energy)(w)) - w) / norm(w)
    assert error <= np.sqrt(2 * (1 - energy)) + 1e-5


def test_no_rank_above_the_other_times_the_window():
    """One output can be seen through as many inputs as the window has positions, not more."""
    random = np.random.default_rng(0)
    w = random.normal(size=(1, 2, 6, 1)) * np.ones((1, 1, 1, 4))
    w = (w + 1e-3 * random.normal(size=w.shape)).astype("float32")
    ranks = ranks_of(Tucker2(energy=0.9999), w)
    assert ranks == (2, 1)
    assert norm(array(Tucker2(energy=0.9999)(w)) - w) <= 0.015 * norm(w)


def test_a_cap_lowers_both_ranks_in_proportion():
    w = planted_modes(8, 12, noise=0.01)
    shape, axes = w.shape, axes_by_rank(4)
    assert ranks_of(Tucker2(energy=0.9999), w) == (8, 12)
    whole = np.prod(shape)
    for limits in ({"max_ratio": 0.15}, {"max_ratio": 0.15, "round_to": 4}):
        first, second = ranks_of(Tucker2(energy=0.9999, **limits), w)
        cost = 30 * first + 9 * first * second + 20 * second
        assert cost <= 0.15 * whole
        assert abs(first / 8 - second / 12) <= 1 / 8 if "round_to" not in limits else True
        assert all(rank % limits.get("round_to", 1) == 0 for rank in (first, second))
    assert ranks_of(Tucker2(energy=0.9999, max_ratio=0.01, min_rank=3), w) == (3, 3)
    assert ranks_of(Tucker2(energy=0.9999, max_ratio=1.0), w) == (8, 12)
    assert (
        Tucker2(energy=0.9, min_rank=30).reason_to_skip(shape, axes).startswith("ranks 30 and 20")
    )
    assert Tucker2(ranks="vbmf").reason_to_skip(shape, axes) is None


def test_multiples_for_a_ratio_of_two_modes():
    axes, shape = axes_by_rank(4), (3, 3, 64, 64)
    for ratio, plain, rounded in (
        (0.25, (26, 25), (24, 24)), (0.5, (39, 38), (40, 32)), (0.02, (4, 4), (4, 4))
    ):  # fmt: skip
        assert Tucker2(ratio=ratio).ranks_of(shape, axes) == plain
        assert Tucker2(ratio=ratio, round_to=8).ranks_of(shape, axes) == rounded
        costs = [64 * (a + b) + 9 * a * b for a, b in (plain, rounded)]
        assert max(costs) <= ratio * np.prod(shape)
    assert Tucker2(ratio=0.02, min_rank=6).ranks_of(shape, axes) == (6, 6)


def test_chains_settle_their_first_member():
    w = planted_modes(4, 6)
    chain = Chain([Tucker2(ranks="vbmf"), UniformQuantization(8)])
    assert chain.settle(w) == Chain([Tucker2(ranks=(4, 6)), UniformQuantization(8)])
    chain = Chain([LowRank(rank="vbmf"), UniformQuantization(8)])
    assert chain.settle(planted((40, 60), 5)).compressors[0] == LowRank(rank=5)


def test_bases_of_ranks_that_are_chosen():
    """Of the largest possible shape; what is beyond the ranks is zero."""
    axes = axes_by_rank(4)
    w = planted_modes(2, 3, shape=(3, 3, 8, 6))
    for compressor in (Tucker2(energy=0.9), LowRank(rank="vbmf")):
        basis = compressor.basis(w)
        assert tuple(basis.shape) == compressor.basis_shape(w.shape, axes)
        projected = array(compressor.decode(compressor.encode_on(basis, w)))
        np.testing.assert_allclose(projected, array(compressor(w)), atol=1e-4)
