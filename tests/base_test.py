"""The vocabulary: values, axes, codes, targets, actions, and what they refuse."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware import (
    AtEnd,
    Chain,
    Code,
    Compressor,
    Every,
    GroupLasso,
    KernelAxes,
    LowRank,
    MagnitudePruning,
    NuclearNorm,
    Penalty,
    Proximal,
    ProximalRegularizer,
    Ramp,
    Skip,
    StraightThrough,
    Target,
    UniformQuantization,
)
from keras_compaware.base import (
    ACTIONS,
    as_kernel,
    axes_by_rank,
    check_choice,
    check_integer,
    check_number,
)

PRUNING = MagnitudePruning(0.5)

# ---- checks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), np.int64(1)])
def test_numbers_inside_pass(value):
    check_number("Owner", "share", value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.01, ValueError, r"^Owner: `share` must be in \[0, 1\]. Received: 1.01.$"),
        (float("nan"), ValueError, "Received: nan"),
        (float("inf"), ValueError, "Received: inf"),
        (True, TypeError, r"must be a number in \[0, 1\]. Received: True \(of type bool\)"),
        ("0.5", TypeError, r"Received: '0.5' \(of type str\)"),
        (None, TypeError, "Received: None"),
    ],
)
def test_numbers_outside_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        check_number("Owner", "share", value, 0.0, 1.0)


def test_open_ends_and_optional_values():
    check_number("Owner", "share", None, 0.0, 1.0, optional=True)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        check_number("Owner", "share", 0.0, 0.0, 1.0, low_open=True)
    with pytest.raises(ValueError, match=r"\[0, inf\)"):
        check_number("Owner", "share", -1, 0.0, float("inf"))
    check_integer("Owner", "count", None, 1, optional=True)
    check_integer("Owner", "count", np.int32(3), 1)
    with pytest.raises(TypeError, match=r"`count` must be an integer of at least 1. Received: 2.0"):
        check_integer("Owner", "count", 2.0, 1)
    with pytest.raises(ValueError, match=r"`count` must be at least 1. Received: 0"):
        check_integer("Owner", "count", 0, 1)
    with pytest.raises(ValueError, match=r"must be one of 'a', 'b'. Received: 'c'"):
        check_choice("Owner", "letter", "c", ("a", "b"))


# ---- axes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ndim", "axes"),
    [
        (0, KernelAxes()),
        (1, KernelAxes((0,))),
        (2, KernelAxes((0,), (1,))),
        (3, KernelAxes((1,), (2,), (0,))),
        (4, KernelAxes((2,), (3,), (0, 1))),
        (5, KernelAxes((3,), (4,), (0, 1, 2))),
    ],
)
def test_axes_by_rank(ndim, axes):
    assert axes_by_rank(ndim) == axes
    assert axes.batch(ndim) == ()


def test_axes_of_high_rank_must_be_told():
    with pytest.raises(ValueError, match="6 dimensions are not known; pass `axes=KernelAxes"):
        axes_by_rank(6)
    with pytest.raises(ValueError, match="6 dimensions"):
        PRUNING(np.zeros((1,) * 6, "float32"))


def test_axes_without_a_role_are_batch_axes():
    assert KernelAxes((2,), (0,)).batch(4) == (1, 3)
    with pytest.raises(ValueError, match="does not fit a kernel of 2 dimensions"):
        KernelAxes((2,), (0,)).batch(2)
    with pytest.raises(ValueError, match="does not fit a kernel of 2 dimensions"):
        PRUNING(np.zeros((3, 3), "float32"), axes=KernelAxes((2,), (0,)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": (0,), "outputs": (0,)},
        {"inputs": (0, 0)},
        {"spatial": (-1,)},
        {"inputs": (0,), "groups": 2},
        {"outputs": (0,), "groups": 0},
    ],
)
def test_contradictory_axes_are_refused(arguments):
    with pytest.raises(ValueError, match="KernelAxes"):
        KernelAxes(**arguments)


def test_axes_are_values():
    axes = KernelAxes([np.int64(2)], [3], spatial=[0, 1], groups=2)
    assert axes == KernelAxes((2,), (3,), (0, 1), 2)
    assert len({axes, KernelAxes((2,), (3,), (0, 1), 2), axes.replace(groups=1)}) == 2
    text = json.dumps(keras.saving.serialize_keras_object(axes))
    assert keras.saving.deserialize_keras_object(json.loads(text)) == axes


# ---- values -----------------------------------------------------------------------------------

RAMP = Ramp(0.0, begin=0, end=10)
VALUES = [
    Every(200, PRUNING),
    Every(5, PRUNING, begin=10, end=90, ramp=RAMP),
    Every(5, Chain([LowRank(ratio=0.5), UniformQuantization(8)])),
    Proximal(GroupLasso(1e-3), every=2, ramp=RAMP),
    Penalty(NuclearNorm(1e-4)),
    StraightThrough(UniformQuantization(4), every=7),
    AtEnd(UniformQuantization(8, axis="outputs")),
    Skip("too small"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_actions_go_through_json(value):
    assert isinstance(value, ACTIONS)
    names = [field.name for field in dataclasses.fields(value)]
    assert list(value.get_config()) == names
    text = json.dumps(keras.saving.serialize_keras_object(value))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(value)
    assert again == value
    assert hash(again) == hash(value)
    assert type(value).from_config(value.get_config()) == value


def test_a_keras_constraint_goes_through_json_as_well():
    action = Every(3, keras.constraints.MaxNorm(2.0))
    text = json.dumps(keras.saving.serialize_keras_object(action))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert isinstance(again.constraint, keras.constraints.MaxNorm)
    assert again.constraint.max_value == 2.0


def test_values_of_different_classes_differ():
    assert len({MagnitudePruning(0.5), MagnitudePruning(0.25), MagnitudePruning(0.5)}) == 2
    assert PRUNING.replace(sparsity=0.25) == MagnitudePruning(0.25)
    with pytest.raises(ValueError, match="sparsity"):
        PRUNING.replace(sparsity=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRUNING.sparsity = 0.1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Every(0, PRUNING), ValueError, "Every: `every` must be at least 1"),
        (lambda: Every(10.0, PRUNING), TypeError, "Every: `every` must be an integer"),
        (lambda: Every(1, PRUNING, begin=-1), ValueError, "`begin` must be at least 0"),
        (lambda: Every(1, PRUNING, begin=5, end=5), ValueError, r"steps in \(begin, end\]"),
        (lambda: Every(1, "pruning"), TypeError, "must be a keras.constraints.Constraint"),
        (lambda: Every(1, PRUNING, ramp=0.5), TypeError, "`ramp` must be a Ramp or None"),
        (lambda: Every(1, UniformQuantization(4), ramp=RAMP), ValueError, "has no budget"),
        (lambda: Every(1, LowRank(energy=0.9), ramp=RAMP), ValueError, "has no budget"),
        (lambda: Every(1, keras.constraints.NonNeg(), ramp=RAMP), ValueError, "has no budget"),
        (lambda: Proximal(keras.regularizers.L2(1.0)), TypeError, "for example GroupLasso"),
        (lambda: Proximal(GroupLasso(1.0), every=0), ValueError, "Proximal: `every`"),
        (lambda: Penalty("l2"), TypeError, "Penalty: `regularizer` must be a keras"),
        (lambda: StraightThrough(keras.constraints.NonNeg()), TypeError, "must be a Compressor"),
        (lambda: StraightThrough(PRUNING, every=0), ValueError, "StraightThrough: `every`"),
        (lambda: AtEnd(GroupLasso(1.0)), TypeError, "AtEnd: `compressor` must be a Compressor"),
        (lambda: Chain([]), TypeError, "at least one Compressor"),
        (lambda: Chain(PRUNING), TypeError, "must be a sequence of at least one"),
        (lambda: Chain([PRUNING, keras.constraints.NonNeg()]), TypeError, "every member must be"),
        (lambda: MagnitudePruning(1.0), ValueError, "`sparsity` must be below 1"),
        (lambda: MagnitudePruning(-0.1), ValueError, r"`sparsity` must be in \[0, 1\]"),
        (lambda: UniformQuantization(1), ValueError, "`bits` must be at least 2"),
        (lambda: UniformQuantization(17), ValueError, r"`bits` must be in \[2, 16\]"),
        (lambda: UniformQuantization(8.0), TypeError, "`bits` must be an integer"),
        (lambda: UniformQuantization(8, axis="inputs"), ValueError, "`axis` must be one of None"),
        (lambda: LowRank(), ValueError, "give exactly one of `rank`, `ratio` and `energy`"),
        (lambda: LowRank(rank=1, ratio=0.5), ValueError, "give exactly one"),
        (lambda: LowRank(rank=0), ValueError, "`rank` must be at least 1"),
        (lambda: LowRank(ratio=1.5), ValueError, r"`ratio` must be in \(0, 1\]"),
        (lambda: LowRank(energy=0.0), ValueError, r"`energy` must be in \(0, 1\]"),
        (lambda: LowRank(rank=1, split="rows"), ValueError, "`split` must be one of 'channel'"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_budgets_that_a_ramp_can_drive():
    assert PRUNING.budget == "sparsity"
    assert LowRank(rank=2).budget == "rank"
    assert LowRank(ratio=0.5).budget == "ratio"
    assert LowRank(energy=0.5).budget is None
    assert UniformQuantization(8).budget is None
    assert Chain([PRUNING]).budget is None
    assert GroupLasso(1.0).budget == NuclearNorm(1.0).budget == "strength"


# ---- what a new method has to define ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Empty(Compressor):
    pass


@dataclasses.dataclass(frozen=True)
class EmptyRegularizer(ProximalRegularizer):
    pass


def test_what_is_not_defined_is_named():
    w = np.zeros((2, 2), "float32")
    for call, name in [
        (lambda: Empty()(w), "Empty does not define __call__"),
        (lambda: Empty().encode(w), "Empty does not define encode"),
        (lambda: Empty().decode(None), "Empty does not define decode"),
        (lambda: EmptyRegularizer()(w), "EmptyRegularizer does not define __call__"),
        (lambda: EmptyRegularizer().prox(w, 1.0), "EmptyRegularizer does not define prox"),
    ]:
        with pytest.raises(NotImplementedError, match=name):
            call()
    axes = axes_by_rank(2)
    assert Empty().settle(w) == Empty()
    assert Empty().reason_to_skip((2, 2), axes) is None
    assert Empty().basis_shape((2, 2), axes) is None
    assert not Empty().needs_decomposition
    assert EmptyRegularizer().reason_to_skip((2, 2), axes) is None
    for call in (lambda: Empty().basis(w), lambda: Empty().encode_on(None, w)):
        with pytest.raises(ValueError, match="has no basis"):
            call()


# ---- codes ------------------------------------------------------------------------------------


def test_bits_are_counted_part_by_part():
    inner = Code(
        parts={"codes": np.zeros((4, 5), "int8"), "scale": np.ones((4, 1), "float32")},
        bits={"codes": 3, "scale": 32},
        payload={},
        shape=(4, 5),
        dtype="float32",
        axes=axes_by_rank(2),
    )
    assert inner.num_bits == 4 * 5 * 3 + 4 * 32
    outer = Code(
        parts={"mask": np.ones((10, 10), bool), "values": inner},
        bits={"mask": 1, "values": 32},
        payload={"values": axes_by_rank(2)},
        shape=(10, 10),
        dtype="float32",
        axes=axes_by_rank(2),
        mask="mask",
    )
    assert outer.num_bits == 100 + inner.num_bits
    assert dataclasses.replace(inner, counts={"codes": 7}).num_bits == 7 * 3 + 4 * 32
    fractional = dataclasses.replace(inner, bits={"codes": 1.58, "scale": 16})
    assert fractional.num_bits == 32 + 64  # 31.6 bits take 32


def test_a_code_names_its_dtype_by_a_string():
    for compressor in (PRUNING, UniformQuantization(4), LowRank(rank=1), Chain([PRUNING])):
        for w in (np.ones((3, 2), "float32"), ops.ones((3, 2), "float32")):
            code = compressor.encode(w)
            assert code.dtype == "float32"
            assert isinstance(code.dtype, str)


def test_as_kernel_computes_in_float32_and_casts_back():
    w, axes, cast = as_kernel(ops.ones((2, 3), "float16"), None)
    assert keras.backend.standardize_dtype(w.dtype) == "float32"
    assert axes == axes_by_rank(2)
    assert keras.backend.standardize_dtype(cast(w).dtype) == "float16"
    with pytest.raises(TypeError, match=r"A kernel must have a float dtype. Received: bool"):
        as_kernel(np.ones((2, 2), bool), None)


# ---- targets ----------------------------------------------------------------------------------


def test_a_target_reads_and_writes_its_variable():
    variable = keras.Variable(np.zeros((2, 3), "float32"), dtype="float32")
    target = Target("layer/kernel", (variable,), axes_by_rank(2))
    assert target.shape == (2, 3)
    assert target.num_parameters == 6
    target.write(ops.ones((2, 3), "float64"))
    np.testing.assert_array_equal(ops.convert_to_numpy(target.read()), 1)
    assert keras.backend.standardize_dtype(variable.dtype) == "float32"
    same = Target("layer/kernel", (variable,), axes_by_rank(2))
    assert target != same  # identity: two targets of one variable are two things
    assert not target.is_head
    assert target.aliases == ()


def test_the_regularizers_and_compressors_are_those_of_keras():
    assert isinstance(PRUNING, keras.constraints.Constraint)
    assert isinstance(GroupLasso(1.0), keras.regularizers.Regularizer)
    assert keras.constraints.get(PRUNING) is PRUNING
    assert keras.regularizers.get(NuclearNorm(1.0)) == NuclearNorm(1.0)
