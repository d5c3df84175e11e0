"""The straight-through wrapper: compressed kernels forward, plain gradients to the latent ones."""

import json

import keras
import numpy as np
import pytest

from keras_compaware import (
    BinaryCodeQuantization,
    Chain,
    Compressed,
    CompressionCallback,
    LowRank,
    MagnitudePruning,
    Ramp,
    Recipe,
    Rule,
    StraightThrough,
    UniformQuantization,
    WeightClustering,
    compact,
)

COMPRESSORS = {
    "pruning": MagnitudePruning(0.5),
    "quantization": UniformQuantization(3),
    "low rank": LowRank(rank=2),
    "pruning, quantization": Chain([MagnitudePruning(0.5), UniformQuantization(4)]),
    "low rank, quantization": Chain([LowRank(rank=2), UniformQuantization(6)]),
}
compressors = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
LAYERS = {
    "dense": (lambda: keras.layers.Dense(5, name="inner"), (7,)),
    "conv": (lambda: keras.layers.Conv2D(4, 3, strides=2, name="inner"), (7, 7, 3)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
# Compiling a training step takes seconds on JAX: every compressor on one layer, some on the other.
TRAINED = [("dense", name) for name in COMPRESSORS] + [("conv", "pruning"), ("conv", "low rank")]
trained = pytest.mark.parametrize(
    ("make", "shape", "compressor"),
    [(*LAYERS[layer], COMPRESSORS[name]) for layer, name in TRAINED],
    ids=[f"{layer}, {name}" for layer, name in TRAINED],
)


def data(shape, number=8, seed=0):
    return np.random.default_rng(seed).normal(size=(number, *shape)).astype("float32")


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def pair(make, shape, compressor):
    """`(wrapper, plain layer whose kernel is C(w))`, both built on the same weights."""
    wrapper, plain = Compressed(make(), compressor), make()
    wrapper(data(shape))
    plain(data(shape))
    wrapper.refresh()
    plain.set_weights(wrapper.layer.get_weights())
    if wrapper.bases:
        (target,) = wrapper.targets
        basis = keras.ops.convert_to_tensor(wrapper.bases[0])
        code = compressor.encode_on(basis, target.read(), target.axes)
        kernel = compressor.decode(code)
    else:
        (target,) = wrapper.targets
        kernel = compressor(target.read(), axes=target.axes)
    plain.kernel.assign(kernel)
    return wrapper, plain


@layers
@compressors
def test_forward_is_the_layer_with_the_compressed_kernel(make, shape, compressor):
    wrapper, plain = pair(make, shape, compressor)
    x = data(shape, seed=1)
    np.testing.assert_array_equal(array(wrapper(x)), array(plain(x)))
    assert not np.array_equal(array(wrapper.layer.kernel), array(plain.kernel))


@trained
def test_gradient_is_the_one_at_the_compressed_kernel(make, shape, compressor):
    """One step of SGD moves the latent kernel by what would move the compressed one."""
    wrapper, plain = pair(make, shape, compressor)
    x = data(shape, seed=1)
    y = data(array(plain(x)).shape[1:], seed=2)
    moves = []
    for layer, inner in ((wrapper, wrapper.layer), (plain, plain)):
        model = keras.Sequential([keras.Input(shape), layer])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        before = [array(inner.kernel), array(inner.bias)]
        model.fit(x, y, batch_size=8, verbose=0)
        moves.append([array(inner.kernel) - before[0], array(inner.bias) - before[1]])
    for ours, theirs in zip(*moves, strict=True):
        assert np.max(np.abs(ours)) > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_low_rank_agrees_with_the_truncated_svd():
    wrapper, plain = pair(*LAYERS["conv"], LowRank(rank=2))
    w = array(wrapper.layer.kernel)
    left, values, right = np.linalg.svd(w.reshape(-1, 4), full_matrices=False)
    expected = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(array(plain.kernel).reshape(-1, 4), expected, atol=1e-5)


def test_low_rank_uses_the_kernel_as_it_is_until_the_basis_is_fitted():
    wrapper = Compressed(keras.layers.Dense(5), LowRank(rank=2))
    x = data((7,))
    y = array(wrapper(x))
    np.testing.assert_array_equal(y, array(wrapper.layer(x)))
    wrapper.refresh()
    assert not np.allclose(array(wrapper(x)), y, atol=1e-3)


@pytest.mark.parametrize("compressor", [UniformQuantization(3), WeightClustering(4)], ids=str)
def test_a_quantizer_without_a_basis_fits_from_nothing(compressor):
    wrapper = Compressed(keras.layers.Dense(6), compressor)
    wrapper(data((7,)))
    (target,) = wrapper.targets

    def forward():
        ((_, kernel),) = wrapper.forward_kernels()
        return array(kernel)

    assert not wrapper.is_fitted
    np.testing.assert_array_equal(forward(), array(compressor(target.read())))
    wrapper.refresh()
    assert wrapper.is_fitted
    basis = keras.ops.convert_to_tensor(wrapper.bases[0])
    target.write(target.read() * 1.1)
    expected = compressor.decode(compressor.encode_on(basis, target.read()))
    np.testing.assert_array_equal(forward(), array(expected))


# ---- training -----------------------------------------------------------------------------------


def train(model, x, y, epochs=2, callbacks=()):
    options = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=list(callbacks), **options)


class BasisLog(keras.callbacks.Callback):
    def __init__(self, wrapper):
        super().__init__()
        self.wrapper, self.seen = wrapper, []

    def on_train_batch_end(self, batch, logs=None):
        _ = self.model  # attaches the state on JAX
        self.seen.append(array(self.wrapper.bases[0]).copy())


class ForwardLog(BasisLog):
    """The latent kernel and the one of the forward pass after each step, beside the basis."""

    def __init__(self, wrapper):
        super().__init__(wrapper)
        self.kernels = []

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        ((target, forward),) = self.wrapper.forward_kernels()
        self.kernels.append((array(target.read()).copy(), array(forward).copy()))


def wrapped_model(compressor, every):
    wrapper = Compressed(keras.layers.Dense(6, name="wide"), compressor, every=every)
    model = keras.Sequential([keras.Input((7,)), wrapper])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    return wrapper, model


def test_the_callback_refreshes_the_basis_every_n_steps():
    wrapper, model = wrapped_model(LowRank(rank=2), every=3)
    log = BasisLog(wrapper)
    callback = CompressionCallback()
    train(model, data((7,), 16), data((6,), 16, 1), callbacks=[callback, log])  # 8 steps
    changed = [
        step
        for step, (before, after) in enumerate(zip(log.seen, log.seen[1:], strict=False), 2)
        if not np.array_equal(before, after)
    ]
    assert changed == [3, 6]
    assert np.any(log.seen[0])  # fitted when training begins


FOLLOWING = pytest.mark.parametrize(
    "compressor",
    [
        WeightClustering(4),
        pytest.param(UniformQuantization(3, axis="outputs"), marks=pytest.mark.once),
        pytest.param(BinaryCodeQuantization(2, fit="alternating"), marks=pytest.mark.once),
        pytest.param(Chain([WeightClustering(4), UniformQuantization(8)]), marks=pytest.mark.once),
    ],
    ids=str,
)


@FOLLOWING
def test_the_basis_of_a_quantizer_follows_its_kernel(compressor):
    wrapper, model = wrapped_model(compressor, every=100)
    log = ForwardLog(wrapper)
    train(model, data((7,), 16), data((6,), 16, 1), callbacks=[CompressionCallback(), log])
    for number in range(1, len(log.seen)):
        before, kernel = log.seen[number - 1], log.kernels[number - 1][0]
        _, following = compressor.follow(*map(keras.ops.convert_to_tensor, (before, kernel)))
        np.testing.assert_allclose(log.seen[number], array(following), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(log.seen[0], log.seen[-1])


@FOLLOWING
def test_only_training_moves_the_basis(compressor):
    wrapper, model = wrapped_model(compressor, every=100)
    wrapper.refresh()
    wrapper.layer.kernel.assign(1.5 * data((7, 6), 1)[0])
    before = array(wrapper.bases[0]).copy()
    model.predict(data((7,), 8), verbose=0)
    model.evaluate(data((7,), 8), data((6,), 8), verbose=0)
    model(data((7,), 8))
    np.testing.assert_array_equal(array(wrapper.bases[0]), before)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX compiles single calls")
def test_calls_outside_of_a_graph_are_compiled_once(monkeypatch):
    calls, follow = [], UniformQuantization.follow

    def counted(self, *args):
        calls.append(self)
        return follow(self, *args)

    monkeypatch.setattr(UniformQuantization, "follow", counted)
    _, model = wrapped_model(UniformQuantization(13), every=100)
    before = len(calls)
    for _ in range(4):
        model(data((7,), 8), training=True)
    assert len(calls) <= before + 1


def test_a_whole_fit_counts_only_if_it_is_clearly_better():
    wrapper, _ = wrapped_model(WeightClustering(4), every=100)
    wrapper.refresh()
    best = array(wrapper.bases[0]).copy()
    near = best + 0.02 * np.ptp(best) * np.array([[1, -1, 1, -1]])
    wrapper.bases[0].assign(near)
    wrapper.refresh()
    np.testing.assert_allclose(array(wrapper.bases[0]), near, rtol=1e-6)
    wrapper.bases[0].assign(best[:, :1] + 1e-3 * np.arange(4))  # all at the lowest values
    wrapper.refresh()
    np.testing.assert_array_equal(array(wrapper.bases[0]), best)


@pytest.mark.parametrize(
    "compressor",
    [
        LowRank(rank=2),
        WeightClustering(4),
        pytest.param(UniformQuantization(3, axis="outputs"), marks=pytest.mark.once),
        pytest.param(BinaryCodeQuantization(2, fit="alternating"), marks=pytest.mark.once),
        pytest.param(Chain([LowRank(rank=2), UniformQuantization(4)]), marks=pytest.mark.once),
    ],
    ids=str,
)
def test_training_ends_with_the_kernel_that_it_has_run_with(compressor):
    wrapper, model = wrapped_model(compressor, every=3)
    log = ForwardLog(wrapper)
    train(model, data((7,), 16), data((6,), 16, 1), callbacks=[CompressionCallback(), log])
    w = array(wrapper.layer.kernel)
    np.testing.assert_allclose(w, log.kernels[-1][1], rtol=1e-5, atol=1e-6)
    assert not np.any(array(wrapper.bases[0]))  # no more needed
    if isinstance(compressor, LowRank):
        assert np.linalg.matrix_rank(w, tol=1e-5) == 2
    if isinstance(compressor, WeightClustering):
        assert len(np.unique(w)) <= 4
    ((_, forward),) = wrapper.forward_kernels()
    np.testing.assert_allclose(array(forward), w, atol=1e-5)


@pytest.mark.parametrize("compressor", [MagnitudePruning(0.5), LowRank(rank=2)], ids=str)
def test_a_blend_goes_from_the_latent_to_the_compressed_kernel(compressor):
    ramp = Ramp(1.0, begin=2, end=9, power=1)
    recipe = Recipe([Rule("inner", StraightThrough(compressor, every=4, alpha=ramp))])
    model = recipe.wrap(
        keras.Sequential([keras.Input((7,)), keras.layers.Dense(5, use_bias=False, name="inner")])
    )
    (wrapper,) = [layer for layer in model.layers if isinstance(layer, Compressed)]
    (target,) = wrapper.targets
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model  # noqa: B018 - on JAX this moves the state into the variables
            alpha = float(array(wrapper.share))
            w = target.read()
            if not compressor.needs_decomposition:
                expected = alpha * array(w) + (1 - alpha) * array(compressor(w))
                (forward,) = wrapper.forward_kernels()
                np.testing.assert_allclose(array(forward[1]), expected, atol=1e-6)
            seen.append(alpha)

    model.compile(keras.optimizers.SGD(0.01), "mse")
    x = data((7,), 48)
    callbacks = recipe.callbacks(model)
    # A list: `Watch` looks after the callback has acted.
    model.fit(x, data((5,), 48), batch_size=4, verbose=0, callbacks=[*callbacks, Watch()])
    expected = [1 - max(0, step - 2) / 7 for step in (0, 6, 9)]
    steps = [expected[(step >= 6) + (step >= 9)] for step in range(1, 13)]
    np.testing.assert_allclose(seen, steps, atol=1e-6)
    np.testing.assert_allclose(array(model(x)), x @ array(wrapper.layer.kernel), atol=1e-5)


def test_alpha_must_be_a_ramp_with_an_end():
    for alpha, error, message in (
        (0.5, TypeError, "`alpha` must be a Ramp or None"),
        (Ramp(1.0), ValueError, "does not know when the final value is reached"),
        (Ramp(2.0, end=5), ValueError, r"`alpha.initial` must be in \[0, 1\]"),
    ):
        with pytest.raises(error, match=message):
            Compressed(keras.layers.Dense(3), MagnitudePruning(0.5), alpha=alpha)


def test_a_second_fit_goes_on_compressed():
    wrapper = Compressed(keras.layers.Dense(6, name="wide"), LowRank(rank=2), every=100)
    model = keras.Sequential([keras.Input((7,)), wrapper])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    log = BasisLog(wrapper)
    for _ in range(2):
        train(model, data((7,), 16), data((6,), 16, 1), 1, [CompressionCallback(), log])
    assert all(np.any(basis) for basis in log.seen)
    assert np.linalg.matrix_rank(array(wrapper.layer.kernel), tol=1e-5) == 2


def test_a_training_that_is_resumed_keeps_its_basis():
    wrapper = Compressed(keras.layers.Dense(6, name="wide"), LowRank(rank=2), every=100)
    model = keras.Sequential([keras.Input((7,)), wrapper])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    wrapper.refresh()
    before = array(wrapper.bases[0]).copy()
    wrapper.layer.kernel.assign(data((7, 6), 1)[0])
    log = BasisLog(wrapper)
    train(model, data((7,), 8), data((6,), 8, 1), 1, [CompressionCallback(), log])
    np.testing.assert_array_equal(log.seen[0], before)


@trained
def test_training_by_a_recipe_ends_compressed(make, shape, compressor):
    model = keras.Sequential([keras.Input(shape), make(), keras.layers.Flatten()])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    recipe = Recipe([Rule("inner", StraightThrough(compressor, every=2))])
    model = recipe.wrap(model)
    before = array(model.layers[0].layer.kernel)
    x = data(shape, 16)
    train(model, x, data(model.output_shape[1:], 16, 1), 1, recipe.callbacks(model))
    wrapper = model.layers[0]
    w = array(wrapper.layer.kernel)
    assert not np.array_equal(w, before)
    (target,) = wrapper.targets
    ((_, forward),) = wrapper.forward_kernels()
    np.testing.assert_allclose(array(forward), w, atol=1e-6)
    if not isinstance(compressor, Chain):  # of factors that are quantized the SVD gives others
        np.testing.assert_allclose(array(compressor(w, axes=target.axes)), w, atol=1e-5)
    plain = compact(model)
    assert not any(isinstance(layer, Compressed) for layer in plain.model.layers)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(plain.model.predict(x, verbose=0), expected, atol=2e-6)


def test_batch_normalisation_inside_a_wrapped_sequential():
    def block():
        return keras.Sequential(
            [
                keras.layers.Conv2D(4, 3, name="conv", use_bias=False),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.ReLU(),
                keras.layers.Flatten(),
            ],
            name="block",
        )

    x, compressor = data((5, 5, 2), 16), UniformQuantization(4)
    wrapper, plain = Compressed(block(), compressor), block()
    models = [keras.Sequential([keras.Input((5, 5, 2)), layer]) for layer in (wrapper, plain)]
    plain.set_weights(wrapper.layer.get_weights())
    (target,) = wrapper.targets
    assert target.name == "conv/kernel"
    plain.layers[0].kernel.assign(compressor(target.read(), axes=target.axes))
    for model in models:
        model.compile(keras.optimizers.SGD(0.0), "mse")
        train(model, x, np.zeros((16, 36)))
    ours, theirs = wrapper.layer.layers[1], plain.layers[1]
    assert np.max(np.abs(array(ours.moving_mean))) > 1e-3
    np.testing.assert_allclose(array(ours.moving_mean), array(theirs.moving_mean), atol=1e-6)
    np.testing.assert_allclose(
        array(ours.moving_variance), array(theirs.moving_variance), atol=1e-6
    )
    np.testing.assert_allclose(
        models[0].predict(x, verbose=0), models[1].predict(x, verbose=0), atol=1e-6
    )


def test_regularizers_count_once():
    def make():
        return keras.layers.Dense(
            5,
            activity_regularizer=keras.regularizers.L2(0.1),
            kernel_regularizer="l1",
            name="inner",
        )

    wrapper, plain = pair(make, (7,), UniformQuantization(4))
    x, y = data((7,)), data((5,), seed=1)
    model = keras.Sequential([keras.Input((7,)), wrapper])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    outputs = array(plain(x))
    expected = (
        np.mean((outputs - y) ** 2)
        + 0.1 * np.sum(outputs**2) / 8
        + 0.01 * np.sum(np.abs(array(wrapper.layer.kernel)))  # of the latent kernel
    )
    loss = model.fit(x, y, batch_size=8, verbose=0).history["loss"][0]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.tensorflow
@compressors
def test_xla(compressor):
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(1)
        wrapper = Compressed(keras.layers.Dense(5, name="inner"), compressor, every=2)
        model = keras.Sequential([keras.Input((7,)), wrapper])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        train(model, data((7,), 16), data((5,), 16, 1), 1, [CompressionCallback()])
        results.append(array(wrapper.layer.kernel))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_layer_frozen_later_keeps_its_latent_kernel():
    wrapper = Compressed(keras.layers.Dense(5), MagnitudePruning(0.5))
    model = keras.Sequential([keras.Input((7,)), wrapper])
    before = array(wrapper.layer.kernel)
    model.trainable = False
    model.compile("sgd", "mse")
    model.predict(data((7,)), verbose=0)
    model.evaluate(data((7,)), data((5,)), verbose=0)
    np.testing.assert_array_equal(array(wrapper.layer.kernel), before)
    forward = array(wrapper(data((7,))))
    plain = keras.layers.Dense(5)
    plain.build((None, 7))
    plain.kernel.assign(MagnitudePruning(0.5)(before))
    np.testing.assert_array_equal(forward, array(plain(data((7,)))))


def test_mixed_precision():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [
                keras.Input((7,)),
                Compressed(keras.layers.Dense(6, name="inner"), UniformQuantization(4)),
                keras.layers.BatchNormalization(),
                Compressed(keras.layers.Dense(5, name="second"), LowRank(rank=2), every=2),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        before = array(model.layers[0].layer.kernel)
        train(model, data((7,), 16), data((5,), 16, 1), 1, [CompressionCallback()])
        after = array(model.layers[0].layer.kernel)
        assert after.dtype == np.float32
        assert not np.array_equal(before, after)
        assert len(np.unique(after)) <= 15
        small = compact(model).model
        x = data((7,))
        np.testing.assert_allclose(
            small.predict(x, verbose=0), model.predict(x, verbose=0), atol=0.1, rtol=0.02
        )
    finally:
        keras.config.set_dtype_policy(previous)


# ---- in every kind of model ---------------------------------------------------------------------


@keras.saving.register_keras_serializable("compressed_test")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = Compressed(keras.layers.Dense(6, name="hidden"), LowRank(rank=2), every=2)
        self.head = Compressed(keras.layers.Dense(3, name="head"), UniformQuantization(4))

    def call(self, x):
        return self.head(keras.ops.relu(self.hidden(x)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((7,)),
            Compressed(keras.layers.Dense(6, "relu", name="hidden"), LowRank(rank=2), every=2),
            Compressed(keras.layers.Dense(3, name="head"), UniformQuantization(4)),
        ]
    )


def functional():
    inputs = keras.Input((7,))
    shared = Compressed(keras.layers.Dense(7, "relu", name="hidden"), LowRank(rank=2), every=2)
    head = Compressed(keras.layers.Dense(3, name="head"), UniformQuantization(4))
    return keras.Model(inputs, head(shared(shared(inputs))))


models = pytest.mark.parametrize("make", [sequential, functional, Net])


@models
def test_save_and_go_on_training(make, tmp_path):
    x, y = data((7,), 16), data((3,), 16, 1)
    model = make()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    train(model, x, y, 1, [CompressionCallback()])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for one in (model, loaded):
        train(one, x, y, 1, [CompressionCallback()])
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("make", [sequential, Net])
def test_weights_file(make, tmp_path):
    x = data((7,), 4)
    model, other = make(), make()
    for one in (model, other):
        one(x)
    model.compile("sgd", "mse")
    train(model, x, data((3,), 4, 1), 1, [CompressionCallback()])
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("make", [sequential, functional])
def test_clone_model(make):
    model = make()
    clone = keras.models.clone_model(model)
    assert [type(layer) for layer in clone.layers] == [type(layer) for layer in model.layers]
    clone.set_weights(model.get_weights())
    x = data((7,))
    np.testing.assert_array_equal(array(clone(x)), array(model(x)))


@models
def test_is_found_in_every_kind_of_model(make):
    model = make()
    model.compile("sgd", "mse")
    callback = CompressionCallback()
    train(model, data((7,), 16), data((3,), 16, 1), 1, [callback])
    assert [firing.step for firing in callback.firings] == [2, 4, 4]
    final = callback.firings[-1]
    assert final.final
    assert sorted(final.distortion) == ["head/kernel", "hidden/kernel"]


def test_a_sequential_model_without_an_input_shape():
    model = keras.Sequential(
        [Compressed(keras.layers.Dense(6), MagnitudePruning(0.5)), keras.layers.Dense(3)]
    )
    model.compile("sgd", "mse")
    train(model, data((7,), 16), data((3,), 16, 1), 1, [CompressionCallback()])
    assert np.sum(array(model.layers[0].layer.kernel) == 0) == 21


def test_a_layer_that_is_built_already():
    dense = keras.layers.Dense(6)
    dense.build((None, 7))
    wrapper = Compressed(dense, LowRank(rank=2))
    assert wrapper.bases[0].shape == (1, 6, 2)
    assert wrapper(data((7,))).shape == (8, 6)


def test_masks_and_sequences():
    embedding = keras.layers.Embedding(9, 5, mask_zero=True)
    wrapped = Compressed(embedding, UniformQuantization(4))
    model = keras.Sequential([keras.Input((4,), dtype="int32"), wrapped, keras.layers.LSTM(3)])
    one = array(model(np.array([[3, 5, 0, 0]])))
    short = array(model.layers[1](array(model.layers[0](np.array([[3, 5]])))))
    np.testing.assert_allclose(one, short, atol=1e-6)


def test_inside_a_wrapper_of_keras():
    inner = Compressed(keras.layers.Dense(3, name="inner"), LowRank(rank=1))
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.TimeDistributed(inner)])
    assert model.output_shape == (None, 4, 3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    train(model, data((4, 5)), data((4, 3), seed=1), 1, [CompressionCallback()])
    assert np.linalg.matrix_rank(array(inner.layer.kernel), tol=1e-5) == 1


def test_build():
    wrapper = Compressed(keras.layers.Dense(6), LowRank(rank=2))
    wrapper.build((None, 7))
    assert wrapper.bases[0].shape == (1, 6, 2)
    assert wrapper.compute_output_shape((None, 7)) == (None, 6)


def test_attention_has_several_kernels():
    inputs = keras.Input((4, 8))
    attention = Compressed(keras.layers.MultiHeadAttention(2, 4, name="mha"), MagnitudePruning(0.5))
    model = keras.Model(inputs, attention(inputs, inputs))
    assert len(attention.targets) == 4
    model.compile("sgd", "mse")
    x = data((4, 8))
    train(model, x, x, 1, [CompressionCallback()])
    for target in attention.targets:
        assert np.sum(array(target.read()) == 0) == target.num_parameters // 2


# ---- configuration and errors -------------------------------------------------------------------


@compressors
def test_config(compressor):
    ramp = Ramp(1.0, end=9)
    wrapper = Compressed(keras.layers.Dense(5, name="inner"), compressor, every=7, alpha=ramp)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(wrapper)))
    restored = keras.saving.deserialize_keras_object(config)
    assert (restored.name, restored.every, restored.alpha) == ("inner", 7, ramp)
    assert restored.compressor == compressor
    assert restored.layer.units == 5


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Compressed(keras.layers.Dense(3), "prune"), TypeError, "must be a Compressor"),
        (
            lambda: Compressed(keras.layers.Dense(3), LowRank(rank=1), every=0),
            ValueError,
            "`every`",
        ),
        (
            lambda: Compressed(keras.layers.Dense(3), LowRank(energy=0.9)),
            ValueError,
            "Give a rank or a ratio",
        ),
        (
            lambda: Compressed(
                keras.layers.Dense(3), Chain([MagnitudePruning(0.5), LowRank(rank=1)])
            ),
            ValueError,
            "Put it first in the Chain",
        ),
        (
            lambda: Compressed(keras.layers.ReLU(), MagnitudePruning(0.5))(np.ones((2, 3))),
            ValueError,
            "has no kernel that",
        ),
        (
            lambda: Compressed(keras.layers.Dense(2), LowRank(rank=3))(np.ones((2, 5))),
            ValueError,
            "above the largest possible rank 2",
        ),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()
