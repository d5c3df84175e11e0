"""Channels that nothing reads are removed, and no others."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import (
    AtEnd,
    Every,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    Recipe,
    Rule,
    StraightThrough,
    Tucker2,
    UniformQuantization,
    compact,
    compress,
    find_targets,
)
from keras_compaware.compaction.dead_channels import live_channels
from keras_compaware.compaction.factorise import cut_code
from keras_compaware.coupling import analyse
from tests.coupling import networks
from tests.coupling.helpers import array, inputs_of, outputs_of, randomise
from tests.marks import slow_on_jax

# JAX compiles every operation anew for every shape: a whole network takes seconds.


def live(model):
    """The channels that are read, by the name of the space; only spaces that lose some."""
    return {
        name: np.flatnonzero(mask).tolist() for name, mask in live_channels(analyse(model)).items()
    }


def zero(weight, axis, entries):
    """Overwrites slices of a weight by zeros."""
    values = np.array(array(weight))
    np.moveaxis(values, axis, 0)[entries] = 0
    weight.assign(values)


def compacted(model, sizes):
    """Compacts, compares, and checks `{space: (before, after)}`; returns the result."""
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    result = compact(model)
    for a, b in zip(outputs_of(result.model, inputs), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))
    assert {row.name: (row.before, row.after) for row in result.channels} == sizes
    return result


def chain(*widths, activation="relu"):
    """Dense layers "a", "b", ... and "head" on 6 features, all weights random."""
    names = [*"abcdefg"[: len(widths) - 1], "head"]
    stack = [
        layers.Dense(width, activation=None if name == "head" else activation, name=name)
        for width, name in zip(widths, names, strict=True)
    ]
    return randomise(keras.Sequential([keras.Input((6,)), *stack]))


# ---- which channels are read ------------------------------------------------------------------


def test_what_only_dead_channels_read_is_dead():
    model = chain(4, 3, 3, 2)
    a, b, c, head = model.layers
    zero(head.kernel, 0, [1, 2])  # of c, only channel 0 is read
    kernel = np.zeros((3, 3))
    kernel[0] = [1.0, 2.0, 3.0]  # b0 writes all of c
    kernel[1] = [0.0, 2.0, 3.0]  # b1 only what is dead: so it is dead as well
    kernel[2] = [4.0, 0.0, 0.0]
    c.kernel.assign(kernel)
    kernel = np.zeros((4, 3))
    kernel[0, 1] = kernel[1, 1] = kernel[1, 2] = kernel[2, 0] = 1.0  # a0 writes b1 only, a3 nothing
    b.kernel.assign(kernel)
    assert live(model) == {"a": [1, 2], "b": [0, 2], "c": [0]}
    result = compacted(model, {"a": (4, 2), "b": (3, 2), "c": (3, 1)})
    np.testing.assert_array_equal(array(result.whole.get_layer("a").bias), array(a.bias)[1:3])
    np.testing.assert_array_equal(array(result.whole.get_layer("b").kernel), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(array(result.whole.get_layer("c").kernel), [[1], [4]])
    np.testing.assert_array_equal(
        array(result.whole.get_layer("head").kernel), array(head.kernel)[:1]
    )
    assert a.kernel.shape == (6, 4)  # the given model is as it was


@slow_on_jax
def test_behind_a_last_consumer_of_zeros_everything_is_dead_but_one():
    model = chain(5, 4, 3, 2)
    model.get_layer("head").kernel.assign(np.zeros((3, 2)))
    assert live(model) == {"a": [0], "b": [0], "c": [0]}
    result = compacted(model, {"a": (5, 1), "b": (4, 1), "c": (3, 1)})
    assert result.model.count_params() == (6 + 1) + (1 + 1) + (1 + 1) + (2 + 2)
    x = inputs_of(model)
    bias = array(model.get_layer("head").bias)
    np.testing.assert_array_equal(outputs_of(result.model, x)[0], [bias, bias])


def test_where_nothing_is_dead_nothing_happens():
    model = chain(4, 3, 2)
    assert live(model) == {}
    result = compact(model)
    assert result.channels == ()
    assert result.whole is model
    assert "channels" not in str(result)
    assert [layer.name for layer in result.model.layers] == ["a", "b", "head"]
    for before, after in zip(model.weights, result.model.weights, strict=True):
        np.testing.assert_array_equal(array(after), array(before))


def test_the_table_tells_how_many_channels_are_left():
    model = chain(4, 3, 2)
    zero(model.get_layer("b").kernel, 0, [0, 3])
    lines = str(compact(model)).splitlines()
    assert lines[0].split("  ")[0] == "channels that nothing reads are removed"
    assert lines[2].split() == ["a", "4", "->", "2"]
    assert lines[3:5] == ["", "layer  class  parameters  what happened"]


def test_a_channel_that_nobody_writes_but_its_bias_stays():
    """Its producer is zero, yet what follows reads the bias: a constant that counts."""
    model = chain(4, 3, 2)
    a = model.get_layer("a")
    zero(a.kernel, 1, [2])
    a.bias.assign([0.1, 0.2, 0.3, 0.4])
    x = inputs_of(model)
    before = outputs_of(model, x)[0]
    compacted(model, {})
    a.bias.assign([0.1, 0.2, 0.0, 0.4])
    assert np.abs(outputs_of(model, x)[0] - before).max() > 1e-3


@slow_on_jax
def test_a_channel_that_a_normalisation_alone_fills_stays():
    model = randomise(networks.residual())
    zero(model.get_layer("a").kernel, 3, [1, 4])  # beta and moving mean are left
    compacted(model, {})


@slow_on_jax
def test_both_readers_of_a_residual_stream_count():
    model = randomise(networks.residual())
    zero(model.get_layer("a").kernel, 2, [1, 2, 5])
    assert live(model) == {}
    zero(model.get_layer("head").kernel, 0, [2, 5, 6])
    assert live(model) == {"stem": [0, 1, 3, 4, 6, 7]}
    result = compacted(model, {"stem": (8, 6)})
    kept = [0, 1, 3, 4, 6, 7]
    for name in ("moving_mean", "moving_variance", "gamma", "beta"):
        np.testing.assert_array_equal(
            array(getattr(result.whole.get_layer("bn"), name)),
            array(getattr(model.get_layer("bn"), name))[kept],
        )


def test_what_writes_into_a_dead_channel_of_an_earlier_space_is_dead():
    """The stream begins before the branch that adds to it, and is found dead after it."""
    model = randomise(networks.residual())
    zero(model.get_layer("head").kernel, 0, [3])
    zero(model.get_layer("a").kernel, 2, [3])
    kernel = np.array(array(model.get_layer("b").kernel))
    kernel[:, :, 2, np.arange(8) != 3] = 0  # of the branch, 2 writes into 3 only
    model.get_layer("b").kernel.assign(kernel)
    assert live(model) == {"stem": [0, 1, 2, 4, 5, 6, 7], "a": [0, 1, 3, 4, 5]}


@slow_on_jax
def test_each_side_of_a_concatenation_loses_its_own():
    model = randomise(networks.concatenation())
    kernel = np.array(array(model.get_layer("head").kernel)).reshape(8, 8, 9, 3)
    kernel[:, :, [0, 4, 8]] = 0  # a0, b0 and b4
    kernel[:, 1:, 1] = 0  # at all positions but some: a1 is read
    model.get_layer("head").kernel.assign(kernel.reshape(-1, 3))
    assert live(model) == {"a": [1, 2, 3], "b": [1, 2, 3]}
    result = compacted(model, {"a": (4, 3), "b": (5, 3)})
    assert result.whole.get_layer("bn").gamma.shape == (6,)


@slow_on_jax
def test_one_side_of_a_concatenation_keeps_a_channel_though_none_is_read():
    model = randomise(networks.concatenation())
    kernel = np.array(array(model.get_layer("head").kernel)).reshape(8, 8, 9, 3)
    kernel[:, :, :4] = 0
    model.get_layer("head").kernel.assign(kernel.reshape(-1, 3))
    compacted(model, {"a": (4, 1)})


@slow_on_jax
def test_depthwise_kernels_are_cut_like_their_channels():
    model = randomise(networks.depthwise())
    pointwise = model.get_layer("separable").pointwise_kernel
    # Channel c of "a" becomes 2c and 2c + 1, and each of these two for the pointwise kernel.
    zero(pointwise, 2, [4, 5, 6])
    assert live(model) == {}
    zero(pointwise, 2, [7])
    assert live(model) == {"a": [0, 2, 3, 4, 5]}
    result = compacted(model, {"a": (6, 5)})
    assert result.whole.get_layer("depthwise").kernel.shape == (3, 3, 5, 2)
    assert result.whole.get_layer("separable").pointwise_kernel.shape == (1, 1, 20, 5)


@slow_on_jax
def test_a_gate_reads_the_channels_that_it_scales():
    model = randomise(networks.squeeze_and_excite())
    head, down = model.get_layer("head"), model.get_layer("down")
    zero(head.kernel, 0, [3, 6])
    assert live(model) == {}
    zero(down.kernel, 2, [3])
    assert live(model) == {"a": [0, 1, 2, 4, 5, 6, 7]}
    zero(model.get_layer("up").kernel, 2, [0])
    compacted(model, {"a": (8, 7), "down": (4, 3)})


@slow_on_jax
def test_a_shared_layer_reads_for_all_its_calls():
    model = randomise(networks.shared_layer())
    kernel = model.get_layer("shared").kernel
    zero(model.get_layer("head").kernel, 0, [4, 5])
    assert live(model) == {}
    zero(kernel, 0, [4])
    assert live(model) == {"a": [0, 1, 2, 3, 5]}
    zero(kernel, 1, [5])  # 5 is written into by none now, but the head is not its only reader
    compacted(model, {"a": (6, 5)})
    values = np.array(array(kernel))
    values[5, :4] = 0  # what is left of 5 reaches 4 only, which is dead
    kernel.assign(values)
    compacted(model, {"a": (6, 4)})


@slow_on_jax
def test_a_nested_model_is_followed():
    model = randomise(networks.nested())
    inner = model.get_layer("middle").get_layer("inner").get_layer("c")
    sequence = model.get_layer("middle").get_layer("sequence").get_layer("c")
    zero(model.get_layer("head").kernel, 0, [2])
    zero(inner.kernel, 2, [2])
    zero(sequence.kernel, 2, [0, 1])
    compacted(model, {"stem": (5, 4), "middle/inner/c": (4, 2)})


def test_embeddings_become_narrower():
    model = randomise(networks.tokens())
    zero(model.get_layer("a").kernel, 0, [3])  # reads nothing from 3, and adds to it
    assert live(model) == {}
    zero(model.get_layer("head").kernel, 0, [3])
    result = compacted(model, {"embedding": (6, 5)})
    assert result.whole.get_layer("embedding").embeddings.shape == (5, 5)


def test_channels_of_the_outputs_are_never_dead():
    model = chain(4, 3)
    model.get_layer("head").kernel.assign(np.zeros((4, 3)))
    compacted(model, {"a": (4, 1)})


def test_what_nobody_can_follow_is_left_alone():
    class Own(layers.Layer):
        def call(self, x):
            return keras.ops.flip(x, axis=-1)

    inputs = keras.Input((6,))
    x = Own()(layers.Dense(4, name="a")(inputs))
    model = randomise(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    zero(model.get_layer("head").kernel, 0, [0, 1])
    assert live(model) == {}


# ---- codes of factors lose the same channels --------------------------------------------------


def quantized(compressor):
    return Recipe([Rule("conv", Every(100, compressor), AtEnd(UniformQuantization(4)))])


def convolutions(groups=1):
    """A convolution between two others, with enough channels that its factors save something."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(8, 1, name="before"),
            layers.Conv2D(12, 3, groups=groups, name="conv"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    return randomise(model)


def kill(model, outputs, inputs=()):
    """Makes channels of the convolution's input and output dead."""
    conv, head = model.get_layer("conv"), model.get_layer("head")
    zero(conv.kernel, 2, list(inputs))
    kernel = np.array(array(head.kernel)).reshape(4, 4, 12, 2)
    kernel[:, :, outputs] = 0
    head.kernel.assign(kernel.reshape(-1, 2))


def final_codes(model, recipe):
    """Compresses as at the end of a training; returns the codes that the callback leaves."""
    (callback,) = recipe.callbacks(model)
    callback.finish(model)
    return callback.codes


def levels(layer):
    return len(np.unique(array(layer.kernel)))


@pytest.mark.parametrize(
    ("compressor", "names", "shapes"),
    [
        (LowRank(rank=2), ("left", "right"), [(3, 3, 6, 2), (1, 1, 2, 9)]),
        (LowRank(rank=2, split="spatial"), ("left", "right"), [(3, 1, 6, 2), (1, 3, 2, 9)]),
        (
            Tucker2(ranks=(2, 3)),
            ("input", "core", "output"),
            [(1, 1, 6, 2), (3, 3, 2, 3), (1, 1, 3, 9)],
        ),
    ],
    ids=["channel", "spatial", "tucker"],
)
@slow_on_jax
def test_quantized_factors_are_cut_and_not_found_anew(compressor, names, shapes):
    model = convolutions()
    kill(model, outputs=[0, 5, 11], inputs=[1, 6])
    codes = final_codes(model, quantized(compressor))
    assert live(model)["before"] == [0, 2, 3, 4, 5, 7]  # quantized factors keep the zeros
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)[0]
    result = compact(model, codes)
    factors = result.model.get_layer("conv").layers
    assert [layer.name for layer in factors] == [f"conv_{name}" for name in names]
    assert [tuple(layer.kernel.shape) for layer in factors] == shapes
    assert max(map(levels, factors)) <= 15
    np.testing.assert_allclose(outputs_of(result.model, inputs)[0], expected, atol=1e-5)
    assert {row.name: (row.before, row.after) for row in result.channels} == {
        "before": (8, 6),
        "conv": (12, 9),
    }
    # The codes fit the model that they belong to, and only this one.
    again = compact(result.whole, result.codes)
    assert again.channels == ()
    for before, after in zip(factors, again.model.get_layer("conv").layers, strict=True):
        np.testing.assert_array_equal(array(before.kernel), array(after.kernel))
    decomposed = compact(model).model.get_layer("conv").layers
    assert max(map(levels, decomposed)) > 15


@slow_on_jax
def test_quantized_factors_of_groups_are_cut():
    model = convolutions(groups=2)
    kill(model, outputs=[0, 1, 2, 3, 4, 5])  # all of the first block
    codes = final_codes(model, quantized(LowRank(rank=2)))
    result = compact(model, codes)
    assert [(row.before, row.after) for row in result.channels] == [(2, 1)]
    left, right = result.model.get_layer("conv").layers
    whole = codes["conv/kernel"].plain()
    np.testing.assert_array_equal(array(left.kernel).reshape(36, 2), array(whole.parts["left"])[1])
    np.testing.assert_array_equal(array(right.kernel).reshape(2, 6), array(whole.parts["right"])[1])


def test_cutting_a_code_by_hand():
    w = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    code = LowRank(rank=2).encode(keras.ops.convert_to_tensor(w))
    left, right = (array(code.parts[name]) for name in ("left", "right"))
    cut = cut_code(code, {0: np.array([1, 0, 1, 1], bool), 1: np.array([0, 1, 1, 1, 0], bool)})
    np.testing.assert_array_equal(cut.parts["left"], left[:, [0, 2, 3]])
    np.testing.assert_array_equal(cut.parts["right"], right[:, :, 1:4])
    unchanged = cut_code(code, {})
    np.testing.assert_array_equal(unchanged.parts["left"], left)
    np.testing.assert_array_equal(unchanged.parts["right"], right)


# ---- with rules -------------------------------------------------------------------------------


@slow_on_jax
def test_half_of_the_channels_are_pruned_and_removed():
    model = randomise(networks.residual())
    small = compress(model, Recipe(channels=[Rule(None, AtEnd(GroupPruning(0.5)))]))
    compacted(small, {"stem": (8, 4), "a": (6, 3)})


def test_the_channels_that_a_straight_through_layer_does_not_read_are_dead():
    """What counts is the compressed kernel and not the latent one, which has no zeros."""
    model = chain(6, 4, 2)
    recipe = Recipe([Rule("b", StraightThrough(GroupPruning(0.5)))])
    wrapped = recipe.wrap(model)
    (target,) = [t for t in find_targets(wrapped)[0] if "b" in t.name.split("/")]
    latent = array(target.read())
    assert np.all(latent != 0)
    result = compacted(wrapped, {"a": (6, 3)})
    strongest = np.sort(np.argsort(np.linalg.norm(latent, axis=1))[3:])
    np.testing.assert_array_equal(array(result.whole.get_layer("b").kernel), latent[strongest])


@slow_on_jax
def test_rules_for_channels_around_a_straight_through_layer_are_refused():
    recipe = Recipe([Rule("b", StraightThrough(MagnitudePruning(0.25)))])
    wrapped = recipe.wrap(chain(6, 4, 2))
    around = Recipe(channels=[Rule("a/", AtEnd(GroupPruning(0.5)))])
    with pytest.raises(ValueError, match=r"'b' \(Compressed\) has no rule for channels"):
        compress(wrapped, around)
    compacted(compress(compact(wrapped).model, around), {"a": (6, 3)})
