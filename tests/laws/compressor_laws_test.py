"""What holds for every compressor, on every kind of kernel."""

import functools
import inspect
import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import LowRank, MagnitudePruning, UniformQuantization
from keras_compaware._math.backend import compiled
from keras_compaware.base import Code, Compressor, KernelAxes, axes_by_rank
from keras_compaware.kernels import find_targets, reason_to_skip
from tests.laws.cases import COMPRESSORS
from tests.laws.helpers import array, compiled_map, eagerly, norm
from tests.laws.kernels_under_test import EVERY, FEW, kernel, matrices

ON_JAX = keras.backend.backend() == "jax"


def rows(found):
    marks = {True: [pytest.mark.slow], False: []}
    found = [pytest.param(c, id=c.id, marks=marks[c.variant and ON_JAX]) for c in found]
    return pytest.mark.parametrize("case", found)


def product(found):
    """All rows on every kernel; fast: one row of each kind, the others on a few kernels."""
    pairs = []
    for case, name in itertools.product(found, EVERY):
        kernel_name, *marks = (name, *()) if isinstance(name, str) else (*name.values, *name.marks)
        if case.variant and (ON_JAX or kernel_name not in FEW):
            marks = [pytest.mark.slow]
        pairs.append(pytest.param(case, kernel_name, id=f"{kernel_name}-{case.id}", marks=marks))
    return pytest.mark.parametrize(("case", "name"), pairs)


cases = rows(COMPRESSORS)
on_every_kernel = pytest.mark.parametrize("name", EVERY)
cases_on_every_kernel = product(COMPRESSORS)
on_few_kernels = pytest.mark.parametrize("name", FEW)


# Two decompositions in float32, of matrices that differ by nothing but rounding, agree to this
# multiple of 1e-6 of the norm.
ANOTHER_SVD = 10  # 5.2 was seen, of a Tucker decomposition on PyTorch


def assert_same(case, actual, expected, applications=1, label=""):
    """Bit for bit (selections) or to 1e-6 of the norm for each application (factors, grids)."""
    actual, expected = array(actual), array(expected)
    if case.exact:
        np.testing.assert_array_equal(actual, expected, err_msg=label)
        return
    size = np.abs(expected).max()
    unit = size if size > 0 else 1.0
    error = np.linalg.norm(actual / unit - expected / unit)
    assert error <= 1e-6 * applications * np.linalg.norm(expected / unit), (label, error)


def fitting(case, name):
    found = kernel(name)
    if not case.fits(found.shape, found.axes):
        pytest.skip(f"its matrices have no rank {case.rank}")
    return found


@functools.cache
def applied(case, name):
    """`(w, axes, C(w), code of w)` on a kernel of normal random numbers."""
    found = kernel(name)
    w = found.random()
    before = w.copy()
    tensor = ops.convert_to_tensor(w)
    with eagerly():
        result = case.compressor(tensor, axes=found.axes)
        code = case.compressor.encode(tensor, axes=found.axes)
    np.testing.assert_array_equal(w, before)
    np.testing.assert_array_equal(array(tensor), before)
    return w, found.axes, result, code


# ---- on every kernel --------------------------------------------------------------------------


@cases_on_every_kernel
def test_the_map_is_decoding_of_encoding(case, name):
    fitting(case, name)
    w, _, result, code = applied(case, name)
    assert isinstance(code, Code)
    assert code.shape == w.shape
    assert code.dtype == "float32"
    with eagerly():
        decoded = case.compressor.decode(code)
    assert tuple(result.shape) == tuple(decoded.shape) == w.shape
    assert keras.backend.standardize_dtype(decoded.dtype) == "float32"
    assert_same(case, decoded, result)


@product([case for case in COMPRESSORS if case.oracle])
def test_the_map_is_what_numpy_finds(case, name):
    fitting(case, name)
    w, axes, result, _ = applied(case, name)
    expected = case.oracle(w, axes)
    # float64 against float32: exact for selections, rounding of a decomposition otherwise
    np.testing.assert_allclose(array(result), expected, rtol=0, atol=0 if case.exact else 1e-5)


@cases_on_every_kernel
def test_the_bits_are_those_counted_by_hand(case, name):
    fitting(case, name)
    w, axes, _, code = applied(case, name)
    expected = case.num_bits(w.shape, axes)
    if expected is None:
        rank = case.oracle and np.linalg.matrix_rank(
            np.array([m for m, _ in matrices(case.oracle(w, axes), axes)])
        )
        found = matrices(w, axes)
        expected = 32 * max(rank) * sum(sum(m.shape) for m, _ in found)
    assert code.num_bits == expected


@cases_on_every_kernel
def test_no_compression_is_worse_than_zero(case, name):
    """What the error of a projection and of a fitted grid can never exceed."""
    fitting(case, name)
    w, _, result, _ = applied(case, name)
    assert np.linalg.norm(array(result) - w) <= norm(w) * (1 + 1e-6)
    assert norm(result) <= norm(w) * (1 + 1e-2)


# ---- on a few kernels -------------------------------------------------------------------------


@cases
@on_few_kernels
def test_compiled_and_repeated_it_finds_the_same(case, name):
    fitting(case, name)
    w, axes, result, _ = applied(case, name)
    with eagerly():
        settled = case.compressor.settle(w, axes)  # as the callback does before it compiles
        np.testing.assert_array_equal(array(case.compressor(w, axes=axes)), array(result))
    function = compiled_map(settled, axes)
    first, second = function(ops.convert_to_tensor(w)), function(ops.convert_to_tensor(w))
    assert_same(case, first, result)
    np.testing.assert_array_equal(array(first), array(second))


@cases
@on_few_kernels
def test_many_applications_neither_shrink_nor_grow(case, name):
    fitting(case, name)
    w, axes, result, _ = applied(case, name)
    with eagerly():
        once = compiled_map(case.compressor.settle(w, axes), axes)
    repeated = once(result)
    if case.idempotent:
        assert_same(case, repeated, result, ANOTHER_SVD)
    for _ in range(99):
        repeated = once(repeated)
    if case.idempotent:
        assert_same(case, repeated, result, 100)
    assert 1 - case.steady <= norm(repeated) / norm(result) <= 1 + case.steady


@cases
@on_few_kernels
def test_a_kernel_in_other_units_is_compressed_alike(case, name):
    """C(a w) = a C(w) for powers of two, by which float32 multiplies without rounding."""
    fitting(case, name)
    w, axes, result, _ = applied(case, name)
    for a in (2.0**-60, 2.0**70):
        with eagerly():
            scaled = case.compressor(np.float32(a) * w, axes=axes)
        assert_same(case, array(scaled) / np.float32(a), result, ANOTHER_SVD)


@rows([case for case in COMPRESSORS if case.budgets])
@on_few_kernels
def test_a_ramped_budget_does_what_the_argument_does(case, name):
    fitting(case, name)
    w, axes, _, _ = applied(case, name)
    tensor = ops.convert_to_tensor(w)
    with_budget = compiled(lambda w, budget: case.compressor(w, axes=axes, budget=budget))
    for value, other in case.budgets:
        assert getattr(other, case.compressor.budget) == value
        with eagerly():
            expected = other(tensor, axes=axes)
            ramped = case.compressor(tensor, axes=axes, budget=value)
            assert_same(case, ramped, expected, ANOTHER_SVD)
        traced = ops.convert_to_tensor(np.float32(value))
        assert_same(case, with_budget(tensor, traced), expected, ANOTHER_SVD)


@cases
@on_few_kernels
def test_settling_keeps_the_result_and_fixes_the_budget(case, name):
    fitting(case, name)
    w, axes, result, code = applied(case, name)
    other = np.random.default_rng(5).standard_t(2, size=w.shape).astype("float32")
    with eagerly():
        settled = case.compressor.settle(w, axes)
        assert isinstance(settled, Compressor)
        assert settled.settle(other, axes) == settled
        assert_same(case, settled(w, axes=axes), result)
        assert settled.encode(other, axes=axes).num_bits == code.num_bits


@cases
@on_few_kernels
def test_what_belongs_to_a_dead_channel_stays_zero(case, name):
    """Along every axis but the window's, one slice is zero, or all but two are.

    What does not promise it fills zeros in one of these cases: a codebook whose entries are no
    zeros, behind a pruning that removes fewer entries than are zero.
    """
    fitting(case, name)
    w, axes, _, _ = applied(case, name)
    kept = []
    for dead in (slice(1, 2), slice(2, None)):
        zeros = np.zeros(w.shape, bool)
        for axis in set(range(w.ndim)) - set(axes.spatial):
            np.moveaxis(zeros, axis, 0)[dead] |= w.shape[axis] > 2
        with eagerly():
            result = array(case.compressor(np.where(zeros, np.float32(0), w), axes=axes))
        assert zeros.any()
        assert result[~zeros].any()
        kept.append(not result[zeros].any())
    assert all(kept) == case.compressor.keeps_zeros


# ---- plain arrays -----------------------------------------------------------------------------

SHAPES = ((1, 1), (3, 1, 2, 1), (13, 11), (17,))


def contents(shape):
    normal = np.random.default_rng(1).normal(size=shape)
    first = np.arange(normal.size).reshape(shape) == 0
    return {
        "zeros": np.zeros(shape),
        "equal": np.full(shape, -0.3),
        "huge": 1e30 * normal,
        "tiny": 1e-30 * normal,
        "one large": np.where(first, 1e6, normal),
    }


@cases
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=[pytest.mark.slow] * (ON_JAX and number > 1))
        for number, shape in enumerate(SHAPES)
    ],
    ids=str,
)
def test_plain_arrays_of_awkward_shapes_and_values(case, shape):
    axes = axes_by_rank(len(shape))
    if not case.fits(shape, axes):
        pytest.skip(f"its matrices have no rank {case.rank}")
    for label, values in contents(shape).items():
        w = values.astype("float32")
        with eagerly():
            result = array(case.compressor(w))
            decoded = result
            if label in ("zeros", "huge"):
                code = case.compressor.encode(ops.convert_to_tensor(w))
                decoded = array(case.compressor.decode(code))
        assert result.shape == shape, label
        assert np.all(np.isfinite(result)), label
        assert_same(case, decoded, result, label=label)
        if label in ("zeros", "equal"):  # on every grid, and of rank 0 or 1
            kept = result != 0
            np.testing.assert_allclose(result[kept], w[kept], rtol=1e-5, err_msg=label)
        if case.oracle:
            expected = case.oracle(w, axes)
            limit = 0 if case.exact else 1e-5 * np.abs(w).max()
            np.testing.assert_allclose(result, expected, rtol=0, atol=limit, err_msg=label)


@cases
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float16", marks=[pytest.mark.slow] * ON_JAX), "bfloat16", "float64"],
)
def test_shape_and_dtype_are_kept(case, dtype):
    w = np.random.default_rng(2).normal(size=(13, 11))
    tensor = ops.convert_to_tensor(w.astype("float64" if dtype == "float64" else "float32"))
    tensor = ops.cast(tensor, dtype)
    if keras.backend.standardize_dtype(tensor.dtype) != dtype:
        pytest.skip(f"the backend has no {dtype} switched on")
    with eagerly():
        result = case.compressor(tensor)
        code = case.compressor.encode(tensor)
        decoded = case.compressor.decode(code)
        in_float32 = array(case.compressor(ops.cast(tensor, "float32")))
    assert code.dtype == dtype
    for tried in (result, decoded):
        assert keras.backend.standardize_dtype(tried.dtype) == dtype
        assert tuple(tried.shape) == (13, 11)
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 1e-6}[dtype]
    rounding = 0 if case.exact else step
    np.testing.assert_allclose(array(result), in_float32, rtol=rounding, atol=2e-6)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"float dtype. Received: int32"):
        MagnitudePruning(0.5)(np.ones((2, 2), "int32"))


# ---- values -----------------------------------------------------------------------------------


@cases
def test_the_configuration_is_the_constructor(case):
    compressor = case.compressor
    arguments = list(inspect.signature(type(compressor)).parameters)
    assert list(compressor.get_config()) == arguments
    again = type(compressor).from_config(compressor.get_config())
    assert again == compressor
    assert hash(again) == hash(compressor)
    text = json.dumps(keras.saving.serialize_keras_object(compressor))
    restored = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(restored) is type(compressor)
    assert restored == compressor
    assert hash(restored) == hash(compressor)
    assert json.dumps(keras.saving.serialize_keras_object(restored)) == text
    assert repr(restored) == repr(compressor)


@cases
def test_it_cannot_be_changed(case):
    argument = next(iter(case.compressor.get_config()))
    with pytest.raises(AttributeError):
        setattr(case.compressor, argument, 1)


def test_the_rows_are_distinct():
    assert len({case.id for case in COMPRESSORS}) == len(COMPRESSORS)
    assert len({case.compressor for case in COMPRESSORS}) == len(COMPRESSORS)


# ---- kernels that do not fit ------------------------------------------------------------------


@on_every_kernel
def test_a_rank_above_the_kernels_is_refused(name):
    found = kernel(name)
    rows, columns = matrices(np.zeros(found.shape), found.axes)[0][0].shape
    largest = min(rows, columns)
    compressor = LowRank(rank=largest + 1)
    message = (
        rf"rank={largest + 1} is above the largest possible rank {largest} of a kernel of shape "
        rf"\({', '.join(map(str, found.shape))}\)"
    )
    with pytest.raises(ValueError, match=message):
        compressor.reason_to_skip(found.shape, found.axes)
    with pytest.raises(ValueError, match=message):
        compressor(found.random(), axes=found.axes)
    with pytest.raises(ValueError, match=message):
        compressor.encode(found.random(), axes=found.axes)
    assert LowRank(rank=largest).rank_of(found.shape, found.axes) == largest


def test_a_refusal_names_the_target():
    layer = keras.layers.Dense(4, name="narrow")
    layer.build((None, 6))
    (target,), _ = find_targets(layer)
    with pytest.raises(ValueError, match=r"Target 'kernel': LowRank: rank=5 .* 6 x 4"):
        reason_to_skip(LowRank(rank=5), target)


def test_nothing_to_gain_is_told():
    axes = KernelAxes((0,), (1,))
    skip = LowRank(rank=2).reason_to_skip((8, 6), axes)
    assert skip is None
    assert "rank 4 saves nothing on a 8 x 6 matrix (56 parameters instead of 48)" in (
        LowRank(rank=4).reason_to_skip((8, 6), axes)
    )
    # 12 (8 + 6) / ... : 3 * 14 = 42 < 48 saves, and ratio=1 asks for floor(48 / 14) = 3
    assert LowRank(rank=3).reason_to_skip((8, 6), axes) is None
    assert LowRank(ratio=1.0).reason_to_skip((8, 6), axes) is None
    assert "no smaller factors, even at rank 1" in LowRank(ratio=0.5).reason_to_skip((2, 2), axes)
    assert "1 x 9" in LowRank(energy=0.5).reason_to_skip((1, 9), axes)
    assert MagnitudePruning(0.5).reason_to_skip((1, 9), axes) is None
    assert UniformQuantization(8).reason_to_skip((1, 9), axes) is None
