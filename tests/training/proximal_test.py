"""Proximal maps in training: the step size is the learning rate, summed."""

import keras
import numpy as np
import pytest

from keras_compaware import (
    CompressionCallback,
    GroupLasso,
    NuclearNorm,
    OccasionalCompression,
    Proximal,
    Ramp,
    Recipe,
    Rule,
    find_targets,
)
from keras_compaware.training import Assignment

BACKEND = keras.backend.backend()
BATCH, BATCHES = 4, 7
STRENGTH = 0.6


def examples():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(26, 6)).astype("float32")
    return x, generator.normal(size=(26, 1)).astype("float32")


def linear(rate=0.05, **arguments):
    """One output unit: the groups of the lasso are single weights, so it is the L1 norm."""
    layer = keras.layers.Dense(1, use_bias=False, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    layer.kernel.assign(np.linspace(-1.0, 1.0, 6)[:, None])
    model.compile(keras.optimizers.SGD(rate, **arguments), "mse")
    return model


def kernel(model):
    return keras.ops.convert_to_numpy(model.layers[0].kernel)


def fit(model, action, epochs=3, more=(), before=(), bare=False):
    recipe = Recipe([Rule("only", action)])
    callbacks = [*before, *recipe.callbacks(model), *more]
    x, y = examples()
    options = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=callbacks[0] if bare else callbacks, **options)
    return callbacks[len(before)]


def soften(w, threshold):
    return np.sign(w) * np.maximum(np.abs(w) - threshold, 0.0)


def ista(rates, every, epochs=3, accumulation=1, strength=None, begin=0, end=None):
    """Proximal gradient steps in NumPy; `rates[t]` is the learning rate of update t + 1.

    The threshold of an application is the strength times the rates of all updates since the last
    one; what is left is applied at the end.
    """
    strength = strength or (lambda step: STRENGTH)
    x, y = examples()
    w, step, since, gradients = np.linspace(-1.0, 1.0, 6)[:, None], 0, begin, []
    last = end or len(rates)
    for _ in range(epochs):
        for start in range(0, len(x), BATCH):
            xs, ys = x[start : start + BATCH], y[start : start + BATCH]
            gradients.append(2.0 / ys.size * xs.T @ (xs @ w - ys))
            if len(gradients) < accumulation:
                continue
            w, step = w - rates[step] * sum(gradients) / accumulation, step + 1
            gradients = []
            due = step > begin and ((step - begin) % every == 0 or step == end)
            if due and step <= last:
                w = soften(w, sum(rates[since:step]) * strength(step))
                since = step
    if since < min(step, last):
        w = soften(w, sum(rates[since : min(step, last)]) * strength(step))
    return w


def agree(model, expected):
    np.testing.assert_array_equal(kernel(model) == 0, expected == 0)
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)


@pytest.mark.parametrize("every", [1, 5, 7, 20])
def test_constant_rate(every):
    model = linear()
    fit(model, Proximal(GroupLasso(STRENGTH), every=every))
    agree(model, ista([0.05] * 21, every))


def test_the_objective_does_not_depend_on_the_period():
    """Of a model at rest, shrinking once by the sum is shrinking every step."""
    results = []
    for every in (1, 5):
        model = linear(rate=1e-3)
        x, _ = examples()
        recipe = Recipe([Rule("only", Proximal(GroupLasso(10.0), every=every))])
        model.fit(
            0 * x, 0 * x[:, :1], batch_size=BATCH, verbose=0, callbacks=recipe.callbacks(model)
        )
        results.append(kernel(model))
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(
        results[0], soften(np.linspace(-1, 1, 6)[:, None], 7 * 1e-3 * 10), atol=1e-6
    )


@pytest.mark.parametrize("every", [1, 5])
def test_exponential_decay(every):
    model = linear(keras.optimizers.schedules.ExponentialDecay(0.08, 4, 0.7))
    fit(model, Proximal(GroupLasso(STRENGTH), every=every))
    agree(model, ista([0.08 * 0.7 ** (t / 4) for t in range(21)], every))


def test_a_long_interval_of_a_schedule_is_summed_nearly():
    model = linear(keras.optimizers.schedules.CosineDecay(0.08, 30))
    fit(model, Proximal(GroupLasso(STRENGTH), every=21))
    rates = [0.04 * (1 + np.cos(np.pi * t / 30)) for t in range(21)]
    np.testing.assert_allclose(kernel(model), ista(rates, 21), atol=1e-4)


def test_schedule_with_accumulation():
    """Keras evaluates a schedule at the number of batches, and updates every other one."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.08, 4, 0.7)
    model = linear(schedule, gradient_accumulation_steps=2)
    fit(model, Proximal(GroupLasso(1.0), every=3))
    rates = [0.08 * 0.7 ** ((2 * t + 1) / 4) for t in range(10)]
    agree(model, ista(rates, 3, accumulation=2, strength=lambda step: 1.0))


def test_a_schedule_that_cannot_be_saved():
    class Halving(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.08 * 0.5 ** (keras.ops.cast(step, "float32") / 7)

    model = linear(Halving())
    fit(model, Proximal(GroupLasso(STRENGTH), every=5))
    agree(model, ista([0.08 * 0.5 ** (t / 7) for t in range(21)], 5))


def per_epoch(epoch):
    return 0.05 / (epoch + 1)


PER_EPOCH = [per_epoch(t // BATCHES) for t in range(21)]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_learning_rate_scheduler(every, bare):
    """Five does not divide the seven steps of an epoch: an interval has two rates."""
    if bare:  # the scheduler cannot be in a list then
        model = linear()

        class Both(CompressionCallback):
            def on_epoch_begin(self, epoch, logs=None):
                super().on_epoch_begin(epoch)
                self.model.optimizer.learning_rate = per_epoch(epoch)

        (target,) = find_targets(model)[0]
        action = Proximal(GroupLasso(STRENGTH), every=every)
        x, y = examples()
        both = Both([Assignment(target, (action,))])
        model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=both)
    else:
        model = linear()
        scheduler = keras.callbacks.LearningRateScheduler(per_epoch)
        fit(model, Proximal(GroupLasso(STRENGTH), every=every), before=[scheduler])
    agree(model, ista(PER_EPOCH, every))


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_rate_that_is_set_when_an_epoch_ends(ours_first):
    """As ReduceLROnPlateau does, before or after ours in the list."""

    class Reduce(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = per_epoch(epoch + 1)

    model = linear()
    where = {"more": [Reduce()]} if ours_first else {"before": [Reduce()]}
    fit(model, Proximal(GroupLasso(STRENGTH), every=5), **where)
    agree(model, ista(PER_EPOCH, 5))


def test_a_rate_that_is_set_before_every_step():
    class WarmUp(keras.callbacks.Callback):
        step = 0

        def on_train_batch_begin(self, batch, logs=None):
            self.step += 1
            self.model.optimizer.learning_rate = 0.004 * self.step

    model = linear()
    fit(model, Proximal(GroupLasso(STRENGTH), every=1), before=[WarmUp()])
    agree(model, ista([0.004 * (t + 1) for t in range(21)], 1))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses steps_per_execution > 1 on PyTorch")
def test_several_steps_per_execution():
    model = linear()
    model.compile(keras.optimizers.SGD(0.05), "mse", steps_per_execution=7)
    callback = fit(model, Proximal(GroupLasso(STRENGTH), every=1))
    assert [firing.step for firing in callback.firings] == [7, 14, 21]
    agree(model, ista([0.05] * 21, 7))


@pytest.mark.parametrize(
    ("begin", "end", "fired"),
    [(4, 14, [9, 14]), (4, 13, [9, 13]), (8, None, [13, 18]), (0, 3, [3])],
)
def test_window(begin, end, fired):
    """The last interval may be shorter; nothing acts after `end`."""
    model = linear()
    callback = fit(model, Proximal(GroupLasso(STRENGTH), every=5, begin=begin, end=end))
    assert [f.step for f in callback.firings if not f.final] == fired
    assert [f.step for f in callback.firings if f.final] == ([21] if end is None else [])
    expected = ista([0.05] * 21, 5, begin=begin, end=end)
    np.testing.assert_allclose(kernel(model), expected, atol=2e-6)


def test_ramp():
    ramp = Ramp(0.0, 0, 20, power=1.0)
    model = linear()
    fit(model, Proximal(GroupLasso(STRENGTH), every=3, ramp=ramp))
    agree(model, ista([0.05] * 21, 3, strength=lambda step: STRENGTH * min(step / 20, 1.0)))


def test_two_fits_are_one():
    once, twice = linear(), linear()
    fit(once, Proximal(GroupLasso(STRENGTH), every=7), epochs=2)
    callbacks = Recipe([Rule("only", Proximal(GroupLasso(STRENGTH), every=7))]).callbacks(twice)
    x, y = examples()
    for _ in range(2):
        twice.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(kernel(once), kernel(twice), atol=1e-6)


def test_compiling_anew_counts_anew():
    """A fresh optimizer starts at step zero, whatever the callback has seen before."""
    model = linear()
    callbacks = Recipe([Rule("only", Proximal(GroupLasso(STRENGTH), every=5))]).callbacks(model)
    x, y = examples()
    for _ in range(2):
        model.layers[0].kernel.assign(np.linspace(-1.0, 1.0, 6)[:, None])
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        agree(model, ista([0.05] * 21, 5))


def test_resume_sums_what_is_owed():
    """Interrupted at step 12 after a firing at 10: step 15 owes five steps, not three."""
    model = linear(rate=0.0)
    model.optimizer.iterations.assign(12)
    model.optimizer.learning_rate = 1e-2
    callback = Recipe([Rule("only", Proximal(GroupLasso(1.0), every=5))]).callbacks(model)[0]
    callback.set_state({"settled": {}, "applied": {"only/kernel#0": 10}})
    x, _ = examples()
    model.fit(0 * x[:12], 0 * x[:12, :1], batch_size=BATCH, verbose=0, callbacks=[callback])
    assert [firing.step for firing in callback.firings] == [15]
    expected = soften(np.linspace(-1.0, 1.0, 6)[:, None], 5 * 1e-2)
    np.testing.assert_allclose(kernel(model), expected, atol=1e-6)
    assert callback.get_state()["applied"] == {"only/kernel#0": 15}


def test_custom_loop():
    model = linear()
    callback = Recipe([Rule("only", Proximal(GroupLasso(STRENGTH), every=3))]).callbacks(model)[0]
    x, y = examples()
    for n, start in enumerate(range(0, len(x), BATCH), 1):
        xs, ys = x[start : start + BATCH], y[start : start + BATCH]
        w = kernel(model)
        model.layers[0].kernel.assign(w - 0.05 * 2.0 / ys.size * xs.T @ (xs @ w - ys))
        callback.step(model, n)
    callback.finish(model)
    np.testing.assert_allclose(kernel(model), ista([0.05] * 7, 3, epochs=1), atol=2e-6)


def test_custom_loop_without_an_optimizer_raises():
    layer = keras.layers.Dense(1, name="only")
    model = keras.Sequential([keras.Input((6,)), layer])
    callback = Recipe([Rule("only", Proximal(GroupLasso(STRENGTH), every=3))]).callbacks(model)[0]
    callback.step(model, 1)
    with pytest.raises(ValueError, match="learning rate of the model's optimizer"):
        callback.step(model, 3)


def test_nuclear_norm_and_loss_scaling():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = linear()
        callback = fit(model, Proximal(NuclearNorm(STRENGTH), every=4))
    finally:
        keras.config.set_dtype_policy(previous)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    steps = [firing.step for firing in callback.firings if not firing.final]
    assert steps == list(range(4, steps[-1] + 1, 4))
    assert len(steps) >= 4


def test_a_proximal_map_of_a_long_training_keeps_few_notes():
    model = linear()

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 0.001 * (batch + 1)

    callback = fit(model, Proximal(GroupLasso(STRENGTH), every=1), before=[Look()])
    assert len(callback._learning_rate._notes) <= 1


def test_not_among_compressors():
    with pytest.raises(TypeError, match=r"must be a keras\.constraints\.Constraint"):
        OccasionalCompression(GroupLasso(1.0), 3)
