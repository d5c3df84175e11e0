"""From models to targets: which layer has which kernels, and what their axes really mean."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware import KernelAxes, LowRank, MagnitudePruning, find_targets, register_kernels
from keras_compaware import kernels as kernels_module
from keras_compaware.kernels import Skipped, check_where, matches, reason_to_skip
from tests.laws.kernels_under_test import LAYERS, SEPARABLE

EXPECTED = {
    "dense": {"kernel": KernelAxes((0,), (1,))},
    "conv1d": {"kernel": KernelAxes((1,), (2,), (0,))},
    "conv2d": {"kernel": KernelAxes((2,), (3,), (0, 1))},
    "conv2d strided": {"kernel": KernelAxes((2,), (3,), (0, 1))},
    "conv2d grouped": {"kernel": KernelAxes((2,), (3,), (0, 1), groups=2)},
    "conv3d": {"kernel": KernelAxes((3,), (4,), (0, 1, 2))},
    "depthwise conv1d": {"kernel": KernelAxes((), (2,), (0,))},
    "depthwise conv2d": {"kernel": KernelAxes((), (3,), (0, 1))},
    "separable conv1d": {
        "depthwise_kernel": KernelAxes((), (2,), (0,)),
        "pointwise_kernel": KernelAxes((1,), (2,), (0,)),
    },
    "separable conv2d": {
        "depthwise_kernel": KernelAxes((), (3,), (0, 1)),
        "pointwise_kernel": KernelAxes((2,), (3,), (0, 1)),
    },
    "conv1d transpose": {"kernel": KernelAxes((2,), (1,), (0,))},
    "conv2d transpose": {"kernel": KernelAxes((3,), (2,), (0, 1))},
    "conv3d transpose": {"kernel": KernelAxes((4,), (3,), (0, 1, 2))},
    "einsum heads": {"kernel": KernelAxes((0,), (1, 2))},
    "einsum merge": {"kernel": KernelAxes((0, 1), (2,))},
    "einsum batch": {"kernel": KernelAxes((1,), (2,))},
    "einsum swapped": {"kernel": KernelAxes((1,), (0,))},
    "embedding": {"embeddings": KernelAxes((0,), (1,))},
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_axes_of_a_layers_kernels(name):
    make, shape = LAYERS[name]
    layer = make()
    layer.build((1, *shape))
    targets, skipped = find_targets(layer)
    assert skipped == []
    assert {target.name: target.axes for target in targets} == EXPECTED[name]
    for target in targets:
        assert target.layer is layer
        assert target.variables == (getattr(layer, target.name),)


# ---- what the axes mean, tried on the layers ---------------------------------------------------


def linear(name):
    """A layer of the table without a bias, built, with a random input."""
    make, shape = LAYERS[name]
    layer = make()
    layer.build((1, *shape))
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype("float32")
    return layer, x


def outputs(layer, x):
    return np.asarray(ops.convert_to_numpy(layer(x)))


ONE_KERNEL = [name for name in LAYERS if not name.startswith(("separable", "embedding"))]


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_a_zero_output_slice_silences_one_output_unit(name):
    layer, x = linear(name)
    (target,), _ = find_targets(layer)
    w = np.random.default_rng(1).normal(size=target.shape).astype("float32")
    sizes = [target.shape[axis] for axis in (*target.axes.batch(w.ndim), *target.axes.outputs)]
    place = [slice(None)] * w.ndim
    for axis in (*target.axes.batch(w.ndim), *target.axes.outputs):
        place[axis] = 1
    w[tuple(place)] = 0
    layer.kernel.assign(w)
    y = outputs(layer, x)
    # Every position of the output outside the units' axes is zero for one unit of all.
    assert np.mean(y == 0) == pytest.approx(1 / np.prod(sizes))


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_a_zero_input_slice_makes_one_input_unit_irrelevant(name):
    layer, x = linear(name)
    (target,), _ = find_targets(layer)
    axes = target.axes
    w = np.random.default_rng(1).normal(size=target.shape).astype("float32")
    place = [slice(None)] * w.ndim
    for axis in (*axes.batch(w.ndim), *axes.inputs):
        place[axis] = 1
    if axes.groups > 1:  # input unit 1 of block 0: of the outputs only the first block's
        place[axes.outputs[0]] = slice(0, w.shape[axes.outputs[0]] // axes.groups)
    w[tuple(place)] = 0
    layer.kernel.assign(w)
    before = outputs(layer, x)
    irrelevant = 0
    units = list(np.ndindex(x.shape[1:])) if name.startswith("einsum") else None
    if units is None:
        for channel in range(x.shape[-1]):
            changed = x.copy()
            changed[..., channel] += 1
            irrelevant += np.array_equal(outputs(layer, changed), before)
        assert irrelevant == 1
        return
    for unit in units:
        changed = x.copy()
        changed[(0, *unit)] += 1
        irrelevant += np.array_equal(outputs(layer, changed), before)
    sizes = [w.shape[axis] for axis in (*axes.batch(w.ndim), *axes.inputs)]
    assert irrelevant / len(units) == pytest.approx(1 / np.prod(sizes))


def test_a_zero_row_of_an_embedding_is_a_token():
    layer = layers.Embedding(4, 3)
    layer.build(None)
    (target,), _ = find_targets(layer)
    w = np.ones((4, 3), "float32")
    w[2] = 0
    target.write(ops.convert_to_tensor(w))
    np.testing.assert_array_equal(outputs(layer, np.array([1, 2, 3])), w[1:])


# ---- models -----------------------------------------------------------------------------------


def nested():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, name="a"), layers.Dense(6, name="b")], name="inner"
    )
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(inner(inputs))
    x = layers.Dense(3, name="a")(layers.ReLU()(x))
    return keras.Model(inputs, layers.Softmax()(x)), inner


def test_names_are_paths_and_the_classifier_is_told():
    model, _ = nested()
    targets, skipped = find_targets(model)
    assert [target.name for target in targets] == ["inner/a/kernel", "inner/b/kernel", "a/kernel"]
    assert [target.is_head for target in targets] == [False, False, True]
    assert skipped == []


def test_a_shared_layer_is_one_target():
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(shared(shared(inputs))))
    targets, _ = find_targets(model)
    assert [target.name for target in targets] == ["shared/kernel", "head/kernel"]


def test_a_shared_variable_is_one_target_with_two_names():
    first, second = layers.Dense(4, name="first"), layers.Dense(4, name="second")
    model = keras.Sequential([keras.Input((4,)), first, second, layers.Dense(2, name="head")])
    second._tracker.unlock()
    second._kernel = first._kernel
    assert second.kernel is first.kernel
    targets, _ = find_targets(model)
    assert [target.name for target in targets] == ["first/kernel", "head/kernel"]
    assert targets[0].aliases == ("second/kernel",)
    assert matches("second", targets[0])


def test_equal_names_are_made_unique():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = layers.Dense(3, name="same")
            self.two = layers.Dense(3, name="same")

        def call(self, x):
            return self.two(self.one(x))

    model = Twins()
    model(np.zeros((1, 3), "float32"))
    targets, _ = find_targets(model)
    assert [target.name for target in targets] == ["same/kernel", "same/kernel_2"]


def test_attention_and_wrappers_are_walked():
    class Block(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = layers.MultiHeadAttention(2, 4, name="attention")
            self.wrapped = layers.TimeDistributed(layers.Dense(5, name="dense"), name="wrapped")

        def call(self, x):
            return self.wrapped(self.attention(x, x))

    model = Block()
    model(np.zeros((1, 3, 8), "float32"))
    targets, skipped = find_targets(model)
    names = [f"attention/{part}/kernel" for part in ("query", "key", "value", "attention_output")]
    assert sorted(target.name for target in targets) == sorted([*names, "wrapped/dense/kernel"])
    by_name = {target.name: target.axes for target in targets}
    assert by_name["attention/query/kernel"] == KernelAxes((0,), (1, 2))
    assert by_name["attention/attention_output/kernel"] == KernelAxes((0, 1), (2,))
    assert skipped == []


def test_recurrent_layers():
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True, name="lstm"), name="both"),
            layers.GRU(2, return_sequences=True, name="gru"),
            layers.RNN([layers.SimpleRNNCell(3), layers.LSTMCell(2)], name="stacked"),
        ]
    )
    targets, skipped = find_targets(model)
    assert skipped == []
    assert {target.axes for target in targets} == {KernelAxes((0,), (1,))}
    # Cells are numbered by Keras throughout the process.
    assert {re.sub(r"_\d+", "", target.name): target.shape for target in targets} == {
        "both/forward_lstm/lstm_cell/kernel": (4, 12),
        "both/forward_lstm/lstm_cell/recurrent_kernel": (3, 12),
        "both/backward_lstm/lstm_cell/kernel": (4, 12),
        "both/backward_lstm/lstm_cell/recurrent_kernel": (3, 12),
        "gru/gru_cell/kernel": (6, 6),
        "gru/gru_cell/recurrent_kernel": (2, 6),
        "stacked/stacked_rnn_cells/simple_rnn_cell/kernel": (2, 3),
        "stacked/stacked_rnn_cells/simple_rnn_cell/recurrent_kernel": (3, 3),
        "stacked/stacked_rnn_cells/lstm_cell/kernel": (3, 8),
        "stacked/stacked_rnn_cells/lstm_cell/recurrent_kernel": (2, 8),
    }


def test_grouped_query_attention():
    inputs = keras.Input((3, 8))
    outputs = layers.GroupQueryAttention(2, 4, 2, name="attention")(inputs, inputs)
    targets, skipped = find_targets(keras.Model(inputs, outputs))
    assert skipped == []
    assert {target.name.split("/")[1]: (target.shape, target.axes) for target in targets} == {
        "query": ((8, 4, 2), KernelAxes((0,), (1, 2))),
        "key": ((8, 2, 2), KernelAxes((0,), (1, 2))),
        "value": ((8, 2, 2), KernelAxes((0,), (1, 2))),
        "attention_output": ((4, 2, 8), KernelAxes((0, 1), (2,))),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_reversible_embeddings(tied):
    """A tied one is used at both ends of a language model and is one target."""
    inputs = keras.Input((5,), dtype="int32")
    embedding = layers.ReversibleEmbedding(10, 4, tie_weights=tied, name="tokens")
    outputs = embedding(layers.Dense(4, name="body")(embedding(inputs)), reverse=True)
    targets, skipped = find_targets(keras.Model(inputs, outputs))
    assert skipped == []
    names = ["tokens/embeddings"] + ["tokens/reverse_embeddings"] * (not tied) + ["body/kernel"]
    assert [target.name for target in targets] == names


def test_what_is_skipped_has_a_reason():
    frozen = layers.Dense(3, name="frozen", trainable=False)
    lora = layers.Dense(3, name="lora")
    convolution = layers.ConvLSTM1D(3, 2, name="recurrent")
    model = keras.Sequential([keras.Input((5, 6, 4)), frozen, lora, convolution, layers.Dense(2)])
    lora.enable_lora(1)
    targets, skipped = find_targets(model)
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["frozen"] == "frozen (trainable=False)"
    assert reasons["lora"].startswith("LoRA is enabled")
    recurrent = {name: reason for name, reason in reasons.items() if "recurrent" in name}
    assert len(recurrent) == 2
    assert all(
        "no rule for the layer ConvLSTMCell: register_kernels(ConvLSTMCell" in r
        for r in recurrent.values()
    )
    assert len(targets) == 1


def test_a_layer_that_is_not_built_is_skipped():
    targets, (skipped,) = find_targets(keras.Sequential([layers.Dense(3, name="late")]))
    assert targets == []
    assert skipped.name == "late"
    assert skipped.reason.startswith("not built yet")


def test_layers_without_matrices_are_not_mentioned():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.BatchNormalization(),
            layers.PReLU(shared_axes=[1, 2]),
            layers.GlobalAveragePooling2D(),
            layers.LayerNormalization(),
        ]
    )
    targets, skipped = find_targets(model)
    assert targets == []
    assert [entry.name for entry in skipped if "norm" in entry.name] == []


# ---- custom layers ----------------------------------------------------------------------------


class Mixing(layers.Layer):
    def build(self, shape):
        self.mixing = self.add_weight(shape=(shape[-1], 4), name="mixing")

    def call(self, x):
        return ops.matmul(x, self.mixing)


class Special(layers.Dense):
    """Inherits the entry of its parent."""


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(kernels_module, "_RULES", dict(kernels_module._RULES))


def test_a_custom_layer_is_registered_in_one_line(rules):
    layer = Mixing(name="mixer")
    layer(np.zeros((1, 3), "float32"))
    targets, (skipped,) = find_targets(layer)
    assert targets == []
    assert skipped.reason == "no rule for the layer Mixing: register_kernels(Mixing, mixing=...)"
    register_kernels(Mixing, mixing=lambda layer: KernelAxes((0,), (1,)))
    (target,), skipped = find_targets(layer)
    assert skipped == []
    assert target.name == "mixing"
    assert target.axes == KernelAxes((0,), (1,))


def test_the_nearest_class_counts(rules):
    layer = Special(3)
    layer.build((None, 2))
    assert find_targets(layer)[0][0].axes == KernelAxes((0,), (1,))
    register_kernels(Special, kernel=KernelAxes((1,), (0,)))
    assert find_targets(layer)[0][0].axes == KernelAxes((1,), (0,))
    plain = layers.Dense(3)
    plain.build((None, 2))
    assert find_targets(plain)[0][0].axes == KernelAxes((0,), (1,))


def test_axes_that_do_not_fit_are_refused(rules):
    register_kernels(Special, kernel=KernelAxes((2,), (0,)))
    layer = Special(3)
    layer.build((None, 2))
    with pytest.raises(ValueError, match="does not fit a kernel of 2 dimensions"):
        find_targets(layer)


def test_nonsense_is_not_registered(rules):
    with pytest.raises(TypeError, match=r"must be a class of Keras layers. Received: 'Dense'"):
        register_kernels("Dense", kernel=KernelAxes())
    with pytest.raises(TypeError, match="`kernel` must be a KernelAxes or a function"):
        register_kernels(layers.Dense, kernel=(0, 1))


# ---- selection --------------------------------------------------------------------------------


def test_selections():
    model, inner = nested()
    targets, _ = find_targets(model)

    def chosen(where):
        check_where("Rule", where)
        return [target.name for target in targets if matches(where, target)]

    assert chosen(None) == ["inner/a/kernel", "inner/b/kernel"]
    assert chosen("a/kernel") == ["inner/a/kernel", "a/kernel"]
    assert chosen("^a/") == ["a/kernel"]
    assert chosen(layers.Dense) == ["inner/a/kernel", "inner/b/kernel", "a/kernel"]
    assert chosen(layers.Conv2D) == []
    assert chosen(inner) == ["inner/a/kernel", "inner/b/kernel"]
    assert chosen(inner.layers[0]) == ["inner/a/kernel"]
    assert chosen(lambda target: target.num_parameters == 30) == ["inner/b/kernel"]
    assert matches("gru", Skipped("block/gru/kernel", None, "no rule"))
    assert matches(None, Skipped("block/gru/kernel", None, "no rule"))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("conv[", ValueError, r"Rule: `where` is not a valid regular expression: 'conv\['"),
        (3, TypeError, "Rule: `where` must be a regular expression on target names"),
        (int, TypeError, "a class of layers"),
    ],
)
def test_selections_that_make_no_sense(where, error, message):
    with pytest.raises(error, match=message):
        check_where("Rule", where)


def test_reasons_to_skip_a_target():
    model, _ = nested()
    target = find_targets(model)[0][0]  # 4 x 5
    assert reason_to_skip(MagnitudePruning(0.5), target) is None
    assert reason_to_skip(keras.constraints.NonNeg(), target) is None
    assert "saves nothing on a 4 x 5 matrix" in reason_to_skip(LowRank(rank=3), target)
    with pytest.raises(ValueError, match="Target 'inner/a/kernel': LowRank: rank=5 is above"):
        reason_to_skip(LowRank(rank=5), target)


def test_separable_layers_have_two_kernels():
    assert set(SEPARABLE) == set(EXPECTED["separable conv2d"])
