"""Recovery by least squares: against NumPy's solution, and on whole networks."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from tests.compaction.helpers import array, data, outputs_of, randomise
from tests.marks import slow_on_jax

BACKEND = keras.backend.backend()


def copy_of(weights):
    return {variable.path: np.array(array(variable)) for variable in weights}


def in_factors(left, right, shape):
    return keras.Sequential([keras.Input(shape), keras.Sequential([left, right], name="a")])


def truncated(teacher, compressor):
    return kc.compact(kc.compress(teacher, compressor)).model


def relative_error(model, teacher, x):
    pairs = zip(outputs_of(model, x), outputs_of(teacher, x), strict=True)
    return sum(np.sum((a - b) ** 2) / np.sum((b - b.mean()) ** 2) for a, b in pairs)


def uneven(x, *sizes):
    return np.split(x, np.cumsum(sizes))


def design(layer, x, shape):
    """Columns: what the layer returns for each kernel in which one entry is one, no bias."""
    no_bias = "bias_axes" if isinstance(layer, layers.EinsumDense) else "use_bias"
    config = {**layer.get_config(), "activation": "linear", no_bias: None}
    plain = type(layer).from_config(config)
    plain.build(x.shape)
    columns = []
    for unit in np.eye(int(np.prod(shape))):
        plain.kernel.assign(unit.reshape(shape))
        columns.append(array(plain(x)).ravel())
    return np.stack(columns, axis=1).astype("float64")


def bias_design(layer, shape):
    """Columns: what each entry of the bias adds to outputs of this shape."""
    units = np.eye(int(np.prod(layer.bias.shape)))
    per_output = [np.reshape(unit, layer.bias.shape) for unit in units]
    if getattr(layer, "data_format", "") == "channels_first":
        per_output = [unit.reshape(-1, *[1] * layer.rank) for unit in per_output]
    return np.stack([np.broadcast_to(unit, shape).ravel() for unit in per_output], axis=1)


def check_least_squares(small, teacher, x, ridge=0.0, fits_bias=True):
    """Fits, and compares kernel and bias with NumPy's least squares; the rest stays."""
    left, right = small.layers[0].layers
    old = teacher.layers[0]
    randomise(small), randomise(teacher)
    before, whole = copy_of([*left.weights, *teacher.weights]), copy_of(right.weights)
    read = array(left(x))
    linear = type(old).from_config({**old.get_config(), "activation": "linear"})
    linear.build(x.shape)
    linear.set_weights(old.get_weights())
    target = array(linear(x)).astype("float64")
    columns = design(right, read, right.kernel.shape)
    start = array(right.kernel).astype("float64").ravel()
    rows = [columns]
    if right.bias is not None and fits_bias:
        rows.append(bias_design(right, target.shape))
    elif right.bias is not None:
        target = target - array(right.bias)
    goal = target.ravel()
    matrix = np.concatenate(rows, axis=1)
    if ridge:
        centred = read.reshape(-1, read.shape[-1])
        centred = centred - (centred.mean(axis=0) if right.bias is not None else 0)
        pull = np.sqrt(ridge * np.mean(np.sum(centred**2, axis=0)))
        extra = np.eye(start.size, matrix.shape[1]) * pull
        matrix, goal = np.concatenate([matrix, extra]), np.concatenate([goal, pull * start])
    solution = np.linalg.lstsq(matrix, goal, rcond=None)[0]
    residual = target.ravel() - np.concatenate(rows, axis=1) @ solution

    (row,) = kc.recover(small, teacher, uneven(x, 3, 7), ridge=ridge).rows
    found = array(right.kernel).ravel()
    np.testing.assert_allclose(found, solution[: start.size], atol=2e-3 * np.abs(solution).max())
    assert np.max(np.abs(found - start)) > 0.05  # it was not there before
    if right.bias is not None and fits_bias:
        bias = solution[start.size :]
        np.testing.assert_allclose(array(right.bias).ravel(), bias, atol=2e-3)
    elif right.bias is not None:
        np.testing.assert_array_equal(array(right.bias), whole[right.bias.path])
    after = copy_of([*left.weights, *teacher.weights])
    for path, values in before.items():
        np.testing.assert_array_equal(values, after[path])
    return row, residual, target


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_dense_by_hand(use_bias, ridge):
    def dense(units, name, **config):
        return layers.Dense(units, name=name, **config)

    last = {"use_bias": use_bias, "activation": "relu"}
    small = in_factors(dense(3, "l", use_bias=False), dense(4, "r", **last), (6,))
    teacher = keras.Sequential([keras.Input((6,)), dense(4, "a", **last)])
    x = 1.0 + data((6,), 25)
    start = relative_error(small, teacher, x)
    row, residual, target = check_least_squares(small, teacher, x, ridge)
    assert start > 0
    assert row.name == "a/r"
    variance = np.sum((target - target.mean(axis=0)) ** 2)
    assert row.after < 0.8 * row.before
    np.testing.assert_allclose(row.after, np.sum(residual**2) / variance, rtol=1e-3)


@slow_on_jax
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_pointwise_convolution_by_hand(use_bias, ridge):
    last = {"use_bias": use_bias, "activation": "relu", "name": "a"}
    small = in_factors(
        layers.Conv2D(2, 3, strides=2, padding="same", use_bias=False),
        layers.Conv2D(4, 1, use_bias=use_bias, activation="relu"),
        (6, 5, 3),
    )
    teacher = layers.Conv2D(4, 3, strides=2, padding="same", **last)
    teacher = keras.Sequential([keras.Input((6, 5, 3)), teacher])
    check_least_squares(small, teacher, 1.0 + data((6, 5, 3), 12), ridge)


WINDOWS = {
    "same": (2, (7, 6), {"kernel_size": (3, 2), "padding": "same"}),
    "strides": (2, (7, 8), {"kernel_size": 3, "strides": (2, 3), "padding": "same"}),
    "strides, valid": (2, (8, 7), {"kernel_size": (2, 3), "strides": 2}),
    "dilated": (2, (7, 6), {"kernel_size": (2, 3), "dilation_rate": 2, "padding": "same"}),
    "dilated, valid": (2, (7, 8), {"kernel_size": 2, "dilation_rate": (3, 1)}),
    "groups": (2, (5, 6), {"kernel_size": 2, "groups": 2}),
    "causal": (1, (9,), {"kernel_size": 3, "dilation_rate": 2, "padding": "causal"}),
    "causal, strides": (1, (9,), {"kernel_size": 2, "strides": 3, "padding": "causal"}),
    "volume": (3, (4, 3, 5), {"kernel_size": (2, 1, 2), "padding": "same"}),
    "channels first": (2, (6, 5), {"kernel_size": (3, 2), "padding": "same"}),
}


@slow_on_jax
@pytest.mark.parametrize(("rank", "size", "config"), WINDOWS.values(), ids=WINDOWS)
def test_convolutions_with_windows(rank, size, config, request):
    first = "channels first" in request.node.callspec.id
    if first and BACKEND == "tensorflow":
        pytest.skip("TensorFlow convolves channels_first on GPUs only")
    layout = {"data_format": "channels_first" if first else "channels_last"}
    convolution = [layers.Conv1D, layers.Conv2D, layers.Conv3D][rank - 1]
    last = {**config, **layout, "filters": 4}
    shape = (4, *size) if first else (*size, 4)
    small = in_factors(
        convolution(2, 1, use_bias=False, name="l", **layout),
        convolution(**last, name="r"),
        shape,
    )
    teacher = keras.Sequential([keras.Input(shape), convolution(**last, name="a")])
    check_least_squares(small, teacher, 0.5 + data(shape, 14))


EQUATIONS = {
    "last axis": ("...x,xy->...y", 4, "y", True),
    "to heads": ("abc,cde->abde", (None, 3, 2), "de", True),
    "from heads": ("abcd,cde->abe", (None, 4), "e", True),
    "per head": ("abcd,cde->abce", (None, 2, 4), "ce", True),
    "mixed order": ("abcd,edc->aeb", (4, None), None, True),
    "bias by position": ("abc,cd->abd", (3, 4), "bd", False),
    "bias shared by units": ("abc,cde->abde", (None, 3, 2), "e", False),
}


@slow_on_jax
@pytest.mark.parametrize("name", EQUATIONS)
def test_einsum_dense(name):
    equation, output_shape, bias_axes, fits_bias = EQUATIONS[name]
    wide = "abcd" in equation
    shape = (3, 2, 5) if wide else (3, 5)
    last = {"output_shape": output_shape, "bias_axes": bias_axes}
    small = in_factors(
        layers.Dense(shape[-1], name="l"),
        layers.EinsumDense(equation, **last, name="r"),
        shape,
    )
    teacher = layers.EinsumDense(equation, **last, name="a")
    teacher = keras.Sequential([keras.Input(shape), teacher])
    check_least_squares(small, teacher, 0.5 + data(shape, 16), fits_bias=fits_bias)


def test_embedding():
    teacher = keras.Sequential(
        [keras.Input((3,), dtype="int32"), layers.Embedding(6, 4, name="a"), layers.Dense(1)]
    )
    small = truncated(teacher, kc.LowRank(rank=1))
    x = np.array([[0, 1, 0], [0, 2, 1], [1, 1, 0]])  # most words do not occur
    table = array(teacher.layers[0].embeddings)
    left, right = small.layers[0].layers
    read = array(left(x)).reshape(-1, 1)
    expected = np.linalg.lstsq(read, table[x].reshape(-1, 4), rcond=None)[0]
    kc.recover(small, teacher, [x], ridge=0.0)
    np.testing.assert_allclose(array(right.kernel), expected, rtol=1e-3)


def correlated(shape, number, seed):
    """Examples near a subspace, as images are."""
    size = int(np.prod(shape))
    mixing = data((size,), 5, seed=7)
    x = data((5,), number, seed) @ mixing / 2 + 0.3 * data((size,), number, seed + 100)
    return x.reshape(number, *shape)


def dense_net():
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(24, activation="relu", name="a"),
            layers.Dense(24, activation="tanh", name="b"),
            layers.Dense(5, activation="softmax", name="head"),
        ]
    )
    return randomise(model)


def conv_net():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(12, 3, padding="same", use_bias=False, name="a")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm_a")(x))
    y = layers.Conv2D(12, 3, padding="same", name="b")(x)
    x = layers.Add()([x, layers.ReLU()(layers.BatchNormalization(name="norm_b")(y))])
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="c")(x)
    outputs = layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(x))
    model = randomise(keras.Model(inputs, outputs))
    return kc.recalibrate_batch_norm(model, [correlated((8, 8, 3), 64, 5)])


@slow_on_jax
@pytest.mark.parametrize(
    ("make", "compressor", "fitted"),
    [
        (dense_net, kc.LowRank(rank=4), ["a/a_right", "b/b_right"]),
        (conv_net, kc.LowRank(rank=3), ["a/a_right", "b/b_right", "c/c_right"]),
        (conv_net, kc.LowRank(rank=5, split="spatial"), ["a/a_right", "b/b_right", "c/c_right"]),
        (conv_net, kc.Tucker2(ranks=(3, 4)), ["a/a_right", "b/b_output", "c/c_output"]),
    ],
    ids=["dense", "conv", "spatial", "tucker"],
)
def test_a_truncated_network_comes_nearer_to_its_teacher(make, compressor, fitted):
    teacher = make()
    small = truncated(teacher, compressor)
    shape = teacher.input_shape[1:]
    known, unseen = correlated(shape, 96, 1), correlated(shape, 64, 2)
    before, of_teacher = copy_of(small.weights), copy_of(teacher.weights)
    error = relative_error(small, teacher, unseen)
    result = kc.recover(small, teacher, uneven(known, 40, 40))
    assert [row.name for row in result.rows] == fitted
    assert all(row.after < row.before for row in result.rows)
    assert relative_error(small, teacher, unseen) < 0.5 * error
    changed = [path for path, w in copy_of(small.weights).items() if np.any(before[path] != w)]
    assert {path.split("/")[-2] for path in changed} == {name.split("/")[-1] for name in fitted}
    after = copy_of(teacher.weights)
    for path, values in of_teacher.items():
        np.testing.assert_array_equal(values, after[path])


def test_a_layer_reads_what_the_fitted_ones_before_it_return():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    x = correlated((20,), 80, 1)
    stale = array(small.get_layer("a")(x))
    kc.recover(small, teacher, [x], ridge=0.0)
    hidden = array(small.get_layer("a")(x))
    assert np.max(np.abs(hidden - stale)) > 0.1
    left, right = small.get_layer("b").layers
    read = np.pad(array(left(hidden)), ((0, 0), (0, 1)), constant_values=1.0)
    b = teacher.get_layer("b")
    target = array(teacher.get_layer("a")(x)) @ array(b.kernel) + array(b.bias)
    expected = np.linalg.lstsq(read, target, rcond=None)[0]
    np.testing.assert_allclose(array(right.kernel), expected[:-1], atol=1e-3)
    np.testing.assert_allclose(array(right.bias), expected[-1], atol=1e-3)


def test_the_ridge_holds_the_present_weights():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    start, kernel = small.get_weights(), small.get_layer("a").layers[1].kernel
    before = np.array(array(kernel))
    moves = []
    for ridge in (0.0, 1.0, 1e9):
        small.set_weights(start)
        row = kc.recover(small, teacher, [correlated((20,), 80, 1)], ridge=ridge).rows[0]
        assert row.after <= row.before
        moves.append(np.linalg.norm(array(kernel) - before))
    assert moves[0] > 1.2 * moves[1]
    assert moves[2] < 1e-5


def test_what_data_do_not_tell_stays():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    left, right = small.get_layer("a").layers
    x = correlated((20,), 3, 1)  # three examples for five numbers per unit
    start = np.array(array(right.kernel))
    kc.recover(small, teacher, [x], ridge=0.0)
    read = array(left(x))
    hidden = array(teacher.get_layer("a").kernel), array(teacher.get_layer("a").bias)
    found = read @ array(right.kernel) + array(right.bias)
    np.testing.assert_allclose(found, x @ hidden[0] + hidden[1], atol=1e-3)
    _, _, directions = np.linalg.svd(read - read.mean(axis=0))
    change = array(right.kernel) - start
    np.testing.assert_allclose(directions[2:] @ change, 0, atol=1e-3)
    assert np.abs(directions[:2] @ change).max() > 0.05


def test_a_lossless_model_stays():
    teacher = kc.compress(dense_net(), kc.LowRank(rank=4))
    small = kc.compact(teacher).model
    before = small.get_weights()
    result = kc.recover(small, teacher, [correlated((20,), 80, 1)])
    assert len(result.rows) == 2
    assert all(row.before < 1e-9 for row in result.rows)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


@slow_on_jax
def test_after_channels_were_removed():
    teacher = conv_net()
    small = kc.shrink(teacher, {"a": [0, 1, 2, 4, 5, 7, 8, 9, 11]})  # joined with those of b
    known, unseen = correlated((8, 8, 3), 96, 1), correlated((8, 8, 3), 64, 2)
    before = copy_of(small.weights)
    error = relative_error(small, teacher, unseen)
    result = kc.recover(small, teacher, [known])
    assert [row.name for row in result.rows] == ["c"]
    assert relative_error(small, teacher, unseen) < 0.5 * error
    changed = [path for path, w in copy_of(small.weights).items() if np.any(before[path] != w)]
    assert sorted(changed) == ["c/bias", "c/kernel"]


@slow_on_jax
def test_channels_removed_and_the_rest_in_factors():
    teacher = conv_net()
    small = truncated(kc.shrink(teacher, {"a": np.arange(9)}), kc.LowRank(rank=3))
    known, unseen = correlated((8, 8, 3), 96, 1), correlated((8, 8, 3), 64, 2)
    error = relative_error(small, teacher, unseen)
    result = kc.recover(small, teacher, [known])
    assert [row.name for row in result.rows] == ["c/c_right"]  # a and b return fewer
    assert relative_error(small, teacher, unseen) < 0.6 * error


def two_inputs():
    """Nested, with two inputs and a layer that is called twice."""
    shared = layers.Dense(20, activation="relu", name="shared")
    inner = keras.Input((20,), name="inner")
    block = layers.Dense(20, activation="relu", name="deep")(inner)
    block = keras.Model(inner, block, name="block")
    u, v = keras.Input((20,), name="u"), keras.Input((20,), name="v")
    x = layers.Add()([shared(u), block(shared(v))])
    heads = [layers.Dense(2, name="head")(x), layers.Dense(3, name="side")(x)]
    return randomise(keras.Model({"u": u, "v": v}, heads))


def test_two_inputs_of_whatever_iterable():
    teacher = two_inputs()
    small = truncated(teacher, kc.LowRank(rank=3))
    assert isinstance(small.get_layer("shared"), keras.Sequential)
    start = small.get_weights()
    u, v = correlated((20,), 60, 1), correlated((20,), 60, 2)
    batches = [{"u": u[:40], "v": v[:40]}, {"u": u[40:], "v": v[40:]}]
    error = relative_error(small, teacher, batches[0])
    found = []
    for data_ in (
        batches,
        [(x, np.zeros(len(x["u"]))) for x in batches],
        (x for x in batches),
        [*batches, None],  # of which two are taken
    ):
        small.set_weights(start)
        result = kc.recover(small, teacher, data_, num_batches=2)
        assert [row.name for row in result.rows] == ["block/deep/deep_right"]
        assert relative_error(small, teacher, batches[0]) < error
        found.append(small.get_weights())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_half_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        teacher = dense_net()
        small = truncated(teacher, kc.LowRank(rank=4))
    finally:
        keras.config.set_dtype_policy(before)
    x = correlated((20,), 80, 1)
    result = kc.recover(small, teacher, [x])
    assert result.rows[0].after < 0.6 * result.rows[0].before
    assert small.get_layer("a").layers[1].kernel.dtype == "float32"


def test_frozen_layers_are_fitted_and_stay_frozen():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    small.trainable = False
    x = correlated((20,), 80, 1)
    error = relative_error(small, teacher, x)
    kc.recover(small, teacher, [x])
    assert relative_error(small, teacher, x) < 0.5 * error
    assert not small.trainable_variables


def test_training_goes_on():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    small.compile("adam", "mse")
    x = correlated((20,), 80, 1)
    kc.recover(small, teacher, [x])
    expected = array(teacher(x))
    loss = small.evaluate(x, expected, verbose=0)
    small.fit(x, expected, epochs=3, verbose=0)
    assert small.evaluate(x, expected, verbose=0) < loss


def test_print():
    teacher = dense_net()
    small = truncated(teacher, kc.LowRank(rank=4))
    result = kc.recover(small, teacher, [correlated((20,), 80, 1)])
    header, _, first, second = str(result).splitlines()
    assert header.split("  ")[0] == "layer"
    row = result.rows[0]
    assert first.split() == ["a/a_right", f"{row.before:.3g}", f"{row.after:.3g}"]
    assert second.startswith("b/b_right")


@pytest.fixture(scope="module")
def pair():
    """A model and its teacher, for tests that change neither."""
    teacher = dense_net()
    return truncated(teacher, kc.LowRank(rank=4)), teacher


class Subclassed(keras.Model):
    def call(self, x):
        return x


X = np.ones((4, 20), "float32")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (X, TypeError, r"recover: `data` must be an iterable of batches\. Received: a ndarray"),
        ((X, X), TypeError, "Received: a tuple.*into a list"),
        (3, TypeError, "Received: a int"),
        ([], ValueError, "recover: `data` yields no batch"),
        ([{"u": X, "v": X}], ValueError, "holds 2 inputs, and the model '.*' takes 1"),
        ([X[:, :3]], ValueError, r"has the shape \(4, 3\), where the model '.*' takes \(None, 20"),
        ([X[0]], ValueError, r"has the shape \(20,\), where"),
        ([X * np.nan], ValueError, "what the layer 'a/a_right' reads.* is not finite"),
    ],
)
def test_data_that_are_refused(batches, error, message, pair):
    small, teacher = pair
    before = small.get_weights()
    with pytest.raises(error, match=message):
        kc.recover(small, teacher, batches)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_refused(pair):
    small, teacher = pair
    with pytest.raises(TypeError, match="`num_batches` must be an integer"):
        kc.recover(small, teacher, [X], num_batches=1.5)
    with pytest.raises(ValueError, match=r"`ridge` must be in \[0, inf\)"):
        kc.recover(small, teacher, [X], ridge=-1.0)
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model\. Received: a CompactRes"):
        kc.recover(kc.compact(teacher), teacher, [X])
    with pytest.raises(
        ValueError, match=r"`teacher`, the model '.*' \(Subclassed\), has no static"
    ):
        kc.recover(small, Subclassed(), [X])
    with pytest.raises(ValueError, match=r"`model`, .*not built.*keras\.Input\(shape\)"):
        kc.recover(keras.Sequential([layers.Dense(2)]), teacher, [X])
    for model, other in ((teacher, teacher), (small, conv_net()), (teacher, small)):
        with pytest.raises(
            ValueError, match=r"no layer of the model '.*' stands for a layer of the"
        ):
            kc.recover(model, other, [X])
