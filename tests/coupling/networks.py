"""Small networks in which channels meet in every way: a function for each."""

import keras
from keras import layers, ops


def residual():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    y = layers.Conv2D(6, 3, padding="same", use_bias=False, name="a")(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Conv2D(8, 3, padding="same", name="b")(y)
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def concatenation():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(4, 3, padding="same", name="a")(inputs)
    b = layers.Conv2D(5, 1, name="b")(inputs)
    x = layers.BatchNormalization(name="bn")(layers.Concatenate()([a, b]))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def squeeze_and_excite():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="a")(inputs)
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(4, 1, activation="relu", name="down")(gate)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="up")(gate)
    x = ops.mean(ops.relu(x * gate) + 1.0, axis=(1, 2))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def depthwise():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, name="a")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.SeparableConv2D(5, 3, depth_multiplier=2, name="separable")(x)
    x = layers.Flatten()(layers.PReLU()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def two_inputs():
    first, second = keras.Input((6,), name="first"), keras.Input((4,), name="second")
    x = layers.Dense(7, name="a")(first)
    y = layers.Dense(7, name="b")(second)
    joined = layers.Maximum()([x, y])
    outputs = {"u": layers.Dense(2, name="u")(joined), "v": layers.Dense(2, name="v")(x)}
    return keras.Model({"first": first, "second": second}, outputs)


def shared_layer():
    inputs = keras.Input((6,))
    shared = layers.Dense(6, activation="tanh", name="shared")
    x = shared(shared(layers.Dense(6, name="a")(inputs)))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def nested():
    inner_in = keras.Input((8, 8, 5))
    x = layers.BatchNormalization(name="bn")(inner_in)
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, padding="same", name="c")(x), name="inner")
    middle_in = keras.Input((8, 8, 5))
    sequence = keras.Sequential([layers.Conv2D(5, 1, name="c"), layers.ReLU()], name="sequence")
    y = sequence(inner(middle_in))
    middle = keras.Model(middle_in, layers.Add()([y, middle_in]), name="middle")
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(5, 3, padding="same", name="stem")(inputs)
    x = layers.GlobalMaxPooling2D()(middle(middle(x)))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def u_net():
    inputs = keras.Input((8, 8, 3))
    skip = layers.Conv2D(4, 3, padding="same", name="down")(inputs)
    x = layers.Conv2D(6, 3, padding="same", name="bottom")(layers.MaxPooling2D()(skip))
    x = layers.GroupNormalization(groups=3)(x)
    x = layers.Conv2DTranspose(5, 2, strides=2, name="up")(x)
    x = layers.Concatenate()([x, skip])
    x = layers.Conv2D(4, 3, padding="same", name="last")(x)
    x = layers.ZeroPadding2D(1)(layers.Cropping2D(2)(layers.UpSampling2D()(x)))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))


def grouped():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(12, 1, name="a")(inputs)
    x = layers.ReLU()(layers.Conv2D(8, 3, groups=4, name="grouped")(x))
    x = layers.Flatten()(layers.Conv2D(5, 1, name="b")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def reshapes():
    inputs = keras.Input((6,))
    x = layers.Dense(2 * 2 * 5, name="project")(inputs)
    x = layers.Conv2DTranspose(4, 3, strides=2, name="up")(layers.Reshape((2, 2, 5))(x))
    x = layers.Dense(8, name="a")(ops.reshape(x, (-1, 5 * 5 * 4)))
    return keras.Model(inputs, layers.Dense(3, name="head")(ops.reshape(x, (-1, 2, 4))))


def split():
    inputs = keras.Input((6,))
    a, b = ops.split(layers.Dense(8, name="a")(inputs), 2, axis=-1)
    c, d = ops.split(ops.concatenate([a, ops.sigmoid(b)], axis=-1), [3], axis=1)
    return keras.Model(inputs, [layers.Dense(2, name="u")(c), layers.Dense(2, name="v")(d)])


def channel_shuffle():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(12, 1, name="a")(inputs)
    x = layers.Permute((1, 2, 4, 3))(layers.Reshape((4, 4, 3, 4))(x))
    x = layers.Conv2D(8, 1, name="b")(layers.Reshape((4, 4, 12))(x))
    x = layers.GlobalAveragePooling2D()(ops.nn.depth_to_space(x, 2))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def sequences():
    return keras.Sequential(
        [
            keras.Input((12, 4)),
            layers.Conv1D(6, 3, name="a"),
            layers.SpatialDropout1D(0.1),
            keras.Sequential([layers.Conv1D(5, 3, name="b"), layers.ReLU()], name="inner"),
            layers.Permute((2, 1)),
            layers.Flatten(),
            layers.Dense(4, name="c"),
            layers.RepeatVector(3),
            layers.TimeDistributed(layers.Dense(5, name="d"), name="steps"),
            layers.EinsumDense("abc,cd->abd", output_shape=(None, 4), bias_axes="d", name="einsum"),
            layers.Dense(2, name="head"),
        ]
    )


def frames():
    inputs = keras.Input((3, 8, 8, 2))
    x = layers.TimeDistributed(layers.Conv2D(4, 3, name="a"), name="convolutions")(inputs)
    x = layers.TimeDistributed(layers.BatchNormalization(name="bn"), name="norms")(x)
    x = layers.TimeDistributed(layers.Flatten(), name="flat")(x)
    x = layers.TimeDistributed(layers.Dense(4, name="b"), name="dense")(x)
    x = ops.squeeze(ops.expand_dims(x[:, 0], 1), 1)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def tokens():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 6, mask_zero=True, name="embedding")(inputs)
    x = layers.Dropout(0.2)(layers.Dense(6, name="a")(x) + x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def encoder(attention=None):
    """A transformer's block on sequences of 5, around a layer of self-attention."""
    attention = attention or layers.MultiHeadAttention(4, 3, name="attention")
    inputs = keras.Input((5, 6))
    x = layers.LayerNormalization()(inputs + attention(inputs, inputs))
    y = layers.Dense(7, activation="gelu", name="up")(x)
    x = layers.LayerNormalization()(x + layers.Dense(6, name="down")(y))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


def decoder():
    """A nested block of grouped self-attention and of attention to another sequence, twice."""
    inputs, memory = keras.Input((5, 6)), keras.Input((4, 6))
    x = layers.GroupQueryAttention(2, 6, 3, name="own")(inputs, inputs, use_causal_mask=True)
    x = layers.RMSNormalization()(x + inputs)
    y = layers.GroupQueryAttention(3, 2, 2, use_bias=False, name="other")(x, memory)
    block = keras.Model([inputs, memory], x + y, name="block")
    inputs, memory = keras.Input((5, 6)), keras.Input((4, 6))
    x = block([block([inputs, memory]), memory])
    return keras.Model([inputs, memory], layers.Dense(2, name="head")(x))


def recurrent():
    """Layers of every kind with a mask, and cells that are stacked in one layer."""
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 5, mask_zero=True, name="embedding")(tokens)
    x = layers.LSTM(6, return_sequences=True, name="first")(x)
    cells = [layers.GRUCell(4, name="a"), layers.LSTMCell(3, use_bias=False, name="b")]
    x = layers.RNN(
        layers.StackedRNNCells(cells, name="stack"), return_sequences=True, name="cells"
    )(x)
    x = layers.SimpleRNN(5, go_backwards=True, name="last")(x)
    return keras.Model(tokens, layers.Dense(2, name="head")(x))


def both_directions():
    inputs = keras.Input((5, 3))
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="first")(inputs)
    gru = layers.GRU(3, reset_after=False)
    x = layers.Bidirectional(gru, merge_mode="mul", name="second")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def translation():
    """The states of an encoder are those that the decoder begins with."""
    inputs, memory, outputs = keras.Input((5, 3)), keras.Input((6,)), keras.Input((4, 2))
    _, h, c = layers.LSTM(5, return_state=True, name="encoder")(inputs)
    x = layers.LSTM(5, return_sequences=True, name="decoder")(outputs, initial_state=[h, c])
    start = layers.Dense(4, activation="tanh", name="memory")(memory)
    x, last = layers.GRU(4, return_state=True, name="reader")(x, initial_state=start)
    x = layers.Concatenate()([x, layers.Dense(3, name="state")(last)])
    return keras.Model([inputs, memory, outputs], layers.Dense(2, name="head")(x))


def films():
    inputs = keras.Input((3, 6, 6, 2))
    x = layers.TimeDistributed(layers.Conv2D(3, 1, name="conv"), name="stems")(inputs)
    x = layers.ConvLSTM2D(4, 3, return_sequences=True, name="first")(x)
    x = layers.ConvLSTM2D(2, 3, strides=2, padding="same", name="second")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


NETWORKS = (
    residual,
    concatenation,
    squeeze_and_excite,
    depthwise,
    two_inputs,
    shared_layer,
    nested,
    u_net,
    grouped,
    reshapes,
    split,
    channel_shuffle,
    sequences,
    frames,
    tokens,
    encoder,
    decoder,
    recurrent,
    both_directions,
    translation,
    films,
)
