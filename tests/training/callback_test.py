"""When the callback fires, and that what it writes is what training goes on with."""

import json
from unittest import mock

import keras
import numpy as np
import pytest

from keras_compaware import (
    AtEnd,
    CompressionCallback,
    Every,
    GroupLasso,
    LowRank,
    MagnitudePruning,
    OccasionalCompression,
    Penalty,
    Proximal,
    Ramp,
    Recipe,
    Rule,
    StraightThrough,
    UniformQuantization,
    WeightClustering,
    WeightDecay,
    WeightNoise,
    find_targets,
)
from keras_compaware.training.firing import apply, constrained

BACKEND = keras.backend.backend()
BATCH, BATCHES = 4, 7  # 26 examples: the last batch of an epoch has two
several_steps = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras refuses steps_per_execution > 1 on PyTorch"
)


def examples(number=26, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(number, 6)).astype("float32")
    return x, generator.normal(size=(number, 3)).astype("float32")


def linear(optimizer=None, seed=1, **compiled):
    """One Dense layer: small enough to be trained in NumPy as well."""
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    layer.kernel.assign(np.random.default_rng(seed).normal(size=(6, 3)))
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", **compiled)
    return model


def kernel(model):
    return keras.ops.convert_to_numpy(model.layers[0].kernel)


def fit(model, callbacks, epochs=3, data=None, **arguments):
    x, y = data or examples()
    options = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=callbacks, **{**options, **arguments})


def prune(w, sparsity=0.5):
    """Magnitude pruning by sorting (no ties in these tests)."""
    kept = w.size - round(sparsity * w.size)
    threshold = np.sort(np.abs(w), axis=None)[-kept]
    return np.where(np.abs(w) >= threshold, w, 0.0)


def gradient(w, x, y):
    return 2.0 / y.size * x.T @ (x @ w - y)


def descend(w, firing_steps, epochs=3, accumulation=1, rate=0.1, change=prune, begin=0, final=True):
    """The same training by hand: the kernel is changed after the optimizer steps listed."""
    x, y = examples()
    w, done, gradients = w.astype("float64"), begin, []
    for _ in range(epochs):
        for start in range(0, len(x), BATCH):
            gradients.append(gradient(w, x[start : start + BATCH], y[start : start + BATCH]))
            if len(gradients) == accumulation:
                w, done = w - rate * sum(gradients) / accumulation, done + 1
                gradients = []
                if done in firing_steps:
                    w = change(w)
    return change(w) if final else w


def steps_of(callback):
    return [firing.step for firing in callback.firings if not firing.final]


def num_zeros(w):
    return int(np.sum(w == 0))


@pytest.mark.parametrize("every", [1, 3, 7, 10, 100])
def test_fires_after_every_nth_optimizer_step(every):
    model = linear()
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), every, where="only")
    fit(model, [callback])
    expected = list(range(every, 22, every))
    assert steps_of(callback) == expected
    assert [firing.step for firing in callback.firings if firing.final] == [21]
    np.testing.assert_allclose(kernel(model), descend(before, expected), atol=1e-5)
    assert num_zeros(kernel(model)) == 9


def together(model, recipe):
    """Names of the targets that each call of a firing rewrites, and the callback."""
    from keras_compaware.training import callback as module

    calls = []

    def recorded(rewrites, step=0):
        calls.append([rewrite.target.name.split("/")[0] for rewrite in rewrites])
        return apply(rewrites, step)

    callbacks = recipe.callbacks(model)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
    with mock.patch.object(module, "apply", recorded):
        model.fit(x, x[:, :2], batch_size=8, verbose=0, shuffle=False, callbacks=callbacks)
    return calls


def three_layers():
    layers = [keras.layers.Dense(n, name=name) for n, name in ((5, "a"), (4, "b"), (2, "c"))]
    return keras.Sequential([keras.Input((6,)), *layers])


@pytest.mark.tensorflow
def test_small_kernels_that_fire_together_are_rewritten_by_one_call():
    pruning = MagnitudePruning(0.5)
    everywhere = Recipe([Rule("", Every(2, pruning))])
    assert together(three_layers(), everywhere) == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    apart = Recipe([Rule("a|b", Every(2, pruning)), Rule("c", Every(1, pruning))])
    assert together(three_layers(), apart)[:4] == [["c"], ["a", "b"], ["c"], ["c"]]


@pytest.mark.tensorflow
def test_one_call_does_what_several_do(monkeypatch):
    from keras_compaware.training import firing

    models = three_layers(), three_layers()
    models[1].set_weights(models[0].get_weights())
    recipe = Recipe([Rule("", Every(1, LowRank(rank=1)))])
    assert ["a", "b", "c"] in together(models[0], recipe)
    monkeypatch.setattr(firing, "_TOGETHER", 0)
    assert ["a", "b", "c"] not in together(models[1], recipe)
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_a_firing_training_is_untouched():
    model, plain = linear(), linear()
    fit(plain, [])
    recipe = Recipe([Rule("only", Every(1000, keras.constraints.MaxNorm(0.1)))])
    callbacks = recipe.callbacks(model)
    fit(model, callbacks)
    np.testing.assert_array_equal(kernel(model), kernel(plain))
    assert callbacks[0].firings == []


@several_steps
@pytest.mark.parametrize("every", [1, 3, 5, 9])
def test_several_steps_per_execution_fire_once_per_chunk(every):
    model = linear(steps_per_execution=4)
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), every, where="only")
    fit(model, [callback])
    ends = [4, 7, 11, 14, 18, 21]  # chunks of 4 and 3 batches
    expected = [
        end for start, end in zip([0, *ends], ends, strict=False) if end // every > start // every
    ]
    assert steps_of(callback) == expected
    np.testing.assert_allclose(kernel(model), descend(before, expected), atol=1e-5)


@pytest.mark.parametrize("every", [2, 3])
def test_gradient_accumulation_counts_updates(every):
    model = linear(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), every, where="only")
    fit(model, [callback])  # 21 batches: 10 updates and half of one, across the epochs
    expected = list(range(every, 11, every))
    assert steps_of(callback) == expected
    np.testing.assert_allclose(kernel(model), descend(before, expected, accumulation=2), atol=1e-5)


def test_initial_epoch_and_a_second_fit_go_on_counting():
    model = linear()
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), 5, where="only")
    fit(model, [callback], epochs=1)
    fit(model, [callback], epochs=3, initial_epoch=1)
    assert steps_of(callback) == [5, 10, 15, 20]
    halfway = descend(before, [5], epochs=1)
    np.testing.assert_allclose(
        kernel(model), descend(halfway, [10, 15, 20], epochs=2, begin=7), atol=1e-5
    )


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (4, None, [7, 10, 13, 16, 19]),
        (0, 9, [3, 6, 9]),
        (5, 12, [8, 11, 12]),  # at the end of the window in any case
        (21, None, []),
        (0, 2, [2]),
    ],
)
def test_window(begin, end, expected):
    model = linear()
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), 3, begin, end, where="only")
    fit(model, [callback])
    assert steps_of(callback) == expected
    np.testing.assert_allclose(kernel(model), descend(before, expected), atol=1e-5)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_callback_without_a_list_gives_the_same(every):
    """Keras then runs the hooks at the end of a batch on other threads (JAX, PyTorch)."""
    results = []
    for wrap in (lambda callback: callback, lambda callback: [callback]):
        model = linear()
        callback = OccasionalCompression(MagnitudePruning(0.5), every, where="only")
        fit(model, wrap(callback), validation_data=examples(seed=5))
        results.append((steps_of(callback), kernel(model)))
    assert results[0][0] == results[1][0] == list(range(every, 22, every))
    np.testing.assert_array_equal(results[0][1], results[1][1])


@several_steps
def test_a_callback_without_a_list_and_several_steps_per_execution():
    model = linear(steps_per_execution=4)
    callback = OccasionalCompression(MagnitudePruning(0.5), 7, where="only")
    fit(model, callback)
    assert steps_of(callback) == [7, 14, 21]


def test_validation_sees_the_compressed_weights():
    """A firing due at the end of an epoch comes before its validation."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(num_zeros(kernel(self.model)))

    for callbacks in ([OccasionalCompression(MagnitudePruning(0.5), 7, where="only"), Look()],):
        fit(linear(), callbacks, epochs=2, validation_data=examples())
    assert seen == [9, 9]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = linear()
        callback = OccasionalCompression(MagnitudePruning(0.5), 4, where="only")
        fit(model, [callback])
    finally:
        keras.config.set_dtype_policy(previous)
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    # Steps whose scaled gradients overflow are no optimizer steps.
    last = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    assert last >= 18
    assert steps_of(callback) == list(range(4, last + 1, 4))
    assert num_zeros(kernel(model)) == 9
    assert kernel(model).dtype == np.float32


@pytest.mark.tensorflow
def test_xla_compiled_step():
    model = linear(jit_compile=True)
    before = kernel(model)
    callback = OccasionalCompression(LowRank(rank=1), 5, where="only")
    fit(model, [callback])
    assert steps_of(callback) == [5, 10, 15, 20]

    def first_direction(w):
        left, values, right = np.linalg.svd(w)
        return values[0] * np.outer(left[:, 0], right[0])

    expected = descend(before, [5, 10, 15, 20], change=first_direction)
    np.testing.assert_allclose(kernel(model), expected, atol=1e-4)


def test_equals_a_loop_of_train_on_batch_with_momentum():
    """The optimizer's own state goes on as if nothing had happened."""

    def network():
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="relu", name="hidden"),
                keras.layers.Dense(3, name="head"),
            ]
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    x, y = examples()
    by_callback, by_hand = network(), network()
    fit(by_callback, [OccasionalCompression(MagnitudePruning(0.75), 4)])
    hidden = by_hand.layers[0]
    step = 0
    for _ in range(3):
        for start in range(0, len(x), BATCH):
            by_hand.train_on_batch(x[start : start + BATCH], y[start : start + BATCH])
            step += 1
            if step % 4 == 0:
                hidden.kernel.assign(prune(keras.ops.convert_to_numpy(hidden.kernel), 0.75))
    hidden.kernel.assign(prune(keras.ops.convert_to_numpy(hidden.kernel), 0.75))
    for ours, theirs in zip(by_callback.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX keeps the weights outside the model")
def test_idle_steps_do_not_touch_the_model_on_jax():
    counts = []

    class Counting(keras.Sequential):
        def jax_state_sync(self):
            counts[-1] += 1
            super().jax_state_sync()

    x, y = examples(160)
    for every in (1000, 10):
        model = Counting([keras.Input((6,)), keras.layers.Dense(3, name="only")])
        model.compile("sgd", "mse")
        counts.append(0)
        callback = OccasionalCompression(MagnitudePruning(0.5), every, where="only")
        fit(model, [callback], epochs=2, data=(x, y))
    assert counts[0] < 20  # of 80 steps
    assert counts[1] == counts[0] + 8  # one for each firing


def test_a_constraint_of_keras():
    model = linear()
    callback = OccasionalCompression(keras.constraints.NonNeg(), 7, where="only")
    fit(model, [callback])
    assert steps_of(callback) == [7, 14, 21]
    assert np.all(kernel(model) >= 0)


def test_ramp_drives_the_sparsity():
    model = linear()
    zeros = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            zeros.append(num_zeros(kernel(self.model)))

    ramp = Ramp(0.0, 0, 12, power=1.0)
    callback = OccasionalCompression(MagnitudePruning(0.5), 4, where="only", ramp=ramp)
    fit(model, [callback, Look()])
    assert [zeros[i] for i in (3, 7, 11, 15, 19)] == [3, 6, 9, 9, 9]
    assert num_zeros(kernel(model)) == 9


def test_distortion_is_recorded():
    model = linear(keras.optimizers.SGD(0.0))
    before = kernel(model)
    callback = OccasionalCompression(MagnitudePruning(0.5), 20, where="only")
    fit(model, [callback])
    expected = np.linalg.norm(prune(before) - before) / np.linalg.norm(before)
    assert callback.firings[0].distortion == {"only/kernel": pytest.approx(expected, rel=1e-5)}
    assert callback.firings[1].distortion == {"only/kernel": 0.0}
    assert callback.firings[0].seconds > 0


def test_weight_averaging_still_ends_compressed():
    model = linear(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9))
    fit(model, [OccasionalCompression(MagnitudePruning(0.5), 3, where="only")])
    assert num_zeros(kernel(model)) == 9


def test_swap_ema_weights_still_ends_compressed():
    model = linear(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9))
    callbacks = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        OccasionalCompression(MagnitudePruning(0.5), 3, where="only"),
    ]
    fit(model, callbacks, validation_data=examples())
    assert num_zeros(kernel(model)) == 9


# ---- other callbacks ----------------------------------------------------------------------------


def ours(every=7, **arguments):
    return OccasionalCompression(MagnitudePruning(0.5), every, where="only", **arguments)


def stopping():
    return keras.callbacks.EarlyStopping("loss", restore_best_weights=True)


def test_early_stopping_after_ours_raises():
    with pytest.raises(
        ValueError, match=r"callbacks=\[EarlyStopping\(...\), OccasionalCompression"
    ):
        fit(linear(), [ours(), stopping()])


@pytest.mark.parametrize("every", [7, 3])
def test_early_stopping_before_ours_ends_compressed(every):
    model = linear(keras.optimizers.SGD(1.5))  # diverges: the best epoch is not the last
    history = fit(model, [stopping(), ours(every)], epochs=10)
    assert len(history.history["loss"]) < 10
    assert num_zeros(kernel(model)) == 9


def test_early_stopping_that_restores_nothing_may_follow():
    fit(linear(), [ours(), keras.callbacks.EarlyStopping("loss")])


def checkpoint(folder, **arguments):
    path = str(folder / "best.keras")
    return keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=True, **arguments)


def test_best_checkpoint_is_compressed(tmp_path):
    fit(linear(), [ours(7), checkpoint(tmp_path)])
    assert num_zeros(kernel(keras.models.load_model(tmp_path / "best.keras"))) == 9


@pytest.mark.parametrize(
    "callback",
    [ours(3), ours(7, begin=7), ours(7, end=14), ours(7, ramp=Ramp(0.0, 0, 7))],
    ids=["not dividing", "begin", "end", "ramp"],
)
def test_best_checkpoint_that_may_be_uncompressed_raises(tmp_path, callback):
    with pytest.raises(ValueError, match=r"save_best_only=True.*an epoch has 7 batches"):
        fit(linear(), [callback, checkpoint(tmp_path)])


def test_best_checkpoint_raises_in_the_wrong_order_and_by_batches(tmp_path):
    with pytest.raises(ValueError, match="the checkpoint after OccasionalCompression"):
        fit(linear(), [checkpoint(tmp_path), ours(7)])
    with pytest.raises(ValueError, match="save_best_only"):
        fit(linear(), [ours(7), checkpoint(tmp_path, save_freq=5)])


def test_best_checkpoint_raises_for_a_compression_at_the_end(tmp_path):
    model = linear()
    callbacks = Recipe([Rule("only", AtEnd(MagnitudePruning(0.5)))]).callbacks(model)
    with pytest.raises(ValueError, match="AtEnd"):
        fit(model, [*callbacks, checkpoint(tmp_path)])


def test_best_checkpoint_counts_updates_of_an_accumulation(tmp_path):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    data = examples(32)  # 8 batches, 4 updates
    fit(linear(optimizer), [ours(4), checkpoint(tmp_path)], data=data)
    assert num_zeros(kernel(keras.models.load_model(tmp_path / "best.keras"))) == 9
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="save_best_only"):
        fit(linear(optimizer), [ours(8), checkpoint(tmp_path)], data=data)


def test_best_checkpoint_without_final_compression_is_free(tmp_path):
    model = linear()
    callbacks = Recipe([Rule("only", Proximal(GroupLasso(1e-3)))]).callbacks(model)
    fit(model, [*callbacks, stopping(), checkpoint(tmp_path)])


def test_best_checkpoint_of_a_wrapped_layer_is_free(tmp_path):
    recipe = Recipe([Rule("only", StraightThrough(UniformQuantization(4)))])
    model = recipe.wrap(linear())
    fit(model, [*recipe.callbacks(model), checkpoint(tmp_path)])


@pytest.mark.parametrize("ours_first", [True, False])
def test_backup_and_restore_resumes_the_count(tmp_path, ours_first):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("crash")

    def optimizer():
        return keras.optimizers.SGD(0.1, momentum=0.9)

    uninterrupted = linear(optimizer())
    fit(uninterrupted, [ours(5)], epochs=4)

    def callbacks(callback):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        return [callback, backup] if ours_first else [backup, callback]

    with pytest.raises(RuntimeError, match="crash"):
        fit(linear(optimizer()), [*callbacks(ours(5)), Crash()], epochs=4)
    model, callback = linear(optimizer(), seed=9), ours(5)
    fit(model, callbacks(callback), epochs=4)
    assert steps_of(callback) == [15, 20, 25]
    np.testing.assert_allclose(kernel(model), kernel(uninterrupted), atol=1e-6)


# ---- state --------------------------------------------------------------------------------------


def with_spectrum(model, values):
    left = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    right = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    model.layers[0].kernel.assign(left[:, :3] @ np.diag(values) @ right)
    return model


def rank(w):
    return np.linalg.matrix_rank(w, tol=1e-4)


def test_energy_keeps_the_rank_of_the_first_firing():
    model = with_spectrum(linear(), [2.0, 1.0, 0.01])  # energies .8, .2, 0
    callback = OccasionalCompression(LowRank(energy=0.9), 1, where="only")
    model.optimizer.learning_rate = 0.0
    fit(model, [callback], epochs=1)
    assert rank(kernel(model)) == 2
    with_spectrum(model, [2.0, 0.2, 0.1])  # now one direction would do
    fit(model, [callback], epochs=1)
    assert rank(kernel(model)) == 2


def test_state_survives_a_resume():
    model = with_spectrum(linear(keras.optimizers.SGD(0.0)), [2.0, 1.0, 0.01])
    callback = OccasionalCompression(LowRank(energy=0.9), 3, where="only")
    fit(model, [callback], epochs=1)
    state = json.loads(json.dumps(callback.get_state()))

    resumed = OccasionalCompression(LowRank(energy=0.9), 3, where="only")
    resumed.set_state(state)
    again = with_spectrum(linear(keras.optimizers.SGD(0.0)), [2.0, 0.2, 0.1])
    fit(again, [resumed], epochs=1)
    assert rank(kernel(again)) == 2
    assert resumed.get_state() == callback.get_state()


def test_another_model_settles_anew():
    callback = OccasionalCompression(LowRank(energy=0.9), 3, where="only")
    fit(with_spectrum(linear(keras.optimizers.SGD(0.0)), [2.0, 1.0, 0.01]), [callback], epochs=1)
    other = with_spectrum(linear(keras.optimizers.SGD(0.0)), [2.0, 0.2, 0.1])
    fit(other, [callback], epochs=1)
    assert rank(kernel(other)) == 1


# ---- errors -------------------------------------------------------------------------------------


def test_nan_stops_training_and_names_the_kernel():
    x, y = examples()
    x[9, 2] = np.nan  # in the third batch
    model = linear()
    callback = OccasionalCompression(MagnitudePruning(0.5), 2, where="only")
    with pytest.raises(FloatingPointError, match="'only/kernel' hold NaN or infinity"):
        fit(model, [callback], data=(x, y))
    assert steps_of(callback) == [2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "compressor", [MagnitudePruning(0.5), UniformQuantization(4), keras.constraints.NonNeg()]
)
def test_weights_that_are_not_finite_are_left_alone(bad, compressor):
    model = linear()
    w = kernel(model).copy()
    w[2, 1] = bad
    model.layers[0].kernel.assign(w)
    (target,), _ = find_targets(model)
    with pytest.raises(FloatingPointError, match="only/kernel"):
        apply([constrained(target, compressor)])
    np.testing.assert_array_equal(kernel(model), w)


def test_targets_of_another_model_raise():
    callbacks = Recipe([Rule("only", Every(2, MagnitudePruning(0.5)))]).callbacks(linear())
    with pytest.raises(ValueError, match="'only/kernel' does not belong to the model"):
        fit(linear(), callbacks)


def test_nothing_to_compress_raises():
    with pytest.raises(ValueError, match=r"nothing to compress(.|\n)*rank 3 saves nothing"):
        fit(linear(), [OccasionalCompression(LowRank(rank=3), 2, where="only")])


def test_a_subclassed_model_that_is_built_by_fit():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(8, name="hidden")
            self.head = keras.layers.Dense(3, name="head")

        def call(self, x):
            return self.head(self.hidden(x))

    model = Net()
    model.compile("sgd", "mse")
    callback = OccasionalCompression(MagnitudePruning(0.5), 3, where="hidden")
    fit(model, [callback], epochs=1)
    assert steps_of(callback) == [3, 6]
    assert num_zeros(keras.ops.convert_to_numpy(model.hidden.kernel)) == 24
    assert num_zeros(keras.ops.convert_to_numpy(model.head.kernel)) == 0

    by_default = OccasionalCompression(MagnitudePruning(0.5), 3)
    with pytest.raises(ValueError, match=r"is not known which these are.*where="):
        fit(model, [by_default], epochs=1)


def test_a_sequential_model_that_is_built_by_fit():
    model = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    callback = OccasionalCompression(MagnitudePruning(0.5), 3)
    fit(model, callback, epochs=1)
    assert steps_of(callback) == [3, 6]
    assert [num_zeros(keras.ops.convert_to_numpy(v.kernel)) for v in model.layers] == [24, 0]


def test_a_fit_without_a_step():
    model = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    fit(model, [OccasionalCompression(MagnitudePruning(0.5), 3)], initial_epoch=3)
    model, callback = linear(), ours()
    fit(model, [callback], initial_epoch=3)
    assert num_zeros(kernel(model)) == 9


def test_a_model_that_is_built_by_fit_is_checked_as_well():
    model = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Expected order"):
        fit(model, [OccasionalCompression(MagnitudePruning(0.5), 3), stopping()])


# ---- custom loops -------------------------------------------------------------------------------


def test_custom_loop():
    model = linear()
    layer = model.layers[0]
    expected = descend(kernel(model), [3, 6], epochs=1)
    callback = OccasionalCompression(MagnitudePruning(0.5), 3, where="only")
    x, y = examples()
    for n, start in enumerate(range(0, len(x), BATCH), 1):
        w = kernel(model)
        step = gradient(w, x[start : start + BATCH], y[start : start + BATCH])
        layer.kernel.assign(w - 0.1 * step)
        callback.step(model, n)
    callback.finish(model)
    assert steps_of(callback) == [3, 6]
    assert callback.firings[-1].final
    assert callback.firings[-1].step == 7
    np.testing.assert_allclose(kernel(model), expected, atol=1e-5)


def test_finish_alone_compresses():
    model = linear()
    before = kernel(model)
    OccasionalCompression(MagnitudePruning(0.5), 3, where="only").finish(model)
    np.testing.assert_array_equal(kernel(model), prune(before))


def test_several_rules_act_in_one_firing():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.Dense(8, name="second"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile("sgd", "mse")
    recipe = Recipe(
        [
            Rule("first", Every(2, MagnitudePruning(0.5))),
            Rule("second", Every(3, MagnitudePruning(0.25))),
        ]
    )
    (callback,) = recipe.callbacks(model)
    assert isinstance(callback, CompressionCallback)
    fit(model, [callback], epochs=1)
    fired = {f.step: sorted(f.distortion) for f in callback.firings if not f.final}
    assert fired == {
        2: ["first/kernel"],
        3: ["second/kernel"],
        4: ["first/kernel"],
        6: ["first/kernel", "second/kernel"],
    }
    zeros = [num_zeros(keras.ops.convert_to_numpy(layer.kernel)) for layer in model.layers]
    assert zeros == [24, 16, 0]


def test_at_end_compresses_the_payload_of_what_came_before():
    model = linear()
    rule = Rule("only", Every(3, MagnitudePruning(0.5)), AtEnd(UniformQuantization(3)))
    fit(model, Recipe([rule]).callbacks(model))
    w = kernel(model)
    assert num_zeros(w) >= 9
    assert len(np.unique(np.abs(w))) <= 4
    assert len(np.unique(w)) > 2


def test_penalty_needs_no_callback_but_is_checked():
    recipe = Recipe([Rule("only", Penalty(GroupLasso(1e-2)))])
    with pytest.raises(ValueError, match=r"has Penalty.*recipe\.wrap\(model\)"):
        recipe.callbacks(linear())
    model = recipe.wrap(linear())
    fit(model, recipe.callbacks(model), epochs=1)


# ---- fits that go on, and noise -----------------------------------------------------------------


def test_iterative_fits_start_from_the_last_code_of_the_epoch(monkeypatch):
    from keras_compaware.training import callback as module

    fits, encoded = [], module.encoded
    model = linear()

    def recorded(target, compressor, previous):
        step = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        fits.append((step, previous is not None))
        return encoded(target, compressor, previous)

    monkeypatch.setattr(module, "encoded", recorded)
    clustering = WeightClustering(4)
    fit(model, [OccasionalCompression(clustering, every=3, where="only")], epochs=2)
    # 7 steps each: a new epoch starts anew, the end of training goes on
    assert fits == [(3, False), (6, True), (9, False), (12, True), (14, True)]
    assert len(np.unique(kernel(model))) <= 4


def noisy(seed=0, **arguments):
    model = linear(keras.optimizers.SGD(0.0))
    before = kernel(model)
    noise = OccasionalCompression(WeightNoise(0.1, seed=seed), every=7, where="only", **arguments)
    fit(model, [noise], epochs=2)
    return kernel(model) - before


def test_noise_is_that_of_the_seed_the_step_and_the_target():
    both, first = noisy(), noisy(end=7)
    np.testing.assert_array_equal(both, noisy())
    assert not np.allclose(both, 2 * first)  # the second firing draws anew
    np.testing.assert_allclose(both - first, noisy(begin=7), atol=1e-6)  # ... as if it were alone
    assert not np.allclose(both, noisy(seed=1))
    assert 0 < np.abs(first).max() <= 0.1 * 3**0.5 + 1e-6


def test_decay_multiplies_the_kernel():
    model = linear(keras.optimizers.SGD(0.0))
    before = kernel(model)
    fit(model, [OccasionalCompression(WeightDecay(0.5), every=7, where="only")], epochs=2)
    np.testing.assert_allclose(kernel(model), 0.25 * before, rtol=1e-6)  # not at the end again
