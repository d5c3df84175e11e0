"""Compaction: the same function in fewer parameters and multiply-accumulates, in plain Keras."""

import keras
import numpy as np
import pytest

import keras_compaware as kc
from keras_compaware import (
    Chain,
    Compressed,
    GroupLasso,
    LowRank,
    MagnitudePruning,
    Recipe,
    Rule,
    StraightThrough,
    Tucker2,
    UniformQuantization,
    compact,
    find_targets,
    shrink,
)
from keras_compaware.compaction.rebuild import copy_model
from keras_compaware.measure import macs, parameters

BACKEND = keras.backend.backend()


def data(shape, number=4, seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def lower_rank(model, **rank):
    """Gives all kernels a low rank and random biases, outside of training."""
    for number, target in enumerate(find_targets(model)[0]):
        target.write(LowRank(**rank)(target.read(), axes=target.axes))
        if getattr(target.layer, "use_bias", False):
            target.layer.bias.assign(data(target.layer.bias.shape, 1, number)[0])
    return model


def check_equal(model, small, shape, tolerance=1e-5):
    x = data(shape, 2)  # the batch size that `compact` itself compares with: compiled once on JAX
    expected, received = array(model(x)), array(small(x))
    assert np.max(np.abs(received - expected)) <= tolerance * np.max(np.abs(expected))


def single(layer, shape):
    return keras.Sequential([keras.Input(shape), layer])


CASES = {
    "dense": (lambda: keras.layers.Dense(20, "tanh", name="a"), (16,), ["channel"]),
    "dense on sequences": (lambda: keras.layers.Dense(20, name="a"), (5, 16), ["channel"]),
    "no bias": (lambda: keras.layers.Dense(20, use_bias=False, name="a"), (16,), ["channel"]),
    "conv 1d": (
        lambda: keras.layers.Conv1D(12, 5, strides=2, activation="relu", name="a"),
        (23, 8),
        ["channel"],
    ),
    "conv 1d causal, dilated": (
        lambda: keras.layers.Conv1D(12, 3, padding="causal", dilation_rate=2, name="a"),
        (15, 8),
        ["channel"],
    ),
    "conv 2d": (
        lambda: keras.layers.Conv2D(12, 3, activation="relu", name="a"),
        (9, 8, 8),
        ["channel", "spatial"],
    ),
    "conv 2d same, strides": (
        lambda: keras.layers.Conv2D(12, (3, 5), strides=(2, 3), padding="same", name="a"),
        (9, 14, 8),
        ["channel", "spatial"],
    ),
    "conv 2d valid, strides": (
        lambda: keras.layers.Conv2D(12, (5, 3), strides=2, name="a"),
        (11, 13, 8),
        ["channel", "spatial"],
    ),
    "conv 2d dilated": (
        lambda: keras.layers.Conv2D(12, 3, padding="same", dilation_rate=(2, 3), name="a"),
        (9, 10, 8),
        ["channel", "spatial"],
    ),
    "conv 2d groups": (
        lambda: keras.layers.Conv2D(12, 3, padding="same", groups=2, activation="elu", name="a"),
        (7, 8, 16),
        ["channel", "spatial"],
    ),
    "conv 3d": (
        lambda: keras.layers.Conv3D(8, 3, strides=(1, 2, 1), padding="same", name="a"),
        (4, 5, 6, 6),
        ["channel", "spatial"],
    ),
}


@pytest.mark.parametrize(
    ("make", "shape", "split"),
    [(make, shape, split) for make, shape, splits in CASES.values() for split in splits],
    ids=[f"{name}-{split}" for name, (_, _, splits) in CASES.items() for split in splits],
)
def test_every_kind_of_layer(make, shape, split):
    model = lower_rank(single(make(), shape), rank=2, split=split)
    result = compact(model)
    (row,) = result.rows
    layer = model.layers[0]
    assert row.note.startswith("rank 2 of ")
    assert (f"{split} split" in row.note) == (not isinstance(layer, keras.layers.Dense))
    check_equal(model, result.model, shape)
    assert result.max_error <= 1e-5
    (pair,) = result.model.layers
    assert isinstance(pair, keras.Sequential)
    assert pair.name == "a"
    assert [inner.name for inner in pair.layers] == ["a_left", "a_right"]
    assert {type(inner) for inner in pair.layers} == {type(layer)}
    assert (row.before, row.after) == (parameters(model), parameters(result.model))
    assert parameters(result.model) < parameters(model)
    assert macs(result.model) < macs(model)


def lower_ranks(model, *ranks):
    """Gives the kernel low ranks of its input and output modes, the bias random numbers."""
    (target,), _ = find_targets(model)
    target.write(Tucker2(ranks=ranks)(target.read(), axes=target.axes))
    if target.layer.use_bias:
        target.layer.bias.assign(data(target.layer.bias.shape, 1)[0])
    return model


@pytest.mark.parametrize(
    "name", ["conv 1d causal, dilated", "conv 2d valid, strides", "conv 2d groups", "conv 3d"]
)
def test_low_ranks_of_inputs_and_outputs_make_three_layers(name):
    make, shape, _ = CASES[name]
    model = lower_ranks(single(make(), shape), 2, 3)
    result = compact(model)
    (row,) = result.rows
    layer = model.layers[0]
    blocks = layer.groups
    assert row.note == (
        f"ranks 2 of {shape[-1] // blocks} and 3 of {layer.filters // blocks}, Tucker-2"
    )
    check_equal(model, result.model, shape)
    (sequence,) = result.model.layers
    assert sequence.name == "a"
    first, core, last = sequence.layers
    assert [inner.name for inner in sequence.layers] == ["a_input", "a_core", "a_output"]
    assert {type(inner) for inner in sequence.layers} == {type(layer)}
    assert [inner.filters for inner in sequence.layers] == [
        2 * blocks, 3 * blocks, layer.filters
    ]  # fmt: skip
    for attribute in ("kernel_size", "strides", "dilation_rate"):
        assert getattr(core, attribute) == getattr(layer, attribute)
        assert set(getattr(first, attribute)) | set(getattr(last, attribute)) == {1}
    assert [inner.use_bias for inner in sequence.layers] == [False, False, True]
    assert last.activation is layer.activation
    assert row.after == parameters(result.model) < parameters(model)
    assert macs(result.model) < macs(model)


@pytest.mark.parametrize("size", [9, None], ids=["known size", "any size"])
def test_three_layers_that_compute_more_are_left_out(size):
    """With strides of 3 the first layer runs at nine positions for each one of the output."""

    def network(*ranks):
        layer = keras.layers.Conv2D(12, 3, strides=3, padding="same", use_bias=False, name="a")
        return lower_ranks(single(layer, (size, size, 12)), *ranks)

    # 9 * 12 * 6 + 9 * 6 * 6 + 6 * 12 = 1044 of 9 * 12 * 12 = 1296
    assert "Tucker-2" in compact(network(6, 6)).rows[0].note
    # 9 * 12 * 8 + 9 * 8 * 6 + 6 * 12 = 1368, although it would save parameters
    assert "channel split" in compact(network(8, 6)).rows[0].note


def test_full_ranks_are_told():
    model = single(keras.layers.Conv2D(4, 3, name="a"), (6, 6, 4))
    (row,) = compact(model).rows
    assert row.note == (
        "as it is: rank 4 of 4 (channel) saves nothing; rank 12 of 12 (spatial) saves nothing; "
        "ranks 4 of 4 and 4 of 4 (tucker) save nothing"
    )


def test_channels_first():
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no channels_first convolution on the CPU")
    layer = keras.layers.Conv2D(12, 3, padding="same", data_format="channels_first", name="a")
    for split in ("channel", "spatial"):
        model = lower_rank(single(layer, (8, 7, 9)), rank=2, split=split)
        result = compact(model)
        assert split in result.rows[0].note
        check_equal(model, result.model, (8, 7, 9))
    layer.kernel.assign(data(layer.kernel.shape, 1)[0])
    result = compact(lower_ranks(model, 2, 3))
    assert "ranks 2 of 8 and 3 of 12, Tucker-2" in result.rows[0].note
    check_equal(model, result.model, (8, 7, 9))


def test_full_rank_is_left_as_it_is():
    model = single(keras.layers.Dense(20, name="a"), (16,))
    result = compact(model)
    (row,) = result.rows
    assert row.note == "as it is: rank 16 of 16 (channel) saves nothing"
    assert row.before == row.after == 340
    assert type(result.model.layers[0]) is keras.layers.Dense
    np.testing.assert_array_equal(array(model(data((16,)))), array(result.model(data((16,)))))


def test_a_spatial_split_that_computes_more_is_left_out():
    """Without padding the first convolution runs at three columns for each column of the output."""

    def network(size):
        layer = keras.layers.Conv2D(10, 3, use_bias=False, name="a")
        return lower_rank(single(layer, (size, size, 10)), rank=10, split="spatial")

    small, large = network(3), network(30)
    assert compact(small).rows[0].note.startswith("as it is")
    result = compact(large)
    assert "spatial split" in result.rows[0].note
    assert macs(result.model) < macs(large)


def test_a_strided_spatial_split_that_computes_more_is_left_out():
    layer = keras.layers.Conv2D(10, 3, strides=3, padding="same", use_bias=False, name="a")
    model = lower_rank(single(layer, (12, 12, 10)), rank=9, split="spatial")
    result = compact(model)
    assert macs(result.model) <= macs(model)
    assert parameters(result.model) == parameters(model)


def test_the_table():
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(20, name="wide"),
            keras.layers.Dense(4, name="head"),
        ]
    )
    kernel = model.layers[0].kernel
    kernel.assign(LowRank(rank=3)(kernel.value))
    assert str(compact(model)).splitlines() == [
        "layer  class  parameters  what happened",
        "-----------------------------------------------------------------------",
        "wide   Dense  340 -> 128  rank 3 of 16",
        "head   Dense  84 -> 84    as it is: rank 4 of 4 (channel) saves nothing",
    ]


# ---- structure ----------------------------------------------------------------------------------


def test_a_shared_layer_stays_shared():
    shared = keras.layers.Dense(16, name="shared")
    one, two = keras.Input((16,)), keras.Input((16,))
    model = keras.Model([one, two], keras.layers.Add()([shared(one), shared(shared(two))]))
    lower_rank(model, rank=2)
    result = compact(model)
    assert len(result.rows) == 1
    assert parameters(result.model) == 16 * 2 * 2 + 16
    xs = [data((16,)), data((16,), seed=1)]
    np.testing.assert_allclose(array(result.model(xs)), array(model(xs)), atol=1e-5)


def two_deep():
    def block(name):
        image = keras.Input((6, 6, 8))
        x = keras.layers.Conv2D(8, 3, padding="same", name="conv")(image)
        return keras.Model(image, keras.layers.BatchNormalization(name="norm")(x), name=name)

    image = keras.Input((6, 6, 8), name="image")
    inner = keras.Sequential(
        [keras.Input((6, 6, 8)), block("block2"), keras.layers.ReLU()], name="inner"
    )
    backbone = keras.Model(image, inner(block("block1")(image)), name="backbone")
    inputs = keras.Input((6, 6, 8))
    y = keras.layers.GlobalAveragePooling2D(name="pool")(backbone(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(y), name="net")


def test_nested_models_keep_their_names():
    model = two_deep()
    norm = model.get_layer("backbone").get_layer("block1").get_layer("norm")
    norm.moving_mean.assign(data((8,), 1)[0])
    lower_rank(model, rank=2)
    result = compact(model)
    backbone = result.model.get_layer("backbone")
    blocks = [backbone.get_layer("block1"), backbone.get_layer("inner").get_layer("block2")]
    for block in blocks:
        assert isinstance(block.get_layer("conv"), keras.Sequential)
    assert result.model.name == "net"
    assert sum(row.note.startswith("rank 2") for row in result.rows) == 3
    check_equal(model, result.model, (6, 6, 8))


def test_several_inputs_and_outputs():
    a, b = keras.Input((16,), name="a"), keras.Input((3,), dtype="int32", name="b")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 4, name="table")(b))
    wide = keras.layers.Dense(20, name="wide")(a)
    joined = keras.layers.Concatenate()([wide, embedded])
    outputs = {"first": keras.layers.Dense(2, name="first")(joined), "second": wide}
    model = keras.Model({"a": a, "b": b}, outputs)
    kernel = model.get_layer("wide").kernel
    kernel.assign(LowRank(rank=2)(kernel.value))
    result = compact(model)
    x = {"a": data((16,)), "b": np.array([[0, 1, 2]] * 4)}
    received = result.model(x)
    assert sorted(received) == ["first", "second"]
    for name, value in model(x).items():
        np.testing.assert_allclose(array(received[name]), array(value), atol=1e-5)


def test_the_model_is_not_changed():
    model = lower_rank(two_deep(), rank=2)
    before = [array(v).copy() for v in model.variables]
    layers = [id(layer) for layer in model._flatten_layers()]
    compact(model)
    assert [id(layer) for layer in model._flatten_layers()] == layers
    for one, other in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(one, array(other))


def test_a_compiled_model_stays_compiled_and_trains():
    model = lower_rank(single(keras.layers.Dense(20, name="a"), (16,)), rank=2)
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    small = compact(model).model
    assert small.compiled
    assert isinstance(small.optimizer, keras.optimizers.Adam)
    assert small.optimizer is not model.optimizer
    assert float(array(small.optimizer.learning_rate)) == pytest.approx(0.02)
    x, y = data((16,)), data((20,))
    assert small.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-4
    )
    before = small.evaluate(x, y, verbose=0)[0]
    small.fit(x, y, epochs=3, verbose=0)
    assert small.evaluate(x, y, verbose=0)[0] < before
    assert not compact(single(keras.layers.Dense(3), (4,))).model.compiled


class Halved(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered with Keras, as the loss and the metric below."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / 2

    def get_config(self):
        return {"rate": self.rate}


class Squares(keras.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.square(y_true - y_pred)


def largest(y_true, y_pred):
    return keras.ops.max(keras.ops.abs(y_true - y_pred), axis=-1)


def smaller(kind, model):
    if kind == "compact":
        return compact(model).model
    if kind == "shrink":
        return shrink(model, {"a": [0, 1]})
    wrap = Recipe([Rule("a", StraightThrough(LowRank(rank=2)))]).wrap
    return wrap(model) if kind == "wrap" else copy_model(model)


@pytest.mark.parametrize("kind", ["compact", "shrink", "wrap", "copy"])
@pytest.mark.parametrize("loss", [Squares(), largest], ids=["class", "function"])
def test_what_a_model_is_compiled_with_need_not_be_registered(loss, kind):
    layers = [keras.layers.Dense(4, name="a"), keras.layers.Dense(2, name="b")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(keras.optimizers.SGD(Halved(0.5)), loss, metrics=[largest])
    new = smaller(kind, model)
    assert float(array(new.optimizer.learning_rate)) == 0.25
    x, y = data((8,)), data((2,))
    names = ["loss", "largest"]
    assert sorted(new.evaluate(x, y, verbose=0, return_dict=True)) == sorted(names)


@pytest.mark.filterwarnings("ignore:.*lambda")
@pytest.mark.parametrize("kind", ["compact", "shrink", "wrap"])
def test_lambdas_that_a_model_is_compiled_with(kind):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="a")])
    model.add(keras.layers.Dense(2, name="b"))
    model.compile("sgd", lambda y_true, y_pred: keras.ops.mean(y_pred))
    with pytest.raises(ValueError, match=r"named functions in place of lambdas"):
        smaller(kind, model)
    model.compile()
    assert smaller(kind, model).compiled


def test_frozen_layers_stay_frozen():
    model = single(keras.layers.Dense(20, name="a"), (16,))
    lower_rank(model, rank=2)
    model.layers[0].trainable = False
    small = compact(model).model
    assert small.trainable_variables == []
    assert len(small.non_trainable_variables) == 3


def test_compacting_twice_changes_nothing():
    model = lower_rank(two_deep(), rank=2)
    once = compact(model).model
    twice = compact(once).model
    assert parameters(once) == parameters(twice)
    check_equal(once, twice, (6, 6, 8))


# ---- stripping ----------------------------------------------------------------------------------


def ours_inside(model):
    return "keras_compaware" in model.to_json()


def test_our_regularizers_and_constraints_are_taken_off():
    def dense(name, **arguments):
        return keras.layers.Dense(
            6,
            kernel_regularizer=GroupLasso(0.1),
            kernel_constraint=MagnitudePruning(0.5),
            bias_regularizer=keras.regularizers.L1(0.01),
            name=name,
            **arguments,
        )

    inner = keras.Sequential([keras.Input((6,)), dense("b")], name="inner")
    model = keras.Sequential(
        [
            keras.Input((4, 6)),
            dense("a"),
            keras.layers.TimeDistributed(dense("c"), name="steps"),
            keras.layers.Bidirectional(
                keras.layers.LSTM(3, kernel_regularizer=kc.L1(0.1)), name="both"
            ),
            inner,
        ]
    )
    assert ours_inside(model)
    small = compact(model).model
    assert not ours_inside(small)
    assert small.get_layer("a").kernel_regularizer is None
    assert small.get_layer("a").kernel_constraint is None
    assert isinstance(small.get_layer("a").bias_regularizer, keras.regularizers.L1)
    assert small.get_layer("steps").layer.kernel_regularizer is None
    check_equal(model, small, (4, 6))


def test_regularizers_of_keras_stay_unless_the_kernel_is_gone():
    def network(rank):
        layer = keras.layers.Dense(
            20,
            kernel_regularizer="l2",
            bias_regularizer="l1",
            activity_regularizer=keras.regularizers.L2(0.1),
            name="a",
        )
        return lower_rank(single(layer, (16,)), rank=rank)

    kept = compact(network(16)).model.layers[0]
    assert isinstance(kept.kernel_regularizer, keras.regularizers.L2)
    left, right = compact(network(2)).model.layers[0].layers
    assert left.kernel_regularizer is None
    assert right.kernel_regularizer is None
    assert left.activity_regularizer is None
    assert isinstance(right.bias_regularizer, keras.regularizers.L1)
    assert isinstance(right.activity_regularizer, keras.regularizers.L2)


COMPRESSORS = {
    "pruning": MagnitudePruning(0.5),
    "quantization": UniformQuantization(4),
    "low rank": LowRank(rank=2),
    "low rank, quantization": Chain([LowRank(rank=2), UniformQuantization(6)]),
}


@pytest.mark.parametrize(
    ("compressor", "fitted"),
    [*((c, True) for c in COMPRESSORS.values()), (COMPRESSORS["low rank"], False)],
    ids=[*COMPRESSORS, "not fitted"],
)
def test_a_wrapper_becomes_the_layer_it_computes(compressor, fitted):
    """Also before the end of training, with a basis that is stale or not there yet."""
    wrapper = Compressed(keras.layers.Dense(20, "relu", name="wide"), compressor)
    model = keras.Sequential([keras.Input((16,)), wrapper, keras.layers.Dense(2, name="head")])
    if fitted:
        wrapper.refresh()
        wrapper.layer.kernel.assign(array(wrapper.layer.kernel) + 0.1 * data((16, 20), 1)[0])
    result = compact(model)
    check_equal(model, result.model, (16,))
    assert not ours_inside(result.model)
    row = result.rows[0]
    assert (row.name, row.layer) == ("wide", "Dense")
    is_low_rank = fitted and compressor.needs_decomposition
    assert row.note.startswith("rank 2 of 16") == is_low_rank
    assert row.before == 340
    assert parameters(result.model) == row.after + 42


def test_a_wrapped_block_is_stripped():
    block = keras.Sequential(
        [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.Flatten()],
        name="block",
    )
    model = keras.Sequential([keras.Input((5, 5, 2)), Compressed(block, UniformQuantization(4))])
    small = compact(model).model
    assert not ours_inside(small)
    check_equal(model, small, (5, 5, 2), 1e-6)


def test_a_wrapper_inside_another_layer_raises():
    inner = Compressed(keras.layers.Dense(3, name="inner"), UniformQuantization(4))
    model = single(keras.layers.TimeDistributed(inner), (4, 5))
    with pytest.raises(ValueError, match=r"'inner' is inside another layer.*Compressed\(Time"):
        compact(model)


# ---- what cannot be done ------------------------------------------------------------------------


def test_a_subclassed_model_raises():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Net()
    model(data((4,)))
    with pytest.raises(ValueError, match=r"is subclassed.*Build it as a functional or Sequential"):
        compact(model)


def test_a_sequential_model_that_is_not_built_raises():
    with pytest.raises(ValueError, match=r"not built yet\. Begin it with keras\.Input"):
        compact(keras.Sequential([keras.layers.Dense(3)]))


@keras.saving.register_keras_serializable("compact_test")
class Twice(keras.layers.Dense):
    def call(self, x, training=None):
        return 2.0 * super().call(x)


def test_a_subclass_of_a_layer_is_left_as_it_is():
    model = lower_rank(single(Twice(20, name="a"), (16,)), rank=2)
    result = compact(model)
    assert "a subclass of a Keras layer (Twice)" in result.rows[0].note
    check_equal(model, result.model, (16,))


def test_a_model_that_is_no_function_of_its_inputs_is_not_returned():
    @keras.saving.register_keras_serializable("compact_test")
    class Counting(keras.layers.Layer):
        made = 0

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            Counting.made += 1
            self.number = Counting.made

        def call(self, x):
            return x * float(self.number)

    with pytest.raises(RuntimeError, match="differ by"):
        compact(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), Counting()]))


def test_mixed_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(64, "relu", name="a"),
                keras.layers.Dense(64, "relu", name="b"),
                keras.layers.Dense(8, name="head"),
            ]
        )
        lower_rank(model, rank=3)
        result = compact(model)
        assert [row.note[:6] for row in result.rows] == ["rank 3"] * 3
        assert result.max_error < 0.25
        assert result.model.get_layer("a").layers[0].kernel.dtype == "float32"
    finally:
        keras.config.set_dtype_policy(previous)


def test_a_kernel_of_zeros():
    model = single(keras.layers.Dense(20, name="a"), (16,))
    model.layers[0].kernel.assign(np.zeros((16, 20)))
    model.layers[0].bias.assign(data((20,), 1)[0])
    result = compact(model)
    assert result.rows[0].note == "rank 1 of 16"
    check_equal(model, result.model, (16,))


def test_numerical_rank_ignores_rounding_only():
    model = single(keras.layers.Dense(64, name="a"), (64,))
    left, _, right = np.linalg.svd(data((64,), 64))
    for tail, rank in ((1e-7, 2), (1e-4, 3)):
        values = np.zeros(64)
        values[:3] = 1.0, 0.5, tail
        model.layers[0].kernel.assign((left * values) @ right)
        assert compact(model).rows[0].note == f"rank {rank} of 64"


def test_an_adapted_normalization_layer_goes_on_normalizing():
    x = np.random.default_rng(0).normal(5.0, 3.0, size=(32, 6)).astype("float32")
    normalization = keras.layers.Normalization(name="normalization")
    normalization.adapt(x)
    model = keras.Sequential([keras.Input((6,)), normalization, keras.layers.Dense(2)])
    small = compact(model).model
    np.testing.assert_allclose(
        small.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )
