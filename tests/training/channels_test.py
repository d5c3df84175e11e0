"""Rules for channels: in plans, inside the training step and in the callback, against NumPy."""

import json

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import (
    AtEnd,
    BinaryCodeQuantization,
    Chain,
    Every,
    GroupLasso,
    GroupPruning,
    LowRank,
    MagnitudePruning,
    NuclearNorm,
    OccasionalCompression,
    PartialGroupLasso,
    Penalty,
    Proximal,
    Ramp,
    Recipe,
    Rule,
    Skip,
    StraightThrough,
    TernaryQuantization,
    Tucker2,
    UniformQuantization,
    WeightClustering,
    compact,
    compress,
    shrink,
)
from tests.coupling import networks
from tests.coupling.helpers import array, randomise
from tests.marks import slow_on_jax

ON_JAX = keras.backend.backend() == "jax"
BATCH, BATCHES, WIDTH, HIDDEN = 4, 6, 5, 6
ROW = WIDTH + 1 + 2  # weights of a hidden unit: incoming, bias, outgoing


def examples():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH * BATCHES, WIDTH)).astype("float32")
    return x, generator.normal(size=(BATCH * BATCHES, 2)).astype("float32")


def network():
    """A linear network: its gradients fit into three lines of NumPy."""
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(HIDDEN, name="hidden"),
            layers.Dense(2, use_bias=False, name="head"),
        ]
    )
    generator = np.random.default_rng(1)
    scale = np.where(np.isin(np.arange(HIDDEN), (1, 4)), 0.05, 1.0)  # two channels are weak
    hidden, head = model.layers
    hidden.kernel.assign(scale * generator.normal(size=(WIDTH, HIDDEN)))
    hidden.bias.assign(scale * generator.normal(size=HIDDEN))
    head.kernel.assign(scale[:, None] * generator.normal(size=(HIDDEN, 2)))
    return model


def compiled(recipe, optimizer=None, **arguments):
    model = network()
    optimizer = optimizer or keras.optimizers.SGD(0.05)
    model.compile(recipe.optimizer(optimizer), "mse", **arguments)
    return model, recipe.callbacks(model)


def fit(model, callbacks, epochs=2, **arguments):
    x, y = examples()
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **{**options, **arguments})


def rows_of(model):
    """Rows (channels, weights) from the weights themselves."""
    hidden, head = model.get_layer("hidden"), model.get_layer("head")
    return np.concatenate(
        [array(hidden.kernel).T, array(hidden.bias)[:, None], array(head.kernel)], axis=1
    )


def descend(after, epochs=2, rate=0.05, momentum=0.0):
    """SGD by hand; `after(rows, step)` follows each update. Returns the rows."""
    x, y = (values.astype("float64") for values in examples())
    rows, step = rows_of(network()).astype("float64"), 0
    velocity = np.zeros_like(rows)
    for _ in range(epochs):
        for batch in range(BATCHES):
            part = slice(batch * BATCH, (batch + 1) * BATCH)
            w, b, v = rows[:, :WIDTH].T, rows[:, WIDTH], rows[:, WIDTH + 1 :]
            h = x[part] @ w + b
            error = 2 / y[part].size * (h @ v - y[part])
            back = error @ v.T
            gradient = [(x[part].T @ back).T, back.sum(axis=0)[:, None], h.T @ error]
            velocity = momentum * velocity - rate * np.concatenate(gradient, axis=1)
            step += 1
            rows = after(rows + velocity, step)
    return rows


def shrunk(rows, threshold):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.maximum(0, 1 - threshold * np.sqrt(ROW) / np.maximum(norms, 1e-30))


def pruned(rows, sparsity):
    number = len(rows) - round(sparsity * len(rows))
    kept = np.argsort(-np.linalg.norm(rows, axis=1), kind="stable")[:number]
    return np.where(np.isin(np.arange(len(rows)), kept)[:, None], rows, 0)


def channels(*actions, where=None):
    return Recipe(channels=[Rule(where, *actions)])


def alive(model):
    return np.flatnonzero(rows_of(model).any(axis=1)).tolist()


LASSO = GroupLasso(0.3)

# ---- recipes ----------------------------------------------------------------------------------


def test_the_plan_lists_kernels_and_then_channels():
    model = networks.concatenation()
    recipe = Recipe(
        [Rule("head", Every(10, MagnitudePruning(0.5)))],
        channels=[Rule("^a/", Proximal(LASSO)), Rule("^b/", Skip())],
    )
    plan = recipe.plan(model)
    rows = {row.name: row for row in plan.rows}
    assert list(rows)[:3] == ["a/kernel", "b/kernel", "head/kernel"]
    assert rows["a/kernel"].reason == "no rule takes it"
    assert rows["a/channels"].actions == (Proximal(LASSO),)
    assert rows["a/channels"].shape == (4, 27 + 1 + 2 + 192)
    assert rows["b/channels"].reason == "left alone by a rule"
    assert rows["head/channels"].reason == "it is an output of the model"
    assert [a.target.name for a in plan.assignments] == ["head/kernel", "a/channels"]
    shown = {line.split()[0]: line for line in str(plan).splitlines()}
    assert shown["a/channels"].split()[1:3] == ["Conv2D", "4x222"]
    assert shown["a/channels"].endswith("Proximal(regularizer=GroupLasso(strength=0.3))")
    assert plan.to_json()[3]["shape"] == [4, 222]


def test_recipes_with_rules_for_channels_are_values():
    recipe = Recipe(
        [Rule("head", Every(10, MagnitudePruning(0.5), hold=True))],
        strict=True,
        channels=[Rule("^a/", Proximal(LASSO)), Rule(None, Every(5, GroupPruning(0.5)))],
    )
    text = json.dumps(keras.saving.serialize_keras_object(recipe))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.strict
    assert again.channels == recipe.channels
    assert again.rules == recipe.rules
    assert again != Recipe(recipe.rules, strict=True)
    assert again != Recipe(recipe.rules, strict=True, channels=recipe.channels[::-1])
    assert repr(recipe) != repr(Recipe(recipe.rules, strict=True))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (StraightThrough(MagnitudePruning(0.5)), "StraightThrough acts inside one layer"),
        (Penalty(LASSO), "Penalty acts inside one layer"),
        (Every(5, LowRank(rank=2)), "decomposes one kernel"),
        (Every(5, Tucker2(ranks=(2, 2))), "decomposes one kernel"),
        (AtEnd(Chain([LowRank(rank=2), UniformQuantization(8)])), "decomposes one kernel"),
        (Proximal(NuclearNorm(0.1)), "decomposes one kernel"),
        (Every(5, GroupPruning(0.5, block=(2, 2))), "about blocks of one kernel"),
        (Proximal(PartialGroupLasso(0.1, mode="block")), "about blocks of one kernel"),
        (Proximal(GroupLasso(0.1, axis="outputs")), "groups along the outputs"),
        (AtEnd(GroupPruning(0.5, axis="outputs")), "groups along the outputs"),
    ],
    ids=str,
)
def test_what_channels_cannot_do_is_refused(action, message):
    with pytest.raises(ValueError, match=message):
        channels(action)
    Recipe(channels=[Rule("a", Skip())], rules=[Rule("b", action)])


@pytest.mark.parametrize(
    "compressor",
    [
        BinaryCodeQuantization(2),
        WeightClustering(4),
        Chain([MagnitudePruning(0.5), WeightClustering(4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("action", [AtEnd, lambda compressor: Every(5, compressor)])
def test_what_would_fill_dead_channels_is_refused_beside_them(compressor, action):
    rules = [Rule("head", action(compressor))]
    with pytest.raises(ValueError, match="does not keep zeros"):
        Recipe(rules, channels=[Rule(None, Proximal(LASSO))])
    Recipe(rules, channels=[Rule(None, Skip())])
    Recipe([Rule("head", action(TernaryQuantization()))], channels=[Rule(None, Proximal(LASSO))])


def test_rules_that_fit_no_space_are_refused():
    model = network()
    for where, why in (
        ("hiden", r"takes no channel space.*hidden/channels"),
        ("head", "head/channels: it is an output of the model"),
    ):
        with pytest.raises(ValueError, match=why):
            channels(Proximal(LASSO), where=where).plan(model)
    with pytest.raises(ValueError, match="is taken by rule 1"):
        Recipe(channels=[Rule(None, Proximal(LASSO)), Rule("hidden", Skip())]).plan(model)
    with pytest.raises(TypeError, match="`channels` must be a sequence of Rule"):
        Recipe(channels=[Proximal(LASSO)])
    with pytest.raises(ValueError, match="at least one rule"):
        Recipe()


def test_subclassed_models_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(3)

        def call(self, x):
            return self.hidden(x)

    model = Own()
    model(np.ones((1, 2), "float32"))
    with pytest.raises(ValueError, match=r"Own.*no static graph.*functional or Sequential"):
        channels(Proximal(LASSO)).callbacks(model)


def test_compressing_once_and_compacting_halves_the_channels():
    recipe = channels(AtEnd(GroupPruning(0.5)))
    model = network()
    small = compress(model, recipe)
    np.testing.assert_array_equal(rows_of(small), pruned(rows_of(model), 0.5))
    result = compact(small)
    assert [(row.name, row.before, row.after) for row in result.channels] == [("hidden", 6, 3)]
    assert result.whole.get_layer("hidden").kernel.shape == (WIDTH, 3)
    x, _ = examples()
    np.testing.assert_allclose(array(result.model(x)), array(small(x)), atol=1e-5)


@slow_on_jax
def test_kernels_are_compressed_after_the_channels_and_keep_their_zeros():
    """Half of the channels go, and 40 % of what is in a kernel then, its zeros included."""
    recipe = Recipe(
        [Rule("hidden", AtEnd(MagnitudePruning(0.6)))],
        channels=[Rule(None, AtEnd(GroupPruning(0.5)))],
    )
    model = network()
    small = compress(model, recipe)
    rows = pruned(rows_of(model), 0.5)
    kernel = rows[:, :WIDTH].T
    kept = np.sort(np.abs(kernel).reshape(-1))[-(WIDTH * HIDDEN - round(0.6 * WIDTH * HIDDEN)) :]
    expected = np.where(np.abs(kernel) >= kept[0], kernel, 0)
    np.testing.assert_array_equal(array(small.get_layer("hidden").kernel), expected)
    assert recipe.final_compressors(model) == {"hidden/kernel": MagnitudePruning(0.6)}


# ---- inside the training step -----------------------------------------------------------------


def test_the_proximal_map_of_channels_acts_after_every_update():
    recipe = channels(Proximal(LASSO))
    model, callbacks = compiled(recipe)
    history = fit(model, callbacks).history
    expected = descend(lambda rows, step: shrunk(rows, 0.05 * 0.3))
    assert 0 < np.count_nonzero(~expected.any(axis=1)) < HIDDEN  # some have died on the way
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert alive(model) == np.flatnonzero(expected.any(axis=1)).tolist()
    assert callbacks[0].firings == []
    assert history["dead_channels"][-1] == pytest.approx(1 - len(alive(model)) / HIDDEN)
    result = compact(model)
    assert [row.after for row in result.channels] == [len(alive(model))]
    x, _ = examples()
    np.testing.assert_allclose(array(result.model(x)), array(model(x)), atol=1e-5)


def momentum():
    """What brings dead channels back: in a row of zeros all gradients are zero."""
    return keras.optimizers.SGD(0.02, momentum=0.5)


def test_held_channels_stay_zero_between_firings():
    recipe = channels(Every(4, GroupPruning(0.5), hold=True, end=4))
    model, callbacks = compiled(recipe, momentum())
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(alive(model))
    )
    fit(model, [*callbacks, note] if not ON_JAX else callbacks)

    state = {}

    def after(rows, step):
        if step == 4:
            rows = pruned(rows, 0.5)
            state["mask"] = rows != 0
        return rows * state.get("mask", 1)

    expected = descend(after, rate=0.02, momentum=0.5)
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert len(alive(model)) == HIDDEN // 2
    if not ON_JAX:
        assert [len(found) for found in seen] == [HIDDEN] * 3 + [HIDDEN // 2] * 9


@pytest.mark.parametrize(
    ("action", "sparsity_at"),
    [
        (Every(1, GroupPruning(0.5)), lambda step: 0.5),
        (
            Every(1, GroupPruning(0.5), ramp=Ramp(0.0, end=7, power=1)),
            lambda step: 0.5 * min(1.0, step / 7),
        ),
    ],
    ids=["constant", "ramp"],
)
@slow_on_jax
def test_pruning_channels_at_every_step(action, sparsity_at):
    model, callbacks = compiled(channels(action))
    fit(model, callbacks)
    expected = descend(lambda rows, step: pruned(rows, sparsity_at(step)))
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert len(alive(model)) == HIDDEN // 2


def test_kernels_come_first_and_then_channels():
    recipe = Recipe(
        [Rule("hidden", Every(1, MagnitudePruning(0.5)))], channels=[Rule(None, Proximal(LASSO))]
    )
    model, callbacks = compiled(recipe)
    fit(model, callbacks, epochs=1)

    def after(rows, step):
        kernel = rows[:, :WIDTH]
        order = np.argsort(-np.abs(kernel.T), axis=None, kind="stable")
        mask = np.zeros(kernel.size, bool)
        mask[order[: kernel.size // 2]] = True
        rows = np.concatenate([kernel * mask.reshape(WIDTH, HIDDEN).T, rows[:, WIDTH:]], axis=1)
        return shrunk(rows, 0.05 * 0.3)

    np.testing.assert_allclose(rows_of(model), descend(after, epochs=1), atol=2e-6)


@slow_on_jax
def test_averaged_weights_keep_the_dead_channels():
    inner = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)
    model, callbacks = compiled(channels(Proximal(LASSO)), inner)
    fit(model, callbacks)
    averaged = None

    def after(rows, step):
        nonlocal averaged
        # Keras averages what the update has written, before the proximal map of this step.
        averaged = rows if averaged is None else 0.9 * averaged + 0.1 * rows
        return shrunk(rows, 0.05 * 0.3)

    dead = ~descend(after).any(axis=1)
    assert dead.any()
    assert averaged.any(axis=1).all()
    expected = np.where(dead[:, None], 0, averaged)
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert alive(model) == np.flatnonzero(~dead).tolist()


def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(tmp_path):
    recipe = channels(Every(4, GroupPruning(0.5), hold=True), Proximal(LASSO))
    whole, callbacks = compiled(recipe, momentum())
    fit(whole, callbacks, epochs=2)

    first, callbacks = compiled(recipe, momentum())
    fit(first, callbacks, epochs=1)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    (entry,) = second.optimizer.entries
    assert entry == first.optimizer.entries[0]
    assert entry.name == "hidden/channels"
    assert entry.layout.shape == (HIDDEN, ROW)
    again = recipe.callbacks(second)
    again[0].set_state(json.loads(json.dumps(callbacks[0].get_state())))
    fit(second, again, epochs=2, initial_epoch=1)
    assert len(alive(whole)) == HIDDEN // 2
    np.testing.assert_array_equal(rows_of(second), rows_of(whole))


def test_another_recipe_for_channels_is_refused_by_a_compiled_model():
    model, callbacks = compiled(channels(Proximal(LASSO)))
    fit(model, callbacks, epochs=1)
    with pytest.raises(ValueError, match="made for another recipe or another model"):
        channels(Proximal(GroupLasso(0.2))).callbacks(model)


@slow_on_jax
def test_a_narrower_model_goes_on_with_the_state_of_its_optimizer():
    model, callbacks = compiled(channels(Proximal(LASSO)), momentum())
    fit(model, callbacks)
    keep = alive(model)
    assert 0 < len(keep) < HIDDEN
    narrow = shrink(model, {"hidden": keep}, optimizer=True)
    momenta = [array(variable) for variable in model.optimizer.inner_optimizer.variables[2:]]
    received = [array(variable) for variable in narrow.optimizer.variables[2:]]
    assert [value.shape for value in received] == [(WIDTH, len(keep)), (len(keep),), (len(keep), 2)]
    for value, expected in zip(
        received, [momenta[0][:, keep], momenta[1][keep], momenta[2][keep]], strict=True
    ):
        np.testing.assert_array_equal(value, expected)
    fit(narrow, [], epochs=1)
    assert np.all(np.isfinite(array(narrow.get_layer("head").kernel)))


# ---- by the callback --------------------------------------------------------------------------


def test_the_callback_prunes_channels_every_five_steps():
    recipe = channels(Every(5, GroupPruning(0.5)))
    model, (callback,) = compiled(recipe, momentum())
    assert isinstance(model.optimizer, keras.optimizers.SGD)  # nothing acts inside the step
    history = fit(model, [callback]).history
    expected = descend(
        lambda rows, step: pruned(rows, 0.5) if step % 5 == 0 else rows, rate=0.02, momentum=0.5
    )
    assert expected.any(axis=1).all()  # free between firings
    expected = pruned(expected, 0.5)
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert [firing.step for firing in callback.firings] == [5, 10, 12]
    assert [list(firing.sparsity) for firing in callback.firings] == [["hidden/channels"]] * 3
    assert callback.firings[0].sparsity["hidden/channels"] == pytest.approx(0.5)
    assert history["dead_channels"] == [0.0, 0.0]  # read where an epoch ends: steps 6 and 12
    assert history["sparsity"] == pytest.approx([0.5, 0.5])  # of the last firing
    assert callback.compressors == {"hidden/channels": GroupPruning(0.5)}


@slow_on_jax
def test_the_callback_shrinks_channels_by_the_summed_rate():
    model, callbacks = compiled(channels(Proximal(LASSO, every=5)))
    fit(model, callbacks)
    expected = descend(lambda rows, step: shrunk(rows, 0.05 * 0.3 * 5) if step % 5 == 0 else rows)
    expected = shrunk(expected, 0.05 * 0.3 * 2)  # the rest, at the end
    np.testing.assert_allclose(rows_of(model), expected, atol=2e-6)
    assert len(alive(model)) < HIDDEN


@slow_on_jax
def test_training_ends_with_channels_and_then_kernels():
    recipe = Recipe(
        [Rule("hidden", Every(3, UniformQuantization(4)))],
        channels=[Rule(None, Every(6, GroupPruning(0.5)))],
    )
    model, (callback,) = compiled(recipe)
    fit(model, [callback])
    kernel = array(model.get_layer("hidden").kernel)
    assert len(np.unique(kernel)) <= 15
    assert len(alive(model)) == HIDDEN // 2  # quantization leaves zeros
    assert list(callback.compressors) == ["hidden/channels", "hidden/kernel"]
    assert [row.after for row in compact(model).channels] == [HIDDEN // 2]
    np.testing.assert_array_equal(
        array(compact(model).whole.get_layer("hidden").kernel), kernel[:, alive(model)]
    )


def test_what_is_not_finite_stops_the_training():
    model, callbacks = compiled(channels(Every(2, GroupPruning(0.5))))
    model.get_layer("head").kernel.assign(np.full((HIDDEN, 2), np.nan))
    with pytest.raises(FloatingPointError, match=r"'hidden/channels' hold NaN.*step 2"):
        fit(model, callbacks, epochs=1)


@slow_on_jax
def test_channels_of_a_convolutional_network_die_and_are_removed():
    model = randomise(networks.residual())
    recipe = channels(Proximal(GroupLasso(0.5)))
    model.compile(recipe.optimizer(keras.optimizers.SGD(0.02)), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 8, 8, 3)).astype("float32"), np.zeros((12, 3), "float32")
    history = model.fit(
        x, y, batch_size=4, epochs=4, verbose=0, callbacks=recipe.callbacks(model)
    ).history
    result = compact(model)
    assert result.channels
    dead = sum(row.before - row.after for row in result.channels)
    assert history["dead_channels"][-1] == pytest.approx(dead / (8 + 6))
    np.testing.assert_allclose(
        result.model.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )


def test_the_sparsity_counts_a_weight_once():
    """Where kernels have rules as well, a space holds what is counted there already."""
    recipe = Recipe(
        [Rule(".*", Every(6, MagnitudePruning(0.5)))],
        channels=[Rule(None, Every(6, GroupPruning(0.5)))],
    )
    model, callbacks = compiled(recipe)
    history = fit(model, callbacks, epochs=1).history
    # Channels fire after the kernels: of the latter's sparsity it is that of their own firing.
    assert history["sparsity"] == pytest.approx([0.5])
    assert history["dead_channels"] == pytest.approx([0.5])


def test_occasional_compression_is_for_kernels():
    model = network()
    model.compile("sgd", "mse")
    fit(model, [OccasionalCompression(GroupPruning(0.5), every=6)], epochs=1)
    assert alive(model) == list(range(HIDDEN))
