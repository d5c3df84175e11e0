"""Group lasso on some of the groups: which ones, and what becomes of a network."""

import itertools

import keras
import numpy as np
import pytest

import keras_compaware as kc
from keras_compaware import GroupPruning, PartialGroupLasso
from keras_compaware.base import KernelAxes, axes_by_rank
from tests.laws.helpers import array, eagerly

PLAIN = axes_by_rank(2)


def prox(regularizer, w, step_size, axes=None):
    with eagerly():
        return array(regularizer.prox(w, step_size, axes))


def penalised(regularizer, shape, axes=None):
    """Where a large step leaves zeros of a kernel of ones."""
    return prox(regularizer, np.ones(shape, "float32"), 1e6, axes) == 0


# ---- the largest are free ---------------------------------------------------------------------


def test_the_largest_are_free_by_hand():
    w = np.array([[3.0, 4.0], [0.6, 0.8], [6.0, 8.0], [1.2, 1.6]], "float32")
    regularizer = PartialGroupLasso(1.0, fraction=0.5, weighted=False, mode="largest")
    assert float(regularizer(w)) == pytest.approx(3.0)
    expected = w * np.array([[1], [0], [1], [0.25]], "float32")  # norms 1 and 2, threshold 1.5
    np.testing.assert_allclose(prox(regularizer, w, 1.5), expected, atol=1e-6)
    np.testing.assert_array_equal(prox(regularizer, w, 9.0), array(GroupPruning(0.5)(w)))


@pytest.mark.parametrize(("fraction", "number"), [(0.1, 1), (0.3, 2), (0.5, 4), (1.0, 7)])
def test_exactly_that_many_are_penalised(fraction, number):
    w = np.random.default_rng(0).normal(size=(7, 3)).astype("float32")
    regularizer = PartialGroupLasso(1.0, fraction=fraction, mode="largest")
    assert regularizer.num_penalised((7, 3), PLAIN) == number
    assert np.sum(np.all(prox(regularizer, w, 100.0) == 0, axis=1)) == number
    assert np.sum(np.any(prox(regularizer, w, 1e-3) != w, axis=1)) == number


@pytest.mark.parametrize("l1_strength", [0.0, 0.4])
@pytest.mark.parametrize("step_size", [0.05, 0.5, 1.5, 50.0])
def test_groups_of_different_size_are_the_best_choice(step_size, l1_strength):
    """Against all choices of what is spared: which is best depends on the step."""
    random = np.random.default_rng(4)
    for _ in range(4):
        w = (random.normal(size=(5, 3)) * random.uniform(0.2, 2.0, size=(5, 1))).astype("float32")
        tiles = [(slice(r, r + 2), slice(c, c + 2)) for r in (0, 2, 4) for c in (0, 2)]

        def shrunk(tile, w=w):
            part = w[tile].astype("float64")
            u = np.sign(part) * np.maximum(np.abs(part) - step_size * l1_strength, 0)
            weight, norm = np.sqrt(part.size), np.linalg.norm(u)
            z = u * max(0.0, 1 - step_size * 0.5 * weight / norm) if norm > 0 else u
            penalty = 0.5 * weight * np.linalg.norm(z) + l1_strength * np.abs(z).sum()
            return z, 0.5 * np.sum((z - part) ** 2) + step_size * penalty

        found = [shrunk(tile) for tile in tiles]
        best = min(
            itertools.combinations(range(6), 3), key=lambda chosen: sum(found[i][1] for i in chosen)
        )
        expected = w.astype("float64")
        for index in best:
            expected[tiles[index]] = found[index][0]
        regularizer = PartialGroupLasso(
            0.5, fraction=0.5, mode="largest", l1_strength=l1_strength, block=(2, 2)
        )
        result = prox(regularizer, w, step_size)
        np.testing.assert_allclose(result, expected, atol=1e-5)
        values = {  # the penalty is the minimum over all choices
            chosen: sum(
                0.5 * np.sqrt(w[tiles[i]].size) * np.linalg.norm(w[tiles[i]])
                + l1_strength * np.abs(w[tiles[i]]).sum()
                for i in chosen
            )
            for chosen in itertools.combinations(range(6), 3)
        }
        with eagerly():
            assert float(regularizer(w)) == pytest.approx(min(values.values()), rel=1e-5)


def test_large_steps_prune_tiles_of_different_size_as_group_pruning_does():
    w = np.random.default_rng(5).normal(size=(7, 5)) * np.geomspace(0.1, 10, 7)[:, None]
    w = w.astype("float32")
    regularizer = PartialGroupLasso(1.0, fraction=0.5, mode="largest", block=(3, 2))
    with eagerly():
        expected = array(GroupPruning(0.5, block=(3, 2))(w))
    np.testing.assert_array_equal(prox(regularizer, w, 1e4), expected)
    for scale in (1e-25, 1e25):  # the order is found without overflow
        scaled = np.float32(scale) * w
        result = prox(regularizer, scaled, 1e4 * scale)
        np.testing.assert_array_equal(result != 0, expected != 0)


def test_many_groups_are_told_apart_inside_the_training_step():
    """Of more than 16 groups the largest are found in a loop, which must compile in both."""
    regularizer = PartialGroupLasso(0.5, fraction=0.6, weighted=False, mode="largest")
    w = np.random.default_rng(6).normal(size=(20, 3)).astype("float32")
    layer = keras.layers.Dense(3, use_bias=False, kernel_regularizer=regularizer)
    model = keras.Sequential([keras.Input((20,)), layer])
    layer.kernel.assign(w)
    recipe = kc.Recipe([kc.Rule(".*", kc.Proximal(regularizer))])
    model.compile(recipe.optimizer(keras.optimizers.SGD(0.1)), "mse")
    x = np.zeros((4, 20), "float32")
    model.fit(x, np.zeros((4, 3)), verbose=0, callbacks=recipe.callbacks(model))
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    small = norms < np.sort(norms.ravel())[12]
    expected = np.where(small, w * np.maximum(0, 1 - 2 * 0.1 * 0.5 / norms), w)  # loss, then map
    np.testing.assert_allclose(array(layer.kernel), expected, atol=1e-6)


def test_equal_groups_are_spared_in_order():
    result = penalised(PartialGroupLasso(1.0, fraction=0.5, mode="largest"), (6, 2))
    np.testing.assert_array_equal(result.all(axis=1), [0, 0, 0, 1, 1, 1])


# ---- an index set -----------------------------------------------------------------------------


def test_the_indices_say_which():
    result = penalised(PartialGroupLasso(1.0, indices=(4, 1)), (6, 2))
    np.testing.assert_array_equal(result.all(axis=1), [0, 1, 0, 0, 1, 0])
    result = penalised(PartialGroupLasso(1.0, indices=[0], axis="outputs"), (6, 2))
    np.testing.assert_array_equal(result, [[1, 0]] * 6)
    assert PartialGroupLasso(1.0, indices=[2, 0]).num_penalised((6, 2), PLAIN) == 2


def test_entries_of_free_groups_are_free():
    w = np.full((4, 3), 0.1, "float32")
    result = prox(PartialGroupLasso(1e-3, fraction=0.5, l1_strength=1.0), w, 1.0)
    np.testing.assert_array_equal(result, np.where(np.arange(4)[:, None] < 2, 0, w))


def test_an_index_beyond_the_kernel_is_refused():
    regularizer = PartialGroupLasso(1.0, indices=(0, 6))
    for call in (
        lambda: regularizer(np.ones((6, 2), "float32")),
        lambda: regularizer.reason_to_skip((6, 2), PLAIN),
    ):
        with pytest.raises(ValueError, match=r"which is 6 for a kernel of shape \(6, 2\)"):
            call()


# ---- candidates x those that stay -------------------------------------------------------------


def test_the_submatrix_by_hand():
    regularizer = PartialGroupLasso(1.0, fraction=0.5, mode="block", next_fraction=0.4)
    expected = np.zeros((4, 5), bool)
    expected[:2, 2:] = True
    np.testing.assert_array_equal(penalised(regularizer, (4, 5)), expected)
    w = np.ones((4, 5), "float32")
    assert float(regularizer(w)) == pytest.approx(2 * 3)  # sqrt(3) sqrt(3) for each row
    assert float(regularizer.replace(weighted=False)(w)) == pytest.approx(2 * np.sqrt(3))
    result = prox(regularizer, w, 0.5)  # 1 - 0.5 sqrt(3) / sqrt(3)
    np.testing.assert_allclose(result, np.where(expected, 0.5, 1.0), atol=1e-6)


def test_all_outputs_of_the_last_kernel_stay():
    result = penalised(PartialGroupLasso(1.0, mode="block", next_fraction=0), (4, 3))
    np.testing.assert_array_equal(result, np.arange(4)[:, None] < [[2, 2, 2]])


def test_the_next_fraction_is_the_fraction_by_default():
    one = PartialGroupLasso(1.0, fraction=0.25, mode="block")
    two = one.replace(next_fraction=0.25)
    np.testing.assert_array_equal(penalised(one, (8, 4)), penalised(two, (8, 4)))
    assert np.sum(penalised(one, (8, 4))) == 2 * 3


def test_a_window_belongs_to_its_input():
    regularizer = PartialGroupLasso(1.0, mode="block")
    result = penalised(regularizer, (3, 2, 4, 6))
    np.testing.assert_array_equal(result, np.broadcast_to(result[:1, :1], result.shape))
    np.testing.assert_array_equal(result[0, 0], [[0, 0, 0, 1, 1, 1]] * 2 + [[0] * 6] * 2)
    assert float(regularizer(np.ones((3, 2, 4, 6), "float32"))) == pytest.approx(2 * 18, rel=1e-5)


def test_the_channels_of_a_grouped_convolution_are_counted_as_the_layer_counts_them():
    """Inputs 0-1 lead to outputs 0-2, inputs 2-3 to outputs 3-5."""
    axes = KernelAxes((2,), (3,), (0, 1), groups=2)
    regularizer = PartialGroupLasso(1.0, fraction=0.75, mode="block", next_fraction=1 / 3)
    result = penalised(regularizer, (1, 1, 2, 6), axes)[0, 0]
    # Candidates are inputs 0, 1, 2 and outputs 0, 1; input 3 is the second one of block 1.
    np.testing.assert_array_equal(result, [[0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]])


def test_a_kernel_without_such_entries_is_left_alone():
    regularizer = PartialGroupLasso(1.0, mode="block")
    depthwise = KernelAxes((), (3,), (0, 1))  # a channel leads to itself only
    assert "no candidate for removal leads" in regularizer.reason_to_skip((3, 3, 4, 1), depthwise)
    assert regularizer.reason_to_skip((4, 4), PLAIN) is None
    assert PartialGroupLasso(1.0).reason_to_skip((4, 4), PLAIN) is None
    assert PartialGroupLasso(1.0, mode="largest").reason_to_skip((4, 4), PLAIN) is None


def test_candidates_disappear_from_a_network():
    """Their entries towards one another are free, and vanish with the units that they lead to."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.Dense(6, activation="relu", name="second"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    x = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    for name, fraction, next_fraction in (("second", 0.5, 1 / 3), ("head", 1 / 3, 0.0)):
        kernel = model.get_layer(name).kernel
        lasso = PartialGroupLasso(1.0, fraction=fraction, mode="block", next_fraction=next_fraction)
        kernel.assign(prox(lasso, array(kernel), 1e6))
    second = array(model.get_layer("second").kernel)
    assert np.all(second[:4, :2] != 0)
    small = kc.compact(model).model
    assert small.get_layer("first").units == 4
    assert small.get_layer("second").units == 4
    expected = array(model(x))
    np.testing.assert_allclose(array(small(x)), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "block", "axis": "outputs"}, ValueError, "leave out `axis` and `block`"),
        ({"mode": "block", "block": (2, 2)}, ValueError, "leave out `axis` and `block`"),
        ({"mode": "block", "fraction": 1.0}, ValueError, "give a `next_fraction` below 1"),
        ({"mode": "block", "next_fraction": 1.5}, ValueError, r"must be in \[0, 1\]"),
        ({"next_fraction": 0.5}, ValueError, "`next_fraction` belongs to mode='block'"),
        ({"indices": ()}, TypeError, "a tuple of at least one integer"),
        ({"indices": 3}, TypeError, "a tuple of at least one integer"),
        ({"indices": (1, 1)}, ValueError, "must be different"),
        ({"indices": (True, False)}, TypeError, "must be an integer"),
        ({"indices": (-1,)}, ValueError, "at least 0"),
        ({"indices": (1,), "fraction": 0.25}, ValueError, "leave `fraction` and `mode`"),
        ({"indices": (1,), "mode": "largest"}, ValueError, "leave `fraction` and `mode`"),
        ({"l1_strength": -0.5}, ValueError, "PartialGroupLasso: `l1_strength` must be"),
        ({"strength": 0.0, "l1_strength": 0.5}, ValueError, "for the entries alone use L1"),
        ({"fraction": 0.0}, ValueError, r"`fraction` must be in \(0, 1\]"),
        ({"block": (1, 0)}, ValueError, "`block` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PartialGroupLasso(**{"strength": 1.0, **arguments})
