"""What holds for every proximal regularizer, on every kind of kernel."""

import functools
import inspect
import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import GroupLasso, NuclearNorm, PartialGroupLasso
from keras_compaware._math.backend import compiled
from keras_compaware.base import KernelAxes, axes_by_rank
from keras_compaware.kernels import find_targets
from tests.laws.cases import REGULARIZERS
from tests.laws.helpers import array, eagerly, norm, value_and_gradient
from tests.laws.kernels_under_test import EVERY, FEW, kernel, matrices, unit_groups

STRENGTH = 0.7  # of every row

ON_JAX = keras.backend.backend() == "jax"


def rows(found):
    slow = {True: [pytest.mark.slow], False: []}
    found = [pytest.param(c, id=c.id, marks=slow[c.variant and ON_JAX]) for c in found]
    return pytest.mark.parametrize("case", found)


def on_every_kernel(function):
    """All rows on every kernel; fast: one row of each kind, the others on a few kernels."""
    pairs = []
    for case, found in itertools.product(REGULARIZERS, EVERY):
        name, *marks = (found,) if isinstance(found, str) else (*found.values, *found.marks)
        if case.variant and (ON_JAX or name not in FEW):
            marks = [pytest.mark.slow]
        pairs.append(pytest.param(case, name, id=f"{name}-{case.id}", marks=marks))
    return pytest.mark.parametrize(("case", "name"), pairs)(function)


cases = rows(REGULARIZERS)
convex_cases = rows([case for case in REGULARIZERS if case.convex])
on_few_kernels = pytest.mark.parametrize("name", FEW)


def prox(case, w, step_size, axes, **kwargs):
    with eagerly():
        return array(case.regularizer.prox(w, step_size, axes, **kwargs))


def middling_step(case, w, axes):
    """A step size between the thresholds at which the groups or directions become zero."""
    if case.groups is None:
        units = unit_groups(w.shape, axes, "outputs")
        return 0.5 * max(np.linalg.norm(w[mask]) for mask in units) / STRENGTH
    ends = sorted(np.linalg.norm(w[mask]) / c for mask, c in case.groups(w, axes))
    middle = len(ends) // 2
    step = float(ends[middle] + ends[middle - 1]) / 2 / STRENGTH if middle else 0.5
    return 0.6 * step if case.in_proportion else step


@functools.cache
def shrunk(case, name):
    """`(w, axes, step size, prox)` on a kernel of normal random numbers."""
    found = kernel(name)
    w = found.random()
    before = w.copy()
    step_size = middling_step(case, w, found.axes)
    result = prox(case, w, step_size, found.axes)
    np.testing.assert_array_equal(w, before)
    return w, found.axes, step_size, result


# ---- on every kernel --------------------------------------------------------------------------


@on_every_kernel
def test_the_penalty_is_that_computed_by_hand(case, name):
    found = kernel(name)
    w = found.random()
    with eagerly():
        value = case.regularizer(w, axes=found.axes)
    assert tuple(value.shape) == ()
    assert float(value) == pytest.approx(case.value(w, found.axes), rel=2e-5)


@on_every_kernel
def test_the_proximal_map_is_that_computed_by_hand(case, name):
    w, axes, step_size, result = shrunk(case, name)
    expected = case.oracle(w, axes, step_size * STRENGTH)
    assert result.shape == w.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


@on_every_kernel
def test_exact_zeros_appear(case, name):
    w, axes, step_size, result = shrunk(case, name)
    oracle = case.oracle(w, axes, step_size * STRENGTH)
    if case.groups is None:
        assert norm(result) == pytest.approx(np.linalg.norm(oracle), rel=1e-5)
        rank = max(np.linalg.matrix_rank(m, 1e-6) for m, _ in found_matrices(case, oracle, axes))
        with eagerly():
            assert int(case.regularizer.rank(result, axes)) == rank
        return
    np.testing.assert_array_equal(result == 0, oracle == 0)
    penalised = [mask for mask, _ in case.groups(w, axes)]
    zero = sum(np.all(result[mask] == 0) for mask in penalised)
    if case.in_proportion:
        assert np.any(result[np.any(penalised, axis=0)] == 0)
    else:
        assert zero == len(penalised) // 2


@on_every_kernel
def test_groups_vanish_at_their_critical_thresholds(case, name):
    found = kernel(name)
    w = found.random()

    def thresholds(w):
        with eagerly():
            return array(case.regularizer.critical_thresholds(w, found.axes))

    before = thresholds(w)
    assert before.ndim == 1
    finite = np.sort(before[np.isfinite(before)])
    if case.groups is not None:
        assert len(finite) == len(case.groups(w, found.axes))
    middle = finite[len(finite) // 2]
    for threshold in (middle * (1 - 1e-3), middle * (1 + 1e-5)):
        after = thresholds(prox(case, w, threshold / STRENGTH, found.axes))
        vanished = np.count_nonzero(before <= threshold)
        if case.gap:  # further ones, by the other of two maps
            assert np.count_nonzero(after == 0) >= vanished
        else:
            np.testing.assert_array_equal(after == 0, before <= threshold)
    zeros = np.count_nonzero(thresholds(np.zeros_like(w)) == 0)
    assert zeros == np.count_nonzero(np.isfinite(before))
    with eagerly():
        pruned = array(case.regularizer.prune(w, before > middle, axes=found.axes))
    np.testing.assert_array_equal(thresholds(pruned) == 0, before <= middle)
    if case.groups is not None and not case.in_proportion:
        kept = prox(case, w, middle * (1 + 1e-5) / STRENGTH, found.axes) != 0
        np.testing.assert_array_equal(pruned, np.where(kept, w, 0))


def found_matrices(case, w, axes):
    return matrices(w, axes, case.regularizer.split)


@on_every_kernel
def test_nothing_near_the_proximal_map_is_better(case, name):
    """F(z) >= F(p) + ||z - p||^2 / 2 for F(z) = ||z - w||^2 / 2 + t R(z), if R is convex."""
    w, axes, step_size, result = shrunk(case, name)
    w, p = w.astype("float64"), result.astype("float64")

    def objective(z):
        return 0.5 * np.sum((z - w) ** 2) + step_size * case.value(z, axes)

    best = objective(p)
    random = np.random.default_rng(3)
    directions = [w - p, -p, p, *random.normal(size=(3, *w.shape))]
    for mask in unit_groups(w.shape, axes, "outputs")[:2]:
        directions.append(np.where(mask, w, 0))
    for direction in directions:
        for scale in (1e-2, 0.3, 1.0):
            z = p + scale * direction
            further = 0.5 * np.sum((z - p) ** 2) if case.convex and not case.gap else 0.0
            assert objective(z) >= best + further - (2e-5 + case.gap) * best


# ---- on a few kernels -------------------------------------------------------------------------


@cases
@on_few_kernels
def test_a_step_of_size_zero_changes_nothing(case, name):
    found = kernel(name)
    w = found.random()
    result = prox(case, w, 0.0, found.axes)
    if case.exact:
        np.testing.assert_array_equal(result, w)
    np.testing.assert_allclose(result, w, rtol=0, atol=1e-5)


@cases
@on_few_kernels
def test_a_large_step_leaves_what_is_free_as_its_compressor_does(case, name):
    found = kernel(name)
    w = found.random()
    expected = np.zeros_like(w)
    if case.groups is not None:
        penalised = np.any([mask for mask, _ in case.groups(w, found.axes)], axis=0)
        expected = np.where(penalised, 0, w)
    with eagerly():
        selected = expected if case.pair is None else array(case.pair(w, axes=found.axes))
    if case.groups is not None:
        np.testing.assert_array_equal(selected, expected)
    for step_size in (1e4, 1e30):
        result = prox(case, w, step_size, found.axes)
        np.testing.assert_array_equal(result == 0, selected == 0)
        np.testing.assert_allclose(result, selected, rtol=0, atol=0 if case.exact else 1e-5)


@convex_cases
@on_few_kernels
def test_it_does_not_expand(case, name):
    w, axes, step_size, result = shrunk(case, name)
    random = np.random.default_rng(4)
    for scale in (1e-3, 0.1, 3.0):
        other = w + scale * random.normal(size=w.shape).astype("float32")
        distance = np.linalg.norm(prox(case, other, step_size, axes) - result)
        assert distance <= np.linalg.norm(other - w) * (1 + 1e-6) + 1e-6 * norm(w)


@cases
@on_few_kernels
def test_compiled_it_finds_the_same_and_takes_a_budget(case, name):
    w, axes, step_size, result = shrunk(case, name)
    assert case.regularizer.budget == "strength"
    step = ops.convert_to_tensor(np.float32(step_size))
    strength = ops.convert_to_tensor(np.float32(0.2))
    function = compiled(lambda w, step, budget: case.regularizer.prox(w, step, axes, budget))
    tensor = ops.convert_to_tensor(w)
    same = function(tensor, step, ops.convert_to_tensor(np.float32(STRENGTH)))
    np.testing.assert_allclose(array(same), result, rtol=0, atol=5e-6)
    scaled = {name: getattr(case.regularizer, name) * 0.2 / 0.7 for name in case.in_proportion}
    weaker = case.regularizer.replace(strength=0.2, **scaled)
    expected = array(compiled(lambda w, step: weaker.prox(w, step, axes))(tensor, step))
    np.testing.assert_allclose(array(function(tensor, step, strength)), expected, rtol=0, atol=5e-6)
    assert norm(expected) > norm(result)


@cases
@on_few_kernels
def test_the_gradient_is_that_computed_by_hand(case, name):
    found = kernel(name)
    w = found.random()

    def penalty(w):
        return case.regularizer(w, axes=found.axes)

    value, gradient = value_and_gradient(penalty, w)
    assert value == pytest.approx(case.value(w, found.axes), rel=2e-5)
    np.testing.assert_allclose(gradient, case.gradient(w, found.axes), rtol=0, atol=2e-4)
    direction = np.random.default_rng(6).normal(size=w.shape)
    h = 1e-5
    ahead = case.value(w + h * direction, found.axes)
    behind = case.value(w - h * direction, found.axes)
    assert np.sum(gradient * direction) == pytest.approx((ahead - behind) / (2 * h), rel=2e-3)


@cases
def test_the_gradient_is_finite_where_there_is_none(case):
    axes = axes_by_rank(2)
    zeros = np.zeros((8, 6), "float32")
    value, gradient = value_and_gradient(lambda w: case.regularizer(w, axes=axes), zeros)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, zeros)
    some = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    some[2] = 0
    some[:, 3] = 0
    _, gradient = value_and_gradient(lambda w: case.regularizer(w, axes=axes), some)
    assert np.all(np.isfinite(gradient))


@cases
def test_extreme_values_stay_finite(case):
    w = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    expected = prox(case, w, 0.5, None)
    for a in (2.0**-60, 2.0**60):  # R(a w) = a R(w), so prox(a w, a t) = a prox(w, t)
        scaled = prox(case, np.float32(a) * w, 0.5 * a, None) / np.float32(a)
        np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-5)
        with eagerly():
            value = float(case.regularizer(np.float32(a) * w)) / a
            assert value == pytest.approx(float(case.regularizer(w)), rel=1e-5)


@cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_proximal_map_keeps_the_dtype(case, dtype):
    w = ops.cast(np.random.default_rng(0).normal(size=(8, 6)).astype("float32"), dtype)
    with eagerly():
        result = case.regularizer.prox(w, 0.5)
        value = case.regularizer(w)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    expected = prox(case, array(w), 0.5, None)
    np.testing.assert_allclose(array(result), expected, rtol=2.0**-7, atol=1e-6)


# ---- in Keras ---------------------------------------------------------------------------------


def test_training_with_the_penalty_lowers_it():
    """All rows at once, one layer each; the data's loss is zero, so the loss is the penalties."""
    found = [case for case in REGULARIZERS if case.in_loss]
    inputs = keras.Input((8,))
    outputs = []
    for number, case in enumerate(found):
        layer = keras.layers.Dense(
            6, use_bias=False, kernel_regularizer=case.regularizer, name=f"layer{number}"
        )
        outputs.append(layer(inputs))
    model = keras.Model(inputs, 0.0 * keras.layers.Add()(outputs))
    model.compile(keras.optimizers.SGD(0.02), "mse")
    x, y = np.ones((8, 8), "float32"), np.zeros((8, 6), "float32")

    def penalties():
        kernels = [array(model.get_layer(f"layer{n}").kernel) for n in range(len(found))]
        both = zip(found, kernels, strict=True)
        return np.array([case.value(w, axes_by_rank(2)) for case, w in both])

    before = penalties()
    assert model.evaluate(x, y, verbose=0) == pytest.approx(before.sum(), rel=1e-4)
    model.fit(x, y, epochs=5, batch_size=8, verbose=0)
    after = penalties()
    assert np.all(after < 0.97 * before)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(after.sum(), rel=1e-4)


def test_a_layer_saves_and_restores_its_regularizer():
    for case in REGULARIZERS:
        layer = keras.layers.Dense(2, kernel_regularizer=case.regularizer)
        again = keras.layers.Dense.from_config(json.loads(json.dumps(layer.get_config())))
        assert again.kernel_regularizer == case.regularizer


@cases
def test_the_configuration_is_the_constructor(case):
    regularizer = case.regularizer
    assert list(regularizer.get_config()) == list(inspect.signature(type(regularizer)).parameters)
    again = type(regularizer).from_config(regularizer.get_config())
    assert again == regularizer
    assert hash(again) == hash(regularizer)
    text = json.dumps(keras.saving.serialize_keras_object(regularizer))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(restored) is type(regularizer)
    assert restored == regularizer
    assert hash(restored) == hash(regularizer)


def test_the_rows_are_distinct():
    assert len({case.id for case in REGULARIZERS}) == len(REGULARIZERS)
    assert len({case.regularizer for case in REGULARIZERS}) == len(REGULARIZERS)


# ---- by hand ----------------------------------------------------------------------------------


def test_group_lasso_by_hand():
    w = np.array([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]], "float32")
    root = np.sqrt(2)
    assert float(GroupLasso(2.0)(w)) == pytest.approx(2 * root * 6)
    assert float(GroupLasso(2.0, weighted=False)(w)) == pytest.approx(12)
    assert float(GroupLasso(2.0, axis="outputs", weighted=False)(w)) == pytest.approx(
        2 * (np.sqrt(9.36) + np.sqrt(16.64))
    )
    result = array(GroupLasso(2.0, weighted=False).prox(w, 0.75))  # threshold 1.5
    np.testing.assert_allclose(result, [[2.1, 2.8], [0, 0], [0, 0]], atol=1e-6)


def test_nuclear_norm_by_hand():
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    w = (turn @ np.diag([5.0, 2.0])).astype("float32")
    assert float(NuclearNorm(0.5)(w)) == pytest.approx(3.5, rel=1e-6)
    result = array(NuclearNorm(0.5).prox(w, 6.0))  # singular values 2 and 0
    np.testing.assert_allclose(result, turn @ np.diag([2.0, 0.0]), atol=1e-6)
    _, gradient = value_and_gradient(NuclearNorm(0.5), w)
    np.testing.assert_allclose(gradient, 0.5 * turn, atol=1e-5)


def test_the_nuclear_penalty_of_a_low_rank_kernel():
    """At rank 1 of 6 the polar factor is U V^T of the singular directions that exist."""
    random = np.random.default_rng(0)
    left, right = random.normal(size=8), random.normal(size=6)
    w = np.outer(left, right).astype("float32")
    expected = np.linalg.norm(left) * np.linalg.norm(right)
    value, gradient = value_and_gradient(NuclearNorm(1.0), w)
    assert value == pytest.approx(expected, rel=1e-4)
    found = np.sum(gradient * np.outer(left, right)) / expected
    assert found == pytest.approx(1.0, rel=1e-4)
    assert np.linalg.norm(gradient, 2) <= 1 + 1e-3  # a subgradient has no singular value above 1


@pytest.mark.parametrize(
    ("units", "fraction", "number"), [(8, 0.5, 4), (5, 0.3, 2), (6, 0.01, 1), (7, 1.0, 7)]
)
def test_partial_group_lasso_penalises_the_first_units(units, fraction, number):
    regularizer = PartialGroupLasso(1.0, fraction=fraction)
    axes = axes_by_rank(2)
    assert regularizer.num_groups((units, 3), axes) == units
    assert regularizer.num_penalised((units, 3), axes) == number
    w = np.ones((units, 3), "float32")
    result = array(regularizer.prox(w, 100.0))
    np.testing.assert_array_equal(result[:number], 0)
    np.testing.assert_array_equal(result[number:], 1)
    assert float(regularizer(w)) == pytest.approx(3 * number)


def test_partial_group_lasso_with_everything_is_group_lasso():
    w = kernel("conv2d").random()
    full, partial = GroupLasso(0.3), PartialGroupLasso(0.3, fraction=1.0)
    np.testing.assert_array_equal(array(partial.prox(w, 0.2)), array(full.prox(w, 0.2)))
    assert float(partial(w)) == float(full(w))


def test_the_input_units_of_a_grouped_convolution():
    """Channel 1 of block 0 and channel 1 of block 1 are two units, though one index of the axis."""
    layer = keras.layers.Conv2D(4, 1, groups=2, use_bias=False)
    layer.build((None, 3, 3, 4))  # kernel (1, 1, 2, 4): outputs 0-1 read inputs 0-1, 2-3 read 2-3
    (target,), _ = find_targets(layer)
    w = np.ones((1, 1, 2, 4), "float32")
    w[0, 0, 1, 2:] = 0.1  # input unit 3
    regularizer = GroupLasso(1.0, weighted=False)
    assert regularizer.num_groups(w.shape, target.axes) == 4
    result = array(regularizer.prox(w, 0.5, target.axes))
    np.testing.assert_array_equal(result[0, 0, 1, 2:], 0)
    assert np.sum(result == 0) == 2
    layer.kernel.assign(result)
    x = np.random.default_rng(0).normal(size=(1, 3, 3, 4)).astype("float32")
    changed = x.copy()
    changed[..., 3] += 5.0
    np.testing.assert_array_equal(array(layer(x)), array(layer(changed)))


def test_groups_of_a_depthwise_kernel_are_its_channels():
    axes = KernelAxes((), (3,), (0, 1))
    w = np.ones((3, 3, 5, 2), "float32")
    assert GroupLasso(1.0).num_groups(w.shape, axes) == 5
    assert float(GroupLasso(1.0)(w, axes=axes)) == pytest.approx(90, rel=1e-6)  # sqrt(18)^2 * 5
    assert GroupLasso(1.0, axis="outputs").num_groups(w.shape, axes) == 10


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupLasso(-1.0), ValueError, r"GroupLasso: `strength` must be in \[0, inf\)"),
        (lambda: GroupLasso("1"), TypeError, "`strength` must be a number"),
        (lambda: GroupLasso(1.0, axis="rows"), ValueError, "`axis` must be one of 'inputs'"),
        (lambda: PartialGroupLasso(1.0, fraction=0.0), ValueError, r"`fraction` must be in \(0, 1"),
        (lambda: PartialGroupLasso(1.0, mode="first"), ValueError, "`mode` must be one of"),
        (lambda: NuclearNorm(float("nan")), ValueError, "`strength` must be in"),
        (lambda: NuclearNorm(1.0, split="rows"), ValueError, "`split` must be one of 'channel'"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
