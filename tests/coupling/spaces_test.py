"""Channel spaces: what is cut together, what is frozen and why, on graphs that fit on a page."""

import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware._graph import Call
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import (
    Channels,
    Uncoupled,
    channel_spaces,
    register_channel_rule,
    register_operation_rule,
)
from keras_compaware.coupling.flow import LAYER_RULES, OPERATION_RULES, Flow, components
from tests.coupling import networks

# The analysis computes nothing; on JAX the time goes into making the layers.
pytestmark = [pytest.mark.slow] if keras.backend.backend() == "jax" else []


def between(*steps, shape=(8, 8, 3), first=None, last=None):
    """A convolution 'a' of four filters, the steps, and a Dense or convolution 'z' behind them."""
    inputs = keras.Input(shape, name="input")
    x = (first or layers.Conv2D(4, 1, name="a"))(inputs)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, (last or layers.Dense(2, name="z"))(x))


def index_map(spaces, space, member, axis):
    (found,) = [m for m in spaces[space].members if m.name == member and m.axis == axis]
    return found.index_map.tolist()


def members(space):
    return {(member.name, member.axis, member.role) for member in space.members}


EXPECTED = {
    "residual": {"stem": 8, "a": 6},
    "concatenation": {"a": 4, "b": 5},
    "squeeze_and_excite": {"a": 8, "down": 4},
    "depthwise": {"a": 6, "separable": 5},
    "two_inputs": {"a": 7},
    "shared_layer": {"a": 6},
    "nested": {"stem": 5, "middle/inner/c": 4},
    "u_net": {"down": 4, "bottom": 3, "up": 5, "last": 4},
    "grouped": {"a": 4, "b": 5},
    "reshapes": {"project": 5, "up": 4, "a": 4},
    "split": {"a": 8},
    "channel_shuffle": {"a": 4, "b": 2},
    "sequences": {"a": 6, "inner/b": 5, "c": 4, "steps/d": 5, "einsum": 4},
    "frames": {"convolutions/a": 4, "dense/b": 4},
    "tokens": {"embedding": 6},
    "encoder": {"attention/heads": 4, "up": 7},
    "decoder": {"block/own/heads": 3, "block/other/heads": 2},
    "recurrent": {"embedding": 5, "first": 6, "cells/stack/a": 4, "cells/stack/b": 3, "last": 5},
    "both_directions": {"first": 4, "second": 3},
    "translation": {"encoder": 5, "memory": 4, "state": 3},
    "films": {"stems/conv": 3, "first": 4, "second": 2},
}


@pytest.mark.parametrize("make", networks.NETWORKS, ids=lambda make: make.__name__)
def test_free_spaces(make):
    spaces = channel_spaces(make())
    assert {space.name: space.size for space in spaces.free} == EXPECTED[make.__name__]


def test_members_of_a_residual_block():
    spaces = channel_spaces(networks.residual())
    assert members(spaces["stem"]) == {
        ("stem/kernel", 3, "producer"),
        ("stem/bias", 0, "producer"),
        *(
            (f"bn/{name}", 0, "carrier")
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        ),
        ("a/kernel", 2, "consumer"),
        ("b/kernel", 3, "producer"),
        ("b/bias", 0, "producer"),
        ("head/kernel", 0, "consumer"),
    }
    assert spaces["head"].frozen == "it is an output of the model"
    assert spaces[0].frozen.startswith("it is the model's input 'input_layer")
    assert spaces.coverage() == 1.0


def test_offsets_of_a_concatenation_and_repetitions_of_a_flattening():
    spaces = channel_spaces(networks.concatenation())
    gamma = "bn/gamma"
    assert index_map(spaces, "a", gamma, 0) == [0, 1, 2, 3, -1, -1, -1, -1, -1]
    assert index_map(spaces, "b", gamma, 0) == [-1, -1, -1, -1, 0, 1, 2, 3, 4]
    assert index_map(spaces, "b", "head/kernel", 0) == [-1, -1, -1, -1, 0, 1, 2, 3, 4] * 64


def test_flattening_after_a_permutation_repeats_each_channel_in_a_run():
    spaces = channel_spaces(between(layers.Permute((3, 1, 2)), layers.Flatten(), shape=(2, 3, 3)))
    assert index_map(spaces, "a", "z/kernel", 0) == np.repeat(range(4), 6).tolist()


def test_a_dense_layer_that_is_reshaped_into_an_image_has_the_channels_of_the_image():
    spaces = channel_spaces(networks.reshapes())
    assert index_map(spaces, "project", "project/kernel", 1) == list(range(5)) * 4
    assert index_map(spaces, "a", "a/kernel", 1) == [0, 1, 2, 3] * 2


def test_depthwise_multiplier_repeats_and_separable_reads_twice_as_much():
    spaces = channel_spaces(networks.depthwise())
    assert index_map(spaces, "a", "depthwise/kernel", 2) == list(range(6))
    assert index_map(spaces, "a", "depthwise/bias", 0) == np.repeat(range(6), 2).tolist()
    assert index_map(spaces, "a", "separable/depthwise_kernel", 2) == (
        np.repeat(range(6), 2).tolist()
    )
    assert index_map(spaces, "a", "separable/pointwise_kernel", 2) == (
        np.repeat(range(6), 4).tolist()
    )


def test_grouped_convolutions_and_group_norm_go_by_whole_groups():
    spaces = channel_spaces(networks.grouped())
    assert index_map(spaces, "a", "a/kernel", 3) == np.repeat(range(4), 3).tolist()
    assert index_map(spaces, "a", "grouped/kernel", 3) == np.repeat(range(4), 2).tolist()
    spaces = channel_spaces(networks.u_net())
    assert index_map(spaces, "bottom", "up/kernel", 3) == [0, 0, 1, 1, 2, 2]


def test_channel_shuffle_and_pixel_shuffle():
    spaces = channel_spaces(networks.channel_shuffle())
    assert index_map(spaces, "a", "a/kernel", 3) == [0, 1, 2, 3] * 3
    assert index_map(spaces, "a", "b/kernel", 2) == np.repeat(range(4), 3).tolist()
    assert index_map(spaces, "b", "b/kernel", 3) == [0, 1] * 4


def test_split_and_concatenation_of_raw_operations():
    spaces = channel_spaces(networks.split())
    assert index_map(spaces, "a", "u/kernel", 0) == [0, 1, 2]
    assert index_map(spaces, "a", "v/kernel", 0) == [3, 4, 5, 6, 7]


def test_sub_blocks_that_are_added_to_a_concatenation_join_its_spaces():
    inputs = keras.Input((3,))
    a, b, c = (layers.Dense(n, name=name)(inputs) for name, n in (("a", 2), ("b", 3), ("c", 5)))
    x = layers.Add()([layers.Concatenate()([a, b]), c])
    spaces = channel_spaces(keras.Model(inputs, layers.Dense(1, name="z")(x)))
    (space,) = spaces.free
    assert (space.name, space.size) == ("a", 5)
    assert index_map(spaces, "a", "b/kernel", 1) == [2, 3, 4]
    assert index_map(spaces, "a", "c/kernel", 1) == [0, 1, 2, 3, 4]


PASSES = {
    "conv transpose": lambda: layers.Conv2DTranspose(3, 2),
    "average pooling": lambda: layers.AveragePooling2D(2),
    "activation": lambda: layers.Activation("gelu"),
    "leaky": lambda: layers.LeakyReLU(),
    "elu": lambda: layers.ELU(),
    "noise": lambda: layers.GaussianNoise(0.1),
    "dropout": lambda: layers.Dropout(0.1, noise_shape=(None, 1, 1, None)),
    "activity": lambda: layers.ActivityRegularization(1e-3),
    "rescaling": lambda: layers.Rescaling(2.0, 1.0),
    "softmax over space": lambda: layers.Softmax(axis=(1, 2)),
    "layer norm over space": lambda: layers.LayerNormalization(axis=(1, 2)),
    "unit norm over space": lambda: layers.UnitNormalization(axis=1),
    "clip": lambda: lambda x: ops.clip(x, 0.0, 6.0),
    "hard swish": lambda: lambda x: x * ops.relu6(x + 3.0) / 6.0,
    "scalar on the left": lambda: lambda x: 1.0 - x,
    "single constant": lambda: lambda x: x * np.ones((1, 1), "float32"),
    "pad": lambda: lambda x: ops.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0))),
    "spatial maximum": lambda: lambda x: ops.max(x, axis=(1, 2), keepdims=True),
    "transpose": lambda: (
        lambda x: ops.transpose(ops.swapaxes(ops.transpose(x, (0, 3, 1, 2)), 1, 3), (0, 2, 1, 3))
    ),
    "items": lambda: lambda x: x[:, 0, None, ..., :],
    "gate of one channel": lambda: lambda x: x * layers.Conv2D(1, 1, name="gate")(x),
    "minus its positive part": lambda: lambda x: layers.Subtract()([x, layers.ReLU()(x)]),
    "space to depth": lambda: lambda x: ops.nn.space_to_depth(x, 2),
}


@pytest.mark.parametrize("make", PASSES.values(), ids=PASSES)
def test_passes(make):
    spaces = channel_spaces(between(make()))
    assert spaces["a"].frozen is None
    assert spaces["a"].size == 4
    assert ("a/kernel", 3, "producer") in members(spaces["a"])
    assert "consumer" in {member.role for member in spaces["a"].members}


class Unknown(layers.Layer):
    def call(self, x):
        return ops.flip(x, -1)


class OddDense(layers.Dense):
    def call(self, x):
        return ops.flip(super().call(x), -1)


class Tagged(layers.Dense):
    """Adds nothing to what Dense computes."""


FREEZES = {
    "unknown layer": (
        lambda: Unknown(name="odd"),
        "'odd' (Unknown) has no rule for channels: register_channel_rule(Unknown) teaches it one",
    ),
    "subclass with a call of its own": (
        lambda: OddDense(4, name="odd"),
        "'odd' (OddDense) has no rule for channels, for its `call` is not that of Dense: "
        "register_channel_rule(OddDense) teaches it one",
    ),
    "lambda": (lambda: layers.Lambda(lambda x: x, name="odd"), "'odd' (Lambda) has no rule"),
    "attention": (
        lambda: lambda x: layers.MultiHeadAttention(2, 2, name="odd")(x, x),
        "of 'odd' (MultiHeadAttention) only the heads can be cut",
    ),
    "layer norm": (lambda: layers.LayerNormalization(name="odd"), "mixes its channels"),
    "rms norm": (lambda: layers.RMSNormalization(name="odd"), "mixes its channels"),
    "unit norm": (lambda: layers.UnitNormalization(name="odd"), "mixes its channels"),
    "softmax": (lambda: layers.Softmax(name="odd"), "mixes its channels"),
    "raw softmax": (lambda: lambda x: ops.softmax(x), "mixes its channels"),
    "activation softmax": (lambda: layers.Activation("softmax"), "softmax"),
    "own activation": (lambda: layers.Activation(lambda x: x), "may mix its channels"),
    "batch norm of another axis": (
        lambda: layers.BatchNormalization(axis=1, name="odd"),
        "'odd' works along another axis",
    ),
    "dense on another axis": (
        lambda: lambda x: layers.Dense(3, name="odd")(layers.Permute((3, 2, 1))(x)),
        "'odd' works along another axis",
    ),
    "mean over channels": (lambda: lambda x: ops.mean(x, -1, keepdims=True), "reduces over"),
    "sum over everything": (lambda: lambda x: x * ops.sum(x), "reduces over the channels"),
    "constants": (
        lambda: lambda x: x + np.ones(4, "float32"),
        "joins it with a constant for every channel",
    ),
    "rescaling by channel": (lambda: layers.Rescaling([1.0, 2.0, 3.0, 4.0]), "constants for"),
    "some channels": (lambda: lambda x: x[..., :2], "picks some of the channels"),
    "padded channels": (
        lambda: lambda x: ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))),
        "pads the channels",
    ),
    "different axes": (
        lambda: lambda x: x[:, :4] + layers.Permute((3, 1, 2))(x)[..., :4],
        "along different axes",
    ),
    "matmul": (
        lambda: lambda x: ops.matmul(x, ops.swapaxes(x, -1, -2)),
        "(Matmul) has no rule for channels: register_operation_rule('Matmul') teaches it one",
    ),
    "einsum of another kind": (
        lambda: layers.EinsumDense("abcd,bde->abce", output_shape=(8, 8, 4), name="odd"),
        "is not that of Dense",
    ),
    "time distributed": (
        lambda: layers.TimeDistributed(layers.LayerNormalization(), name="odd"),
        "mixes its channels",
    ),
    "noise of the channels' number": (
        lambda: layers.Dropout(0.1, noise_shape=(None, 1, 1, 4)),
        "states the number of channels",
    ),
    "time distributed over the unknown": (
        lambda: layers.TimeDistributed(OddDense(4, name="inner"), name="odd"),
        "'odd/inner' (OddDense) has no rule",
    ),
    "channels as time": (
        lambda: (
            lambda x: layers.TimeDistributed(layers.ReLU(), name="odd")(
                layers.Permute((3, 1, 2))(x)
            )
        ),
        "'odd' takes the axis of the channels for time",
    ),
    "pooling over channels": (
        lambda: lambda x: layers.MaxPooling2D(2, name="odd")(layers.Permute((3, 1, 2))(x)),
        "'odd' works along the axis of the channels",
    ),
    "one entry of the channels": (lambda: lambda x: x[..., 0], "picks some of the channels"),
    "limits by channel": (
        lambda: lambda x: ops.clip(x, np.zeros(4, "float32"), np.ones(4, "float32")),
        "has constants for every channel",
    ),
    "normalization": (
        lambda: layers.Normalization(mean=[0.0] * 4, variance=[1.0] * 4, name="odd"),
        "'odd' (Normalization) has constants for every channel",
    ),
    "pixels of another axis": (
        lambda: lambda x: ops.nn.depth_to_space(ops.swapaxes(x, 1, 3), 2),
        "moves channels that are not along the last axis",
    ),
    "indices": (
        lambda: lambda x: layers.Embedding(3, 2, name="odd")(ops.cast(x, "int32")),
        "'odd' takes them as indices",
    ),
    "mask": (
        lambda: (
            lambda x: layers.GlobalAveragePooling1D(name="odd")(
                layers.Reshape((4, 64))(x), mask=x[:, 0, 0] > 0
            )
        ),
        "'odd' takes it as a mask",
    ),
    "reshape that mixes": (
        lambda: lambda x: layers.Reshape((48, 3))(x[:, :6, :6]),
        "puts all channels together",
    ),
}


@pytest.mark.parametrize(("make", "reason"), FREEZES.values(), ids=FREEZES)
def test_freezes(make, reason):
    spaces = channel_spaces(between(make()))
    assert reason in spaces["a"].frozen


def test_what_an_unknown_layer_writes_is_frozen_as_well():
    spaces = channel_spaces(between(Unknown(name="odd")))
    assert spaces["odd"].frozen == (
        "it is an output of 'odd' (Unknown), which has no rule for channels: "
        "register_channel_rule(Unknown) teaches it one"
    )
    assert members(spaces["odd"]) == {("z/kernel", 0, "consumer")}
    assert spaces.coverage() == 0.0


def test_a_subclass_that_computes_the_same_takes_the_rule():
    assert channel_spaces(between(Tagged(4, name="tagged")))["tagged"].frozen is None


def test_a_layer_shared_with_an_unknown_one_is_frozen_everywhere():
    class Uses(layers.Layer):
        def __init__(self, inner):
            super().__init__(name="uses")
            self.inner = inner

        def call(self, x):
            return self.inner(x)

    inputs = keras.Input((3,))
    dense = layers.Dense(3, name="a")
    x = layers.Dense(3, name="b")(dense(inputs))
    model = keras.Model(inputs, layers.Dense(1, name="z")(layers.Add()([x, Uses(dense)(inputs)])))
    assert channel_spaces(model)["a"].frozen == (
        "'uses' (Uses) has no rule for channels: register_channel_rule(Uses) teaches it one"
    )


class OddOperation(keras.Operation):
    """An operation that is neither a layer nor of Keras."""

    def call(self, x):
        return x

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


BEHIND = {
    "normalised": (
        lambda x: layers.LayerNormalization(name="odd")(layers.Conv2D(4, 1, name="b")(x)),
        "(LayerNormalization), which mixes its channels",
    ),
    "another reason": (
        lambda x: layers.TimeDistributed(OddDense(4, name="inner"), name="odd")(x),
        "(TimeDistributed): 'odd/inner' (OddDense) has no rule for channels, for its `call` is not "
        "that of Dense: register_channel_rule(OddDense) teaches it one",
    ),
    "left whole": (
        lambda x: layers.MultiHeadAttention(2, 2, name="odd")(x, x),
        "(MultiHeadAttention), which its rule leaves whole",
    ),
    "of inputs": (
        lambda x: layers.Average(name="odd")([x, x * x]),
        "(Average), of which no input can be cut",
    ),
    "of another package": (
        lambda x: OddOperation(name="odd")(layers.Conv2D(4, 1, name="b")(x)),
        "(OddOperation), which has no rule for channels: write it as a layer, for which there is "
        "register_channel_rule",
    ),
}


@pytest.mark.parametrize(("step", "reason"), BEHIND.values(), ids=BEHIND)
def test_why_an_output_cannot_be_cut(step, reason):
    inputs = keras.Input((8, 8, 4))
    x = layers.Add(name="join")([layers.Conv2D(4, 1, name="a")(inputs), step(inputs)])
    frozen = channel_spaces(keras.Model(inputs, layers.Dense(2, name="z")(x)))["a"].frozen
    assert frozen == f"'join' joins it with an output of 'odd' {reason}"


def test_allow_inexact_lets_layer_norm_pass():
    model = between(layers.LayerNormalization(name="norm"))
    space = channel_spaces(model, allow_inexact=True)["a"]
    assert space.frozen is None
    assert {("norm/gamma", 0, "carrier"), ("norm/beta", 0, "carrier")} <= members(space)


def test_joined_with_the_input_names_the_input():
    inputs = keras.Input((4,), name="image")
    x = layers.Dense(4, name="a")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="z")(layers.Add(name="add")([x, inputs])))
    assert channel_spaces(model)["a"].frozen == "'add' joins it with the model's input 'image'"


def test_unknown_sizes_are_frozen_where_they_matter():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, name="a")(inputs)
    y = layers.Conv2D(5, 3, name="b")(inputs)
    last = [ops.reshape(x, (-1, 4)), ops.reshape(layers.Permute((3, 1, 2))(y), (-1, 5))]
    model = keras.Model(inputs, [layers.Dense(2, name=f"z{i}")(t) for i, t in enumerate(last)])
    spaces = channel_spaces(model)
    assert spaces["a"].frozen is None
    assert "reshapes sizes that are not known" in spaces["b"].frozen


def test_what_else_leaves_the_rules():
    inputs = keras.Input((None, 3))
    x = layers.Conv1D(4, 1, name="a")(inputs)
    assert channel_spaces(keras.Model(inputs, layers.Flatten(name="flatten")(x)))["a"].frozen == (
        "'flatten' (Flatten) works on sizes that are not known"
    )
    one = layers.Conv1D(1, 1, name="one")(inputs)
    model = keras.Model(inputs, layers.PReLU(shared_axes=[1], name="slope")(one))
    assert channel_spaces(model)["one"].frozen == "it is the only channel of 'slope'"
    model = keras.Model(inputs, ops.squeeze(one, -1))
    assert "its only channel away" in channel_spaces(model)["one"].frozen
    equation = layers.EinsumDense("ab,bc->ac", output_shape=5, name="einsum")
    model = keras.Sequential([keras.Input((3,)), equation, layers.Dense(2)])
    assert channel_spaces(model)["einsum"].size == 5


def test_concatenation_along_another_axis_joins():
    inputs = keras.Input((6, 3))
    a, b = (layers.Conv1D(4, 1, name=name)(inputs) for name in "ab")
    x = layers.Concatenate(axis=1)([a, b])
    (space,) = channel_spaces(keras.Model(inputs, layers.Dense(1, name="z")(x))).free
    assert {member.name for member in space.members if member.role == "producer"} == {
        *("a/kernel", "a/bias", "b/kernel", "b/bias")
    }


def test_quantized_and_lora_layers_are_frozen():
    model = between(layers.Dense(4, name="b"), last=layers.Dense(2, name="z"))
    model.get_layer("b").enable_lora(2)
    assert channel_spaces(model)["a"].frozen == "'b' (Dense) has LoRA enabled"
    model = between(layers.Dense(4, name="b"), last=layers.Dense(2, name="z"))
    model.get_layer("b").quantize("int8")
    assert channel_spaces(model)["a"].frozen == "'b' (Dense) is quantized by Keras (int8)"


def test_flatten_of_channels_first_puts_channels_last():
    # Convolutions of this format do not run on every CPU, so the rule is applied by itself.
    x, y = keras.KerasTensor((None, 4, 8, 8)), keras.KerasTensor((None, 256))
    flow = Flow()
    flow.enter(x, Channels(np.arange(4), 1))
    flow.apply(Call(layers.Flatten(data_format="channels_first"), (x,), (y,), "flat", (x,)))
    assert flow.channels(y).ids.tolist() == list(range(4)) * 64


def test_register_channel_rule():
    class Scale(layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(shape[-1],), name="factor")

        def call(self, x):
            return x * self.factor

    assert channel_spaces(between(Scale()))["a"].frozen is not None

    @register_channel_rule(Scale)
    def scale(call, flow):
        ids = flow.ids(call.inputs[0], -1)
        if len(ids) == 3:
            raise Uncoupled("three is too few")
        flow.carry(call.operation.factor, 0, ids)
        return Channels(ids, -1)

    try:
        space = channel_spaces(between(Scale(name="scale")))["a"]
        assert ("scale/factor", 0, "carrier") in members(space)
        model = between(Scale(), first=layers.Conv2D(3, 1, name="a"))
        assert channel_spaces(model)["a"].frozen == "three is too few"
    finally:
        del LAYER_RULES[Scale]


def test_a_rule_is_for_classes_of_layers():
    with pytest.raises(TypeError, match="must be a class of Keras layers"):
        register_channel_rule("Dense")
    with pytest.raises(TypeError, match="there is register_channel_rule"):
        register_operation_rule(layers.Dense)


def test_register_operation_rule():
    model = between(lambda x: ops.roll(x, 1, axis=1))
    assert "register_operation_rule('Roll') teaches it one" in channel_spaces(model)["a"].frozen
    register_operation_rule("Roll")(lambda call, flow: flow.channels(call.inputs[0]))
    try:
        assert channel_spaces(model)["a"].frozen is None
    finally:
        del OPERATION_RULES["Roll"]


def test_a_scaled_addition_joins():
    module = sys.modules[keras.applications.InceptionResNetV2.__module__]
    inputs = keras.Input((8, 8, 3))
    a, b = (layers.Conv2D(4, 1, name=name)(inputs) for name in "ab")
    x = module.CustomScaleLayer(0.5, name="scaled")([a, b])
    model = keras.Model(inputs, layers.Dense(2, name="z")(x))
    (space,) = channel_spaces(model).free
    assert {m.name for m in space.members if m.role == "producer"} == {
        *("a/kernel", "a/bias", "b/kernel", "b/bias")
    }
    small = shrink(model, {"a": [0, 3]})
    assert small.get_layer("scaled").output.shape == (None, 8, 8, 2)
    assert small.get_layer("scaled").scale == 0.5


def test_names_are_unique_and_unknown_ones_are_listed():
    inputs = keras.Input((3,))
    x = keras.Sequential([layers.Dense(4, name="a")], name="b")(inputs)
    x = keras.Sequential([layers.Dense(4, name="a")], name="c")(x)
    spaces = channel_spaces(keras.Model(inputs, x))
    assert [space.name for space in spaces][1:] == ["b/a", "c/a"]
    with pytest.raises(KeyError, match=r"no channel space 'nothing'.*b/a, c/a"):
        spaces["nothing"]


def test_layer_scale_carries():
    whole = keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=2)
    layer_scale = next(type(x) for x in whole.layers if type(x).__name__ == "LayerScale")
    inputs = keras.Input((6,))
    x = layers.Dense(4, name="a")(inputs)
    x = layers.Add()([x, layer_scale(1e-6, 4, name="scale")(layers.Dense(4, name="b")(x))])
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    (space,) = channel_spaces(model).free
    roles = {member.name: member.role for member in space.members}
    assert [role for name, role in roles.items() if name.startswith("scale/")] == ["carrier"]
    small = shrink(model, {space.name: [1, 2, 3]})
    assert small.get_layer("scale").gamma.shape == (3,)
    assert small.get_layer("scale").get_config()["projection_dim"] == 3


def test_print():
    lines = str(channel_spaces(networks.shared_layer())).splitlines()
    assert lines[0].split() == [
        *("space", "channels", "producers", "carriers", "consumers", "can", "it", "be", "cut")
    ]
    assert lines[3].split() == ["a", "6", "4", "0", "2", "free"]
    assert lines[4].split()[-4:] == ["output", "of", "the", "model"]


def test_coverage_counts_weights():
    # Of 12 + 8 weights the output layer's 8 have a free axis, and the first layer's 12 as well;
    # with a frozen middle there are none.
    inputs = keras.Input((3,))
    x = layers.Dense(4, name="a")(inputs)
    free = keras.Model(inputs, layers.Dense(2, name="z")(x))
    assert channel_spaces(free).coverage() == 1.0
    half = layers.Concatenate()([x, layers.Softmax()(layers.Dense(4, name="b")(inputs))])
    model = keras.Model(inputs, layers.Dense(2, name="z")(half))
    # a: 12 of 12, b: 0 of 12, z: 8 of 16.
    assert channel_spaces(model).coverage() == pytest.approx(20 / 40)


def test_components_agree_with_a_search():
    rng = np.random.default_rng(0)
    for number in (5, 40, 200):
        pairs = rng.integers(0, number, (2, number // 2))
        roots = components(number, [pairs[:, :3], pairs[:, 3:]])
        expected = np.arange(number)
        for _ in range(number):
            for a, b in pairs.T:
                expected[a] = expected[b] = min(expected[a], expected[b])
        np.testing.assert_array_equal(roots, expected)


def test_the_model_is_left_as_it_is():
    model = networks.nested()
    config, weights = model.get_config(), model.get_weights()
    channel_spaces(model)
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_subclassed_model_is_refused():
    class Net(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="has no static graph"):
        channel_spaces(Net())


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50"])
def test_applications(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3))
    spaces = channel_spaces(model)
    assert spaces.coverage() >= 0.95
    assert len(spaces.free) == {"MobileNetV2": 25, "ResNet50": 37}[name]
