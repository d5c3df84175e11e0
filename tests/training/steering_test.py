"""The controller that steers a strength to a target."""

import keras
import numpy as np
import pytest

import keras_compaware as kc
from keras_compaware import Proximal, Recipe, Rule, StrengthController
from tests.laws.helpers import array
from tests.marks import slow_on_jax

STEPS = 10  # of an epoch


def examples():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(8 * STEPS, 6)).astype("float32")
    return x, (x[:, :2].sum(axis=1) > 0).astype("int32")


def network():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(20, activation="relu", name="first"),
            keras.layers.Dense(12, activation="relu", name="second"),
            keras.layers.Dense(2, activation="softmax", name="head"),
        ]
    )


def compiled(recipe, rate=0.01, model=None):
    model = network() if model is None else model
    optimizer = recipe.optimizer(keras.optimizers.Adam(rate))
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    return model


def fit(model, callbacks, epochs, initial_epoch=0, batch_size=8):
    x, y = examples()
    options = {"shuffle": False, "verbose": 0, "initial_epoch": initial_epoch}
    return model.fit(x, y, batch_size, epochs, callbacks=callbacks, **options).history


def steered(regularizer, period=1, in_channels=True, **target):
    action = Proximal(regularizer, every=period, controller=StrengthController(**target))
    rules = [Rule(None, action)]
    return Recipe(channels=rules) if in_channels else Recipe(rules)


@slow_on_jax
@pytest.mark.parametrize(
    "lasso",
    [
        pytest.param(kc.GroupLasso(3.0), id="full"),
        pytest.param(kc.PartialGroupLasso(1e-9, fraction=0.75, l1_strength=1e-10), id="partial"),
    ],
)
def test_the_wanted_channels_are_dead_and_stay_so(lasso):
    recipe = steered(lasso, dead_groups=0.4, end=35, every=10)
    model = compiled(recipe)
    history = fit(model, recipe.callbacks(model), epochs=6)
    dead = [round(value * 32) for value in history["dead_channels"]]
    assert dead[0] < 13
    assert dead[3:] == [13, 13, 13]  # ceil(0.4 * 32), from step 35 on
    assert history["strength"][0] > 0
    assert history["strength"][3:] == [0, 0, 0]
    small = kc.compact(model)
    assert sum(row.after for row in small.channels) == 19


@slow_on_jax
def test_parameters_of_channels():
    recipe = steered(kc.GroupLasso(1.0), parameters=0.5, end=30)
    model = compiled(recipe)
    fit(model, recipe.callbacks(model), epochs=4)
    left = kc.compact(model).model.count_params() / model.count_params()
    assert 0.42 < left <= 0.5


@pytest.mark.parametrize("period", [1, 4])
def test_rows_of_kernels(period):
    recipe = steered(kc.GroupLasso(1.0), period, in_channels=False, dead_groups=0.5, end=25)
    model = compiled(recipe)
    fit(model, recipe.callbacks(model), epochs=4)
    rows = [np.any(array(model.get_layer(n).kernel) != 0, axis=1) for n in ("first", "second")]
    assert np.count_nonzero(~np.concatenate(rows)) == 13


def test_singular_values_by_the_callback():
    model = network()
    whole = model.count_params()
    others = 20 + 12 + 26
    recipe = steered(kc.NuclearNorm(1.0), 5, in_channels=False, parameters=0.6, end=30)
    model = compiled(recipe, model=model)
    callbacks = recipe.callbacks(model)
    fit(model, callbacks, epochs=4)
    targets = [t for t in kc.find_targets(model)[0] if not t.is_head]
    costs = [np.linalg.matrix_rank(array(t.read()), 1e-5) * sum(t.shape) for t in targets]
    sizes = [np.prod(target.shape) for target in targets]
    left = others + sum(map(min, costs, sizes))
    assert 0.6 * whole - 32 < left <= 0.6 * whole
    assert callbacks[0].firings[-1].step == 40


def test_a_resumed_training_does_the_same(tmp_path):
    recipe = steered(kc.GroupLasso(1.0), dead_groups=0.4, end=25, every=10)
    whole = compiled(recipe)
    fit(whole, recipe.callbacks(whole), epochs=4)
    model = compiled(recipe)
    callbacks = recipe.callbacks(model)
    fit(model, callbacks, epochs=2)
    model.save(tmp_path / "half.keras")
    state = callbacks[0].get_state()
    model = keras.models.load_model(tmp_path / "half.keras")
    callbacks = recipe.callbacks(model)
    callbacks[0].set_state(state)
    fit(model, callbacks, epochs=4, initial_epoch=2)
    for ours, theirs in zip(model.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))


def test_a_model_that_is_compiled_anew_is_steered_anew():
    recipe = steered(kc.GroupLasso(1.0), dead_groups=0.4, end=15)
    model = compiled(recipe)
    callbacks = recipe.callbacks(model)
    fit(model, callbacks, epochs=2)
    again = compiled(recipe)
    compiled(recipe, model=model).set_weights(again.get_weights())
    recipe.callbacks(model)
    history = fit(model, callbacks, epochs=2)
    assert [round(value * 32) for value in history["dead_channels"]] == [0, 13]


def test_the_strength_is_a_threshold_over_the_rates_that_are_left():
    target = {"dead_groups": 0.5, "end": 200}
    recipe = steered(kc.GroupLasso(1.0, weighted=False), in_channels=False, **target)
    model = compiled(recipe, rate=0.02)
    weights = {t.name: array(t.read()) for t in kc.find_targets(model)[0] if not t.is_head}
    norms = np.concatenate([np.linalg.norm(w, axis=1) for w in weights.values()])
    history = fit(model, recipe.callbacks(model), epochs=1)
    expected = np.sort(norms)[12] / (200 * 0.02)
    assert history["strength"][0] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_reached_is_refused():
    recipe = steered(kc.PartialGroupLasso(1.0, fraction=0.25), dead_groups=0.5, end=10)
    model = compiled(recipe)
    with pytest.raises(ValueError, match=r"is out of reach: .* leaves 0.75 of the groups"):
        fit(model, recipe.callbacks(model), epochs=1)
    recipe = steered(kc.GroupLasso(1.0), in_channels=False, parameters=0.5, end=10)
    model = compiled(recipe)
    with pytest.raises(ValueError, match="Give `dead_groups`, or put the rule into `channels`"):
        fit(model, recipe.callbacks(model), epochs=1)


def test_zeros_are_held_by_the_optimizer_of_the_recipe():
    recipe = steered(kc.GroupLasso(1.0), dead_groups=0.5, end=10)
    model = network()
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"Compile the model with the recipe's optimizer"):
        recipe.callbacks(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give exactly one of"),
        ({"dead_groups": 0.5, "parameters": 0.5}, ValueError, "give exactly one of"),
        ({"dead_groups": 1.0}, ValueError, "must be below 1"),
        ({"parameters": 0.0}, ValueError, r"must be in \(0, 1\]"),
        ({"dead_groups": "half"}, TypeError, "must be a number"),
        ({"dead_groups": 0.5, "every": 0}, ValueError, "at least 1"),
        ({"dead_groups": 0.5, "end": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        StrengthController(**arguments)


def test_actions_that_do_not_fit_are_refused():
    lasso, half = kc.GroupLasso(1.0), StrengthController(dead_groups=0.5)
    with pytest.raises(ValueError, match="Give it an `end`"):
        Proximal(lasso, controller=half)
    with pytest.raises(ValueError, match="must be a step at which the action acts"):
        Proximal(lasso, begin=20, controller=half.replace(end=20))
    with pytest.raises(ValueError, match="must be a step at which the action acts"):
        Proximal(lasso, end=10, controller=half.replace(end=20))
    with pytest.raises(ValueError, match="give one"):
        Proximal(lasso, ramp=kc.Ramp(0.0), end=9, controller=half)
    with pytest.raises(TypeError, match="must be a StrengthController"):
        Proximal(lasso, controller=0.5)
    action = Proximal(lasso, end=9, controller=half)
    assert Proximal.from_config(action.get_config()) == action
