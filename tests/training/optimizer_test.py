"""What acts inside the training step: against the same training by hand, in NumPy."""

import json

import keras
import numpy as np
import pytest

from keras_compaware import (
    CompressionOptimizer,
    Every,
    GroupLasso,
    LowRank,
    MagnitudePruning,
    NuclearNorm,
    OccasionalCompression,
    Proximal,
    Ramp,
    Recipe,
    Rule,
    UniformQuantization,
    compact,
    find_targets,
)

BACKEND = keras.backend.backend()
BATCH, BATCHES = 4, 6
several_steps = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras refuses steps_per_execution > 1 on PyTorch"
)
LASSO = GroupLasso(0.4, weighted=False)


def examples():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH * BATCHES, 6)).astype("float32")
    return x, generator.normal(size=(BATCH * BATCHES, 3)).astype("float32")


def linear(recipe, optimizer, **compiled):
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    layer.kernel.assign(np.random.default_rng(1).normal(size=(6, 3)))
    model.compile(recipe.optimizer(optimizer), "mse", **compiled)
    return model, recipe.callbacks(model)


def recipe_of(*actions):
    return Recipe([Rule("only", *actions)])


def kernel(model):
    return keras.ops.convert_to_numpy(model.layers[0].kernel)


def fit(model, callbacks, epochs=2, **arguments):
    x, y = examples()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **{**options, **arguments})


def shrink(w, threshold):
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    return w * np.maximum(0, 1 - threshold / norms)


def prune(w, sparsity):
    order = np.argsort(-np.abs(w), axis=None, kind="stable")
    mask = np.zeros(w.size, bool)
    mask[order[: w.size - round(sparsity * w.size)]] = True
    return np.where(mask.reshape(w.shape), w, 0)


def descend(rate_of, after, epochs=2, accumulation=1):
    """SGD by hand; `after(w, step, rate)` follows each update."""
    x, y = examples()
    w = np.random.default_rng(1).normal(size=(6, 3)).astype("float32").astype("float64")
    micro, gradients, step = 0, [], 0
    for _ in range(epochs):
        for batch in range(BATCHES):
            part = slice(batch * BATCH, (batch + 1) * BATCH)
            gradients.append(2 / y[part].size * x[part].T @ (x[part] @ w - y[part]))
            rate = rate_of(micro)
            micro += 1
            if micro % accumulation == 0:
                step += 1
                w = after(w - rate * np.mean(gradients, axis=0), step, rate)
                gradients = []
    return w


# ---- the maps, step by step -------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("together", [1, pytest.param(3, marks=several_steps)])
def test_the_proximal_map_uses_the_rate_of_each_update(accumulation, together):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.2, 3, 0.5)
    inner = keras.optimizers.SGD(
        schedule, gradient_accumulation_steps=accumulation if accumulation > 1 else None
    )
    model, callbacks = linear(recipe_of(Proximal(LASSO)), inner, steps_per_execution=together)
    fit(model, callbacks)
    expected = descend(
        lambda micro: 0.2 * 0.5 ** (micro / 3),
        lambda w, step, rate: shrink(w, 0.4 * rate),
        accumulation=accumulation,
    )
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)
    assert callbacks[0].firings == []


@pytest.mark.parametrize("together", [1, pytest.param(4, marks=several_steps)])
def test_windows_and_ramps_count_updates(together):
    actions = (
        Proximal(LASSO, begin=2, end=5),
        Every(1, MagnitudePruning(0.7), begin=3, end=9, ramp=Ramp(0.1, end=8, power=1)),
    )
    model, callbacks = linear(
        recipe_of(*actions), keras.optimizers.SGD(0.1), steps_per_execution=together
    )

    def after(w, step, rate):
        if 2 < step <= 5:
            w = shrink(w, 0.4 * rate)
        if 3 < step <= 9:
            w = prune(w, 0.7 if step >= 8 else 0.7 - 0.6 * (8 - step) / 5)
        return w

    fit(model, callbacks)
    expected = prune(descend(lambda micro: 0.1, after), 0.7)  # the end: exactly compressed
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)


def test_rates_that_callbacks_set_count():
    model, callbacks = linear(recipe_of(Proximal(LASSO)), keras.optimizers.SGD(0.1))
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05 * (epoch + 1))
    fit(model, [scheduler, *callbacks])
    expected = descend(
        lambda micro: 0.05 * (1 + micro // BATCHES), lambda w, step, rate: shrink(w, 0.4 * rate)
    )
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)


def test_a_plateau_lowers_the_rate_of_the_inner_optimizer():
    model, callbacks = linear(recipe_of(Proximal(LASSO)), keras.optimizers.SGD(0.1))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    fit(model, [plateau, *callbacks], epochs=3)
    inner = model.optimizer.inner_optimizer
    rate = float(keras.ops.convert_to_numpy(inner.learning_rate))
    assert rate < 0.06
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == rate


def test_any_constraint_acts_at_every_step():
    constraint = keras.constraints.MaxNorm(0.5, axis=0)
    model, callbacks = linear(recipe_of(Every(1, constraint)), keras.optimizers.SGD(0.1))
    fit(model, callbacks)
    assert np.linalg.norm(kernel(model), axis=0).max() <= 0.5 + 1e-5


# ---- held masks -------------------------------------------------------------------------------


class Zeros(keras.callbacks.Callback):
    """Notes the zeros of the kernel after each batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(kernel(self.model) == 0)


@pytest.mark.parametrize("hold", [True, False])
def test_zeros_are_held_between_firings(hold):
    ramp = Ramp(0.3, power=1)
    action = Every(3, MagnitudePruning(0.8), begin=1, end=8, ramp=ramp, hold=hold)
    model, callbacks = linear(recipe_of(action), keras.optimizers.Adam(0.05))
    zeros = Zeros()
    fit(model, [zeros, *callbacks], epochs=2)
    # Fires after the steps 4, 7 and 8, after `zeros` has looked.
    numbers = [int(seen.sum()) for seen in zeros.seen]
    assert numbers[:4] == [0] * 4
    if not hold:
        assert numbers == [0] * 12  # free: what was pruned moves at once
        return
    at = [round(18 * (0.8 - 0.5 * (8 - step) / 7)) for step in (4, 7)]
    assert numbers[4:7] == [at[0]] * 3
    assert numbers[7:8] == [at[1]]
    assert numbers[8:] == [14] * 4  # exact at the freeze, and held while the network heals
    for earlier, later in zip(zeros.seen, zeros.seen[1:], strict=False):
        assert np.all(later[earlier])  # what is held never comes back
    assert np.sum(kernel(model) == 0) == 14


def test_masks_are_held_at_every_step_too():
    model, callbacks = linear(
        recipe_of(Every(1, MagnitudePruning(0.5), hold=True)), keras.optimizers.Adam(0.05)
    )
    zeros = Zeros()
    fit(model, [zeros, *callbacks])
    assert all(seen.sum() == 9 for seen in zeros.seen)
    assert all(np.array_equal(seen, zeros.seen[0]) for seen in zeros.seen)


# ---- as an optimizer of Keras -----------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=1.0),
        lambda: keras.optimizers.Lion(0.01),
    ],
)
def test_the_wrapper_changes_nothing_else(inner):
    """With a strength of zero, training is bit for bit that of the inner optimizer."""
    recipe = recipe_of(Proximal(GroupLasso(0.0)))
    model, callbacks = linear(recipe, inner())
    fit(model, callbacks)
    plain, _ = linear(recipe_of(Proximal(GroupLasso(0.0), every=2)), inner())
    assert not isinstance(plain.optimizer, CompressionOptimizer)
    fit(plain, [])
    np.testing.assert_array_equal(kernel(model), kernel(plain))
    assert int(model.optimizer.iterations) == 2 * BATCHES


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    recipe = recipe_of(
        Proximal(GroupLasso(0.05)),
        Every(4, MagnitudePruning(0.8), end=20, ramp=Ramp(0.0), hold=True),
    )
    rate = keras.optimizers.schedules.CosineDecay(0.05, 24)
    whole, callbacks = linear(recipe, keras.optimizers.Adam(rate))
    saver = Zeros()
    path = str(tmp_path / "half.keras")
    saver.on_epoch_end = lambda epoch, logs=None: saver.model.save(path) if epoch == 1 else None
    fit(whole, [*callbacks, saver], epochs=4)
    half = keras.models.load_model(path)
    assert isinstance(half.optimizer, CompressionOptimizer)
    fit(half, recipe.callbacks(half), epochs=4, initial_epoch=2)
    np.testing.assert_array_equal(kernel(half), kernel(whole))


def test_masks_of_older_files_are_read():
    """They were 8-bit integers."""
    model, callbacks = linear(
        recipe_of(Every(4, MagnitudePruning(0.5), hold=True)), keras.optimizers.SGD(0.01)
    )
    fit(model, callbacks)
    store = {}
    model.optimizer.save_own_variables(store)
    masks = [key for key, value in store.items() if np.asarray(value).dtype == bool]
    assert len(masks) == 1
    store[masks[0]] = np.asarray(store[masks[0]]).astype("int8")
    other, callbacks = linear(
        recipe_of(Every(100, MagnitudePruning(0.5), hold=True)), keras.optimizers.SGD(0.01)
    )
    other.optimizer.build(other.trainable_variables)
    other.optimizer.load_own_variables(store)
    other.layers[0].kernel.assign(np.ones((6, 3)))
    x, y = examples()
    other.train_on_batch(x, y)
    np.testing.assert_array_equal(kernel(other) == 0, store[masks[0]] == 0)


def test_building_twice_changes_nothing():
    model, _ = linear(recipe_of(Every(4, MagnitudePruning(0.5), hold=True)), keras.optimizers.SGD())
    model.optimizer.build(model.trainable_variables)
    before = list(map(id, model.optimizer.variables))
    model.optimizer.build(model.trainable_variables)
    assert list(map(id, model.optimizer.variables)) == before


@pytest.mark.parametrize("overwrite", [None, 5])
def test_zeros_survive_averaging(overwrite):
    inner = keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=overwrite
    )
    model, callbacks = linear(recipe_of(Proximal(GroupLasso(0.9, weighted=False))), inner)
    fit(model, callbacks)
    dead = np.all(kernel(model) == 0, axis=1)
    assert 0 < dead.sum() < 6
    before = kernel(model)
    fit(model, callbacks, epochs=1)  # on JAX two variables must not share an array
    assert not np.array_equal(before, kernel(model))


def test_an_averaged_quantized_kernel_is_on_its_grid():
    inner = keras.optimizers.SGD(0.1, use_ema=True)
    model, _ = linear(recipe_of(Every(1, UniformQuantization(3))), inner)
    fit(model, [])  # without the callback, which would compress once more
    assert len(np.unique(kernel(model))) <= 7


def test_it_is_inside_a_loss_scale_optimizer():
    recipe = recipe_of(Proximal(LASSO))
    scaled = keras.optimizers.LossScaleOptimizer(recipe.optimizer(keras.optimizers.SGD(0.1)))
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    layer.kernel.assign(np.random.default_rng(1).normal(size=(6, 3)))
    model.compile(scaled, "mse")
    fit(model, recipe.callbacks(model))
    expected = descend(lambda micro: 0.1, lambda w, step, rate: shrink(w, 0.4 * rate))
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)
    with pytest.raises(ValueError, match="a LossScaleOptimizer goes outside"):
        recipe.optimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))


def test_a_custom_loop_needs_no_callback():
    recipe = recipe_of(Proximal(LASSO))
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    optimizer = recipe.optimizer(keras.optimizers.SGD(0.1), model)
    optimizer.build(model.trainable_variables)
    w = kernel(model)
    optimizer.apply([keras.ops.ones((6, 3))])
    np.testing.assert_allclose(kernel(model), shrink(w - 0.1, 0.04), atol=1e-6)


def test_the_configuration_survives_json():
    model, _ = linear(recipe_of(Proximal(LASSO)), keras.optimizers.Adam(0.01))
    text = json.dumps(keras.saving.serialize_keras_object(model.optimizer))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again.entries == model.optimizer.entries
    assert again.inner_optimizer.get_config() == model.optimizer.inner_optimizer.get_config()


def test_compaction_takes_it_off():
    recipe = Recipe([Rule("only", Every(1, UniformQuantization(8)))])
    model, callbacks = linear(recipe, keras.optimizers.Adam(0.02))
    fit(model, callbacks, epochs=1)
    small = compact(model).model
    assert type(small.optimizer) is type(keras.optimizers.Adam())
    assert small.optimizer.get_config()["learning_rate"] == pytest.approx(0.02)
    assert isinstance(model.optimizer, CompressionOptimizer)
    fit(small, [], epochs=1)


# ---- who acts, and what goes wrong ------------------------------------------------------------


def test_what_decomposes_or_is_rare_is_left_to_the_callback():
    adam = keras.optimizers.Adam()
    for action in (
        Proximal(NuclearNorm(0.1)),
        Proximal(LASSO, every=2),
        Every(1, LowRank(rank=1)),
        Every(5, MagnitudePruning(0.5)),
    ):
        assert recipe_of(action).optimizer(adam) is adam
    wrapped = recipe_of(Every(5, MagnitudePruning(0.5), hold=True)).optimizer(adam)
    assert wrapped.inner_optimizer is adam


def test_an_optimizer_that_does_not_know_the_kernels_refuses():
    recipe = recipe_of(Proximal(LASSO))
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(recipe.optimizer(keras.optimizers.SGD(0.1)), "mse")
    with pytest.raises(ValueError, match=r"recipe.callbacks\(model\)"):
        fit(model, [])


def test_an_optimizer_of_another_recipe_refuses():
    model, _ = linear(recipe_of(Proximal(LASSO)), keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="made for another recipe"):
        recipe_of(Proximal(GroupLasso(0.5))).callbacks(model)


def test_another_callback_may_act_beside_it():
    model, callbacks = linear(recipe_of(Proximal(GroupLasso(0.0))), keras.optimizers.SGD(0.1))
    other = OccasionalCompression(MagnitudePruning(0.5), every=1, where="only")
    fit(model, [*callbacks, other], epochs=1)
    assert len(other.firings) == BATCHES + 1
    assert np.sum(kernel(model) == 0) == 9


def test_held_zeros_need_the_optimizer():
    recipe = recipe_of(Every(5, MagnitudePruning(0.5), hold=True))
    layer = keras.layers.Dense(3, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"hold=True.*recipe.optimizer"):
        recipe.callbacks(model)


def test_only_what_selects_can_be_held():
    with pytest.raises(ValueError, match="keeps the zeros of a compressor that selects"):
        Every(5, UniformQuantization(4), hold=True)


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        ("adam", TypeError, "must be a keras.optimizers.Optimizer"),
        (CompressionOptimizer(keras.optimizers.SGD(0.1)), ValueError, "wrapped already"),
    ],
)
def test_bad_inner_optimizers(inner, error, message):
    with pytest.raises(error, match=message):
        CompressionOptimizer(inner)


def test_nan_stops_training_and_names_target_and_step():
    model, callbacks = linear(recipe_of(Proximal(LASSO)), keras.optimizers.SGD(1e30))
    saved = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: pytest.fail("saved"))
    with pytest.raises(FloatingPointError, match=r"'only/kernel' hold NaN or infinity at .* 6"):
        fit(model, [*callbacks, saved])


# ---- logs -------------------------------------------------------------------------------------


def test_the_logs_show_what_compression_does(tmp_path):

    wide = keras.layers.Dense(8, use_bias=False, name="wide")
    model = keras.Sequential(
        [keras.Input((6,)), wide, keras.layers.Dense(3, use_bias=False, name="only")]
    )
    recipe = Recipe(
        [
            Rule("wide", Every(BATCHES, LowRank(rank=2))),
            Rule("only", Every(BATCHES, MagnitudePruning(0.75))),
        ]
    )
    model.compile(recipe.optimizer(keras.optimizers.SGD(0.01)), "mse")
    table = tmp_path / "log.csv"
    callbacks = recipe.callbacks(model)
    logs = fit(model, [*callbacks, keras.callbacks.CSVLogger(str(table))]).history
    assert logs["rank"] == [2.0, 2.0]
    assert logs["sparsity"] == [pytest.approx(18 / (48 + 24))] * 2
    for epoch in range(2):
        firing = callbacks[0].firings[epoch]
        assert firing.sparsity["only/kernel"] == 0.75
        assert logs["distortion"][epoch] == pytest.approx(np.mean([*firing.distortion.values()]))
        assert logs["compression_seconds"][epoch] == pytest.approx(firing.seconds)
    assert "compression_seconds,distortion" in table.read_text().splitlines()[0]


@pytest.mark.parametrize("final", [LowRank(rank=1), LowRank(ratio=0.4)])
def test_the_logs_show_the_rank_of_a_ramp(final):
    """Of a 6 x 3 matrix: the ratio 1 is rank 2, as 2 (6 + 3) = 18 parameters; .4 is rank 1."""
    ramp = Ramp(3.0 if final.rank else 1.0, begin=BATCHES, end=2 * BATCHES, shape="one_shot")
    recipe = recipe_of(Every(BATCHES, final, ramp=ramp))
    model, callbacks = linear(recipe, keras.optimizers.SGD(0.01))
    assert fit(model, callbacks).history["rank"] == [3.0 if final.rank else 2.0, 1.0]


def test_the_logs_show_the_rank_that_a_nuclear_norm_leaves():
    layer = keras.layers.Dense(6, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    layer.kernel.assign(np.diag([9.0, 8.0, 7.0, 0.1, 0.1, 0.1]).astype("float32"))
    recipe = recipe_of(Proximal(NuclearNorm(1.0), every=BATCHES))
    x = np.zeros((BATCH * BATCHES, 6), "float32")
    logs = model.fit(x, x, batch_size=BATCH, verbose=0, callbacks=recipe.callbacks(model)).history
    assert logs["rank"] == [3.0]
    (target,) = find_targets(model)[0]
    assert int(NuclearNorm(1.0).rank(target.read(), target.axes)) == 3
