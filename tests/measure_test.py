"""Hand-computed parameters, MACs and file sizes."""

import gzip
import time

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import measure
from tests.marks import slow_on_jax


def single(layer, *shapes, call=None, dtype="float32"):
    """MACs of a model of one layer."""
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    outputs = call(layer, *inputs) if call else layer(*inputs)
    counts = measure.macs_by_layer(keras.Model(inputs, outputs))
    return counts[layer.name]


class Unknown(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return x @ self.kernel

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


CASES = {
    "dense": (layers.Dense(4), [(8,)], 8 * 4),
    "dense on a sequence": (layers.Dense(4), [(5, 8)], 5 * 8 * 4),
    "einsum": (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), [(5, 8)], 5 * 8 * 2 * 3),
    "einsum with ellipsis": (layers.EinsumDense("...x,xy->...y", 7), [(5, 4)], 5 * 4 * 7),
    "einsum over two axes": (layers.EinsumDense("abcd,cde->abe", (None, 6)), [(5, 2, 3)], 180),
    "conv1d": (layers.Conv1D(4, 3), [(10, 2)], 8 * 4 * 3 * 2),
    "conv1d causal": (layers.Conv1D(4, 3, padding="causal"), [(10, 2)], 10 * 4 * 3 * 2),
    "conv2d": (layers.Conv2D(4, 3), [(6, 6, 3)], 16 * 4 * 9 * 3),
    "conv2d strided, dilated": (
        layers.Conv2D(4, (3, 2), strides=2, padding="same"),
        [(7, 6, 3)],
        (4 * 3) * 4 * 6 * 3,
    ),
    "conv2d dilated": (layers.Conv2D(4, 3, dilation_rate=2), [(6, 6, 3)], 4 * 4 * 9 * 3),
    "conv2d in groups": (layers.Conv2D(8, 3, groups=2), [(6, 6, 4)], 16 * 8 * 9 * 2),
    "conv3d": (layers.Conv3D(2, 2), [(3, 4, 5, 3)], (2 * 3 * 4) * 2 * 8 * 3),
    "depthwise1d": (layers.DepthwiseConv1D(3), [(6, 5)], 4 * 5 * 3),
    "depthwise2d": (layers.DepthwiseConv2D(3, depth_multiplier=2), [(6, 6, 5)], 16 * 10 * 9),
    "separable1d": (layers.SeparableConv1D(4, 3), [(6, 5)], 4 * 5 * 3 + 4 * 5 * 4),
    "separable2d": (
        layers.SeparableConv2D(4, 3, strides=2, depth_multiplier=2),
        [(7, 7, 5)],
        9 * 10 * 9 + 9 * 10 * 4,
    ),
    "transpose1d": (layers.Conv1DTranspose(4, 3, strides=2), [(5, 2)], 5 * 2 * 3 * 4),
    "transpose2d": (layers.Conv2DTranspose(4, 3, strides=2), [(5, 5, 2)], 25 * 2 * 9 * 4),
    "transpose3d": (layers.Conv3DTranspose(4, 2), [(2, 3, 4, 5)], 24 * 5 * 8 * 4),
    "simple rnn": (layers.SimpleRNN(6), [(7, 5)], 7 * 6 * (5 + 6)),
    "gru": (layers.GRU(6, return_sequences=True), [(7, 5)], 7 * 3 * 6 * (5 + 6)),
    "lstm": (layers.LSTM(6), [(7, 5)], 7 * 4 * 6 * (5 + 6)),
    "stacked cells": (
        layers.RNN([layers.LSTMCell(6), layers.GRUCell(4)]),
        [(7, 5)],
        7 * (4 * 6 * (5 + 6) + 3 * 4 * (6 + 4)),
    ),
    "bidirectional": (layers.Bidirectional(layers.LSTM(6)), [(7, 5)], 2 * 7 * 4 * 6 * (5 + 6)),
    "bidirectional of two kinds": (
        layers.Bidirectional(
            layers.LSTM(6), backward_layer=layers.GRU(6, go_backwards=True), merge_mode="sum"
        ),
        [(7, 5)],
        7 * (4 + 3) * 6 * (5 + 6),
    ),
    "time distributed": (
        layers.TimeDistributed(layers.Conv2D(4, 3)),
        [(7, 6, 6, 3)],
        7 * (16 * 4 * 9 * 3),
    ),
    "time distributed model": (
        layers.TimeDistributed(
            keras.Sequential([keras.Input((5,)), layers.Dense(4), layers.Dense(3)])
        ),
        [(7, 5)],
        7 * (5 * 4 + 4 * 3),
    ),
    "spectral normalization": (
        layers.SpectralNormalization(layers.Dense(4)),
        [(8,)],
        32,
    ),
    "batch norm": (layers.BatchNormalization(), [(6, 6, 3)], 0),
    "layer norm": (layers.LayerNormalization(), [(6, 3)], 0),
    "pooling": (layers.MaxPooling2D(), [(6, 6, 3)], 0),
    "prelu": (layers.PReLU(), [(6,)], 0),
    "unknown": (Unknown(), [(6,)], None),
    "wrapped unknown": (layers.TimeDistributed(Unknown()), [(4, 6)], None),
    # Steps, positions, the window, inputs and states, four gates.
    "conv lstm": (layers.ConvLSTM2D(2, 3), [(4, 6, 6, 3)], 4 * 16 * 9 * (3 + 2) * 4 * 2),
    "conv lstm strided": (
        layers.ConvLSTM1D(2, 3, strides=2, padding="same", return_sequences=True),
        [(4, 7, 5)],
        4 * 4 * 3 * (5 + 2) * 4 * 2,
    ),
    "conv lstm 3d": (layers.ConvLSTM3D(2, 2), [(3, 3, 4, 5, 1)], 3 * 24 * 8 * (1 + 2) * 4 * 2),
    "bidirectional conv lstm": (
        layers.Bidirectional(layers.ConvLSTM1D(2, 3)),
        [(4, 6, 3)],
        2 * 4 * 4 * 3 * (3 + 2) * 4 * 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_of_layers(name):
    layer, shapes, expected = CASES[name]
    assert single(layer, *shapes) == expected


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(4, 3, data_format="channels_first"),
        layers.DepthwiseConv2D(3, data_format="channels_first"),
        layers.Conv2DTranspose(4, 3, data_format="channels_first"),
        layers.SeparableConv2D(4, 3, data_format="channels_first"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_channels_first_counts_the_same(layer):
    last = type(layer).from_config({**layer.get_config(), "data_format": "channels_last"})
    assert single(layer, (5, 6, 7)) == single(last, (6, 7, 5))


def test_conv_lstm_of_channels_first_counts_the_same():
    first = layers.ConvLSTM2D(2, 3, data_format="channels_first")
    last = layers.ConvLSTM2D(2, 3, data_format="channels_last")
    assert single(first, (4, 3, 6, 7)) == single(last, (4, 6, 7, 3))


@slow_on_jax
def test_scales_of_conv_next_count_nothing_and_are_known():
    model = keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=2)
    scales = [layer.name for layer in model.layers if type(layer).__name__ == "LayerScale"]
    counts = measure.macs_by_layer(model)
    assert len(scales) == 18
    assert {counts[name] for name in scales} == {0}
    assert None not in counts.values()


def test_dense_kernel_products_agree_with_the_kernel():
    """MACs of a convolution: positions times the scalars of its kernel."""
    layer = layers.Conv2D(12, (3, 5), strides=(2, 1), groups=3, use_bias=False)
    count = single(layer, (9, 10, 6))
    assert count == (4 * 6) * measure.parameters(layer)


def test_multi_head_attention():
    layer = layers.MultiHeadAttention(num_heads=2, key_dim=3, value_dim=5, output_shape=7)
    count = single(layer, (4, 8), (6, 9), (6, 10), call=lambda f, q, v, k: f(q, v, key=k))
    projections = 4 * 8 * 2 * 3 + 6 * 10 * 2 * 3 + 6 * 9 * 2 * 5
    products = 2 * (4 * 6 * 3 + 4 * 6 * 5)
    assert count == projections + products + 4 * (2 * 5) * 7


def test_multi_head_attention_over_one_of_two_axes():
    layer = layers.MultiHeadAttention(num_heads=2, key_dim=3, attention_axes=(2,))
    count = single(layer, (5, 4, 8), call=lambda f, x: f(x, x))
    assert count == 5 * single(layers.MultiHeadAttention(2, 3), (4, 8), call=lambda f, x: f(x, x))


def test_group_query_attention():
    layer = layers.GroupQueryAttention(head_dim=3, num_query_heads=4, num_key_value_heads=2)
    count = single(layer, (5, 8), (6, 8), call=lambda f, q, v: f(q, v))
    projections = 5 * 8 * 12 + 2 * (6 * 8 * 6)
    products = 2 * (4 * 5 * 6 * 3)
    assert count == projections + products + 5 * 12 * 8


def test_attention_and_dot():
    count = single(layers.Attention(), (4, 3), (6, 3), call=lambda f, q, v: f([q, v]))
    assert count == 4 * 6 * 3 + 4 * 6 * 3
    count = single(layers.Dot(axes=(2, 1)), (4, 3), (3, 5), call=lambda f, a, b: f([a, b]))
    assert count == 4 * 3 * 5
    assert single(layers.Dot(axes=-1), (3,), (3,), call=lambda f, a, b: f([a, b])) == 3


def test_embeddings():
    assert single(layers.Embedding(50, 4), (6,), dtype="int32") == 0
    layer = layers.ReversibleEmbedding(50, 4)
    tokens = keras.Input((6,), dtype="int32")
    model = keras.Model(tokens, layer(layer(tokens), reverse=True))
    assert measure.macs(model) == 6 * 4 * 50


def test_einsum_layers_that_leave_their_shape_open():
    x = keras.Input((5, 8))
    y = layers.EinsumDense("abc,cd->abd", (None, 6), name="first")(x)
    model = keras.Model(x, layers.Dense(3, name="second")(y))
    assert measure.macs_by_layer(model) == {"first": 5 * 8 * 6, "second": 5 * 6 * 3}


def test_raw_operations():
    x, y = keras.Input((4, 3)), keras.Input((3, 5))
    assert measure.macs(keras.Model([x, y], keras.ops.matmul(x, y))) == 4 * 3 * 5
    z = keras.Input((4, 5))
    einsum = keras.ops.einsum("bij,bik->bjk", x, z)
    assert measure.macs(keras.Model([x, z], einsum)) == 4 * 3 * 5
    # The batch axis is merged with another one and still counts one example.
    merged = keras.ops.reshape(x, (-1, 3))
    assert measure.macs(keras.Model(x, layers.Dense(5)(merged))) == 4 * 3 * 5


def test_shared_and_nested_layers():
    shared = layers.Dense(8, name="shared")
    x = keras.Input((8,))
    inner_x = keras.Input((8,))
    inner = keras.Model(inner_x, shared(shared(inner_x)), name="inner")
    model = keras.Model(x, layers.Dense(2, name="logits")(inner(x)))
    assert measure.macs_by_layer(model) == {"inner/shared": 128, "logits": 16}
    assert measure.macs(model) == 144
    assert measure.parameters(model) == (64 + 8) + (16 + 2)


def test_a_fixed_batch_size_is_divided_out():
    x = keras.Input((8,), batch_size=6)
    assert measure.macs(keras.Model(x, layers.Dense(4)(x))) == 32


def test_unknown_layers_are_reported():
    model = keras.Sequential([keras.Input((6,)), Unknown(name="odd"), layers.Dense(2)])
    with pytest.warns(UserWarning, match="unknown kind: odd"):
        assert measure.macs(model) == 6


def test_undefined_shapes_and_subclassed_models_are_refused():
    x = keras.Input((None, None, 3), name="image")
    model = keras.Model(x, layers.Conv2D(4, 3)(x))
    with pytest.raises(ValueError, match=r"'image'.*clone_model"):
        measure.macs(model)
    copy = keras.models.clone_model(model, input_tensors=keras.Input((6, 6, 3)))
    assert measure.macs(copy) == 16 * 4 * 9 * 3

    class Mlp(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="no static graph"):
        measure.macs(Mlp())


@pytest.mark.tensorflow  # symbolic, so the same on every backend
@pytest.mark.parametrize(
    ("build", "macs", "parameters"),
    [
        (keras.applications.MobileNetV2, 300e6, 3_538_984),
        (keras.applications.ResNet50, 3.9e9, 25_636_712),
    ],
    ids=["MobileNetV2", "ResNet50"],
)
def test_published_figures(build, macs, parameters):
    model = build(weights=None)
    start = time.perf_counter()
    assert measure.macs(model) == pytest.approx(macs, rel=0.02)
    assert time.perf_counter() - start < 20
    assert measure.parameters(model) == parameters


def test_parameters_count_distinct_weights_only():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=1),
            layers.Dense(2),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.zeros((4, 6)), np.zeros((4, 2)), verbose=0)
    assert measure.parameters(model) == 28 + 16 + 10 == model.count_params()
    assert measure.parameters(model.layers[0]) == 28

    class Mlp(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = self.second = layers.Dense(2)

        def call(self, x):
            return self.first(x)

    subclassed = Mlp()
    with pytest.raises(ValueError, match="not built"):
        measure.parameters(subclassed)
    subclassed(np.zeros((1, 3), "float32"))
    assert measure.parameters(subclassed) == 8
    with pytest.raises(TypeError, match="received int"):
        measure.parameters(3)


def test_file_sizes(tmp_path):
    path = tmp_path / "zeros.bin"
    path.write_bytes(bytes(3_000_000))
    assert measure.file_bytes(path) == 3_000_000
    assert measure.gzip_bytes(str(path)) == len(gzip.compress(path.read_bytes(), 9, mtime=0))
    assert measure.gzip_bytes(path) < 4000
    for function in (measure.file_bytes, measure.gzip_bytes):
        with pytest.raises(FileNotFoundError, match="missing"):
            function(tmp_path / "missing")
        with pytest.raises(IsADirectoryError, match="folder"):
            function(tmp_path)
