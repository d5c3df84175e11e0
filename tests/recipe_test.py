"""Recipes: selection, plans, wrapping, saving, and one-shot compression."""

import json

import keras
import numpy as np
import pytest

from keras_compaware import (
    AtEnd,
    Chain,
    Compressed,
    Every,
    GroupLasso,
    KernelAxes,
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
    UniformQuantization,
    compact,
    compress,
    register_kernels,
)
from tests.marks import slow_on_jax

PRUNE = MagnitudePruning(0.5)
EVERY = Every(10, PRUNE)


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(5, name="head"),
        ],
        name="net",
    )


def nested():
    """Two models deep: backbone/block1/conv."""

    def block(name, channels):
        image = keras.Input((6, 6, channels))
        convolution = keras.layers.Conv2D(4, 3, padding="same", name="conv")
        return keras.Model(image, convolution(image), name=name)

    image = keras.Input((6, 6, 2))
    backbone = keras.Model(image, block("block2", 4)(block("block1", 2)(image)), name="backbone")
    inputs = keras.Input((6, 6, 2))
    y = keras.layers.Flatten(name="flatten")(backbone(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(y), name="net")


def selected(recipe, model):
    return [row.name for row in recipe.plan(model).rows if row.actions]


def weights(model):
    return [keras.ops.convert_to_numpy(v) for v in model.variables]


@keras.saving.register_keras_serializable("recipe_test")
class Custom(keras.layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 4), name="table")

    def call(self, x):
        return keras.ops.matmul(x, self.table)


# ---- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ["conv/kernel", "hidden/kernel"]),
        ("hidden", ["hidden/kernel"]),
        ("^(conv|head)/kernel$", ["conv/kernel", "head/kernel"]),
        (".", ["conv/kernel", "hidden/kernel", "head/kernel"]),
        (keras.layers.Dense, ["hidden/kernel", "head/kernel"]),
        (keras.layers.Layer, ["conv/kernel", "hidden/kernel", "head/kernel"]),
        (lambda target: target.num_parameters > 200, ["hidden/kernel"]),
    ],
    ids=["None", "regex", "anchored", "all", "class", "base class", "predicate"],
)
def test_where(where, names):
    model = network()
    assert selected(Recipe([Rule(where, EVERY)]), model) == names
    plan = OccasionalCompression(PRUNE, 10, where=where)._resolve(model)
    assert [assignment.target.name for assignment in plan] == names


def test_where_a_layer_or_a_nested_model():
    model = network()
    assert selected(Recipe([Rule(model.layers[2], EVERY)]), model) == ["hidden/kernel"]
    model = nested()
    backbone = model.get_layer("backbone")
    assert selected(Recipe([Rule(backbone, EVERY)]), model) == [
        "backbone/block1/conv/kernel",
        "backbone/block2/conv/kernel",
    ]


def test_names_of_nested_models_are_paths_and_unique():
    rows = Recipe([Rule(".", EVERY)]).plan(nested()).rows
    assert [row.name for row in rows] == [
        "backbone/block1/conv/kernel",
        "backbone/block2/conv/kernel",
        "head/kernel",
    ]


def test_first_match_wins():
    recipe = Recipe([Rule("head", Skip("ours")), Rule(keras.layers.Dense, EVERY)])
    rows = {row.name: row for row in recipe.plan(network()).rows}
    assert rows["head/kernel"].actions == ()
    assert rows["head/kernel"].reason == "ours"
    assert rows["hidden/kernel"].actions == (EVERY,)
    assert rows["conv/kernel"].reason == "no rule takes it"


def test_shadowed_rule_raises():
    recipe = Recipe([Rule(keras.layers.Dense, EVERY), Rule("head", Skip())])
    with pytest.raises(
        ValueError, match=r"Rule 2, .*takes no kernel: 'head/kernel' is taken by rule 1"
    ):
        recipe.plan(network())


def test_typo_raises_and_lists_the_names():
    recipe = Recipe([Rule(".", EVERY), Rule("hiden", EVERY)])
    names = "conv/kernel, hidden/kernel, head/kernel"
    with pytest.raises(ValueError, match=f"Rule 2, .*'hiden'.* takes no kernel: .*'net': {names}"):
        recipe.plan(network())


def test_predicates_are_asked_for_targets_only():
    """A layer that is not known has no kernel shape to be asked for."""
    model = keras.Sequential([keras.Input((6,)), Custom(name="mystery"), keras.layers.Dense(3)])
    recipe = Recipe([Rule(lambda target: target.shape[0] == 4, EVERY)])
    assert len(selected(recipe, model)) == 1
    with pytest.raises(ValueError, match="takes no kernel"):
        Recipe([Rule(lambda target: target.shape[0] == 99, EVERY)]).plan(model)


def test_rank_above_the_kernel_names_the_target():
    with pytest.raises(
        ValueError, match=r"Target 'head/kernel': .*rank=6.*largest possible rank 5"
    ):
        Recipe([Rule("head", Every(10, LowRank(rank=6)))]).plan(network())


def test_what_saves_nothing_is_left_alone():
    recipe = Recipe([Rule("head", Every(10, LowRank(rank=4))), Rule("hidden", EVERY)])
    row = recipe.plan(network()).rows[-1]
    assert (row.name, row.actions) == ("head/kernel", ())
    assert row.reason == "rank 4 saves nothing on a 16 x 5 matrix (84 parameters instead of 80)"


def test_a_recipe_that_does_nothing_raises():
    model = network()
    recipe = Recipe([Rule("head", Every(10, LowRank(rank=4)))])
    assert recipe.plan(model).assignments == ()
    with pytest.raises(ValueError, match="nothing to compress"):
        recipe.callbacks(model)
    (callback,) = Recipe([Rule(".", Skip())]).callbacks(model)
    model.compile("sgd", "mse")
    before = weights(model)
    model.evaluate(np.zeros((2, 8, 8, 3)), np.zeros((2, 5)), callbacks=[callback], verbose=0)
    for one, other in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- plans --------------------------------------------------------------------------------------


def test_plan_text():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            Custom(name="mystery"),
            keras.layers.Dense(20, name="second"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    recipe = Recipe(
        [
            Rule("first", Every(100, Chain([LowRank(rank=2), UniformQuantization(8)]), begin=5)),
            Rule("second", Proximal(GroupLasso(1e-4)), AtEnd(PRUNE)),
        ]
    )
    assert str(recipe.plan(model)).splitlines() == [
        "kernel         layer   shape  what happens",
        "-" * 133,
        "first/kernel   Dense   6x8    Every(every=100, constraint=Chain(compressors="
        "[LowRank(rank=2), UniformQuantization(bits=8)]), begin=5)",
        "second/kernel  Dense   4x20   Proximal(regularizer=GroupLasso(strength=0.0001)) + "
        "AtEnd(compressor=MagnitudePruning(sparsity=0.5))",
        "head/kernel    Dense   20x3   left alone: it produces the model's output",
        "mystery/table  Custom         left alone: no rule for the layer Custom: "
        "register_kernels(Custom, table=...)",
    ]
    rows = json.loads(json.dumps(recipe.plan(model).to_json()))
    assert rows[2] == {
        "name": "head/kernel",
        "layer": "Dense",
        "shape": [20, 3],
        "actions": [],
        "reason": "it produces the model's output",
    }


def test_plan_changes_nothing():
    model = nested()
    model.compile("adam", "mse")
    before = weights(model)
    first = str(Recipe([Rule(".", EVERY)]).plan(model))
    assert first == str(Recipe([Rule(".", EVERY)]).plan(model))
    assert not model.optimizer.built
    for one, other in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tied_layers_are_one_target():
    shared = keras.layers.Dense(6, name="shared")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(shared(shared(inputs))))
    rows = Recipe([Rule(None, EVERY)]).plan(model).rows
    assert [row.name for row in rows] == ["shared/kernel", "head/kernel"]


def test_strict():
    model = keras.Sequential(
        [keras.Input((6,)), Custom(name="mystery"), keras.layers.Dense(3, name="d")]
    )
    rules = [Rule("d/", EVERY)]
    Recipe(rules).plan(model)
    with pytest.raises(
        ValueError, match=r"strict=True.*mystery/table: no rule for the layer Custom"
    ):
        Recipe(rules, strict=True).plan(model)
    waived = Recipe([Rule("mystery", Skip()), *rules], strict=True)
    assert selected(waived, model) == ["d/kernel"]
    with pytest.raises(ValueError, match="matches only what cannot be compressed: mystery/table"):
        Recipe([Rule("mystery", EVERY), *rules]).plan(model)


def test_strict_counts_frozen_layers():
    model = network()
    model.get_layer("conv").trainable = False
    recipe = Recipe([Rule(keras.layers.Dense, EVERY)], strict=True)
    with pytest.raises(ValueError, match=r"conv: frozen"):
        recipe.plan(model)


def test_a_registered_layer_is_known():
    class Mixer(Custom):
        pass

    register_kernels(Mixer, table=KernelAxes(inputs=(0,), outputs=(1,)))
    model = keras.Sequential([keras.Input((6,)), Mixer(name="mixer"), keras.layers.Dense(3)])
    assert selected(Recipe([Rule(None, EVERY)], strict=True), model) == ["mixer/table"]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Rule("a"), ValueError, "at least one action"),
        (lambda: Rule("a", PRUNE), TypeError, r"put into an action: Every\("),
        (lambda: Rule("(", EVERY), ValueError, "not a valid regular expression"),
        (lambda: Rule(3, EVERY), TypeError, "`where` must be"),
        (lambda: Rule(dict, EVERY), TypeError, "`where` must be"),
        (lambda: Rule("a", Skip(), EVERY), ValueError, "Skip stands alone"),
        (
            lambda: Rule("a", Proximal(GroupLasso(1.0)), Penalty(GroupLasso(1.0))),
            ValueError,
            "not by both",
        ),
        (lambda: Rule("a", AtEnd(PRUNE), AtEnd(PRUNE)), ValueError, "AtEnd may be given once"),
        (lambda: Recipe([]), ValueError, "at least one rule"),
        (lambda: Recipe([EVERY]), TypeError, "must be a sequence of Rule"),
        (lambda: OccasionalCompression(PRUNE, 0), ValueError, "`every` must be at least 1"),
        (
            lambda: OccasionalCompression(PRUNE, 5, begin=9, end=9),
            ValueError,
            "greater than `begin`",
        ),
        (lambda: OccasionalCompression("prune", 5), TypeError, "keras.constraints.Constraint"),
        (lambda: OccasionalCompression(PRUNE, 5, where=7), TypeError, "`where` must be"),
        (
            lambda: OccasionalCompression(LowRank(energy=0.9), 5, ramp=Ramp(1.0, 0, 9)),
            ValueError,
            "no budget that a ramp could drive",
        ),
        (lambda: compress(network(), "prune"), TypeError, "Expected a Recipe or a Compressor"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ---- saving -------------------------------------------------------------------------------------

RAMP = Ramp(0.1, 5, 50, "cosine", 2.0)
RECIPE = Recipe(
    [
        Rule("head", Skip("because")),
        Rule(keras.layers.Conv2D, Every(7, LowRank(ratio=0.25, split="spatial"), 3, 90)),
        Rule(Custom, Every(7, PRUNE, ramp=RAMP), AtEnd(UniformQuantization(4, axis="outputs"))),
        Rule("a", StraightThrough(Chain([LowRank(rank=2), UniformQuantization(8)]), every=9)),
        Rule("b", Proximal(PartialGroupLasso(1e-3, fraction=0.25), 5, 1, 80, RAMP), AtEnd(PRUNE)),
        Rule("c", Penalty(NuclearNorm(1e-4))),
        Rule(None, Every(10, keras.constraints.MaxNorm(2.0))),
    ],
    strict=True,
)


def test_recipe_survives_serialisation():
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(RECIPE)))
    restored = keras.saving.deserialize_keras_object(config)
    assert isinstance(restored, Recipe)
    assert restored.strict is True
    assert restored.rules[:-1] == RECIPE.rules[:-1]
    last = restored.rules[-1].actions[0]  # constraints of Keras compare by identity
    assert isinstance(last.constraint, keras.constraints.MaxNorm)
    assert last.constraint.max_value == 2.0
    assert Recipe.from_config(RECIPE.get_config()) == RECIPE


@pytest.mark.parametrize("rule", RECIPE.rules[:-1], ids=lambda rule: repr(rule.where))
def test_rules_and_actions_survive_serialisation(rule):
    for value in (rule, *rule.actions):
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(value)))
        restored = keras.saving.deserialize_keras_object(config)
        assert restored == value
        assert hash(restored) == hash(value)


def test_restored_recipe_plans_the_same():
    recipe = Recipe([Rule("head", Skip()), Rule(keras.layers.Dense, EVERY)])
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(recipe)))
    restored = keras.saving.deserialize_keras_object(config)
    assert str(restored.plan(network())) == str(recipe.plan(network()))


@keras.saving.register_keras_serializable("recipe_test")
def is_wide(target):
    return target.shape[-1] > 8


def test_a_registered_predicate_survives_serialisation():
    recipe = Recipe([Rule(is_wide, EVERY)])
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(recipe)))
    restored = keras.saving.deserialize_keras_object(config)
    assert restored.rules[0].where is is_wide
    assert selected(restored, network()) == ["hidden/kernel"]


def test_what_cannot_be_found_again_cannot_be_saved():
    class Dense(keras.layers.Dense):  # the name of another class
        pass

    with pytest.raises(ValueError, match="register_keras_serializable"):
        Rule(Dense, EVERY).get_config()
    with pytest.raises(ValueError, match="select by name"):
        Rule(network().layers[0], EVERY).get_config()


# ---- wrap ---------------------------------------------------------------------------------------

STRAIGHT = StraightThrough(UniformQuantization(4))


def test_wrap_without_anything_inside_is_the_model_itself():
    model = network()
    assert Recipe([Rule("hidden", EVERY)]).wrap(model) is model


def test_wrap_copies_and_leaves_the_model_alone():
    model = network()
    model.compile(keras.optimizers.Adam(0.003), "mse", metrics=["mae"])
    before = weights(model)
    wrapped = Recipe([Rule("hidden", STRAIGHT), Rule("conv", Penalty(GroupLasso(0.1)))]).wrap(model)
    assert wrapped is not model
    assert isinstance(wrapped.get_layer("hidden"), Compressed)
    assert wrapped.get_layer("conv").kernel_regularizer == GroupLasso(0.1)
    assert model.get_layer("conv").kernel_regularizer is None
    assert isinstance(model.get_layer("hidden"), keras.layers.Dense)
    assert wrapped.compiled
    assert float(keras.ops.convert_to_numpy(wrapped.optimizer.learning_rate)) == pytest.approx(
        0.003
    )
    for one, other in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(one, other)
    (basis,) = wrapped.get_layer("hidden").bases
    same = [variable for variable in wrapped.weights if variable is not basis]
    for one, other in zip(before, same, strict=True):
        np.testing.assert_array_equal(one, keras.ops.convert_to_numpy(other))
    wrapped.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), verbose=0)


def test_penalty_is_in_the_loss():
    model = network()
    wrapped = Recipe([Rule("conv", Penalty(GroupLasso(0.1)))]).wrap(model)
    expected = float(GroupLasso(0.1)(keras.ops.convert_to_numpy(model.get_layer("conv").kernel)))
    (loss,) = wrapped.losses
    assert float(keras.ops.convert_to_numpy(loss)) == pytest.approx(expected, rel=1e-5)


def test_wrapping_twice_changes_nothing():
    recipe = Recipe([Rule("hidden", STRAIGHT), Rule("conv", Penalty(GroupLasso(0.1)))])
    wrapped = recipe.wrap(network())
    assert recipe.wrap(wrapped) is wrapped
    assert len(recipe.callbacks(wrapped)) == 1


def test_callbacks_of_a_model_that_is_not_wrapped_raise():
    for action in (STRAIGHT, Penalty(GroupLasso(0.1))):
        recipe = Recipe([Rule("hidden", action)])
        with pytest.raises(ValueError, match=r"'hidden/kernel' has .*recipe\.wrap\(model\)"):
            recipe.callbacks(network())


def test_wrap_of_nested_models():
    recipe = Recipe([Rule("block2", STRAIGHT)])
    model = nested()
    wrapped = recipe.wrap(model)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype("float32")
    inner = wrapped.get_layer("backbone").get_layer("block2").get_layer("conv")
    assert isinstance(inner, Compressed)
    assert selected(recipe, wrapped) == ["backbone/block2/conv/kernel"]
    assert not np.array_equal(model.predict(x, verbose=0), wrapped.predict(x, verbose=0))


def attentive():
    inputs = keras.Input((4, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def test_a_layer_of_layers_is_wrapped_as_a_whole():
    model = attentive()
    recipe = Recipe([Rule("attention", STRAIGHT)])
    wrapped = recipe.wrap(model)
    assert isinstance(wrapped.get_layer("attention"), Compressed)
    assert selected(recipe, wrapped) == selected(recipe, model)
    assert recipe.wrap(wrapped) is wrapped
    with pytest.raises(ValueError, match=r"is wrapped as a whole, so all its kernels"):
        Recipe([Rule("query", STRAIGHT)]).wrap(model)


@slow_on_jax
def test_recurrent_layers_are_wrapped():
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            keras.layers.Bidirectional(keras.layers.LSTM(4, name="lstm"), name="both"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    recipe = Recipe([Rule("both", STRAIGHT)])
    wrapped = recipe.wrap(model)
    assert len(wrapped.get_layer("both").targets) == 4
    wrapped.compile("sgd", "mse")
    x, y = np.ones((4, 4, 3), "float32"), np.ones((4, 2), "float32")
    wrapped.fit(x, y, verbose=0, callbacks=recipe.callbacks(wrapped))
    small = compact(wrapped).model
    assert type(small.get_layer("both")) is keras.layers.Bidirectional
    np.testing.assert_allclose(
        small.predict(x, verbose=0), wrapped.predict(x, verbose=0), atol=1e-5
    )


def test_a_part_of_another_layer_takes_no_penalty():
    model = attentive()
    (first, *_) = selected(Recipe([Rule("attention", EVERY)]), model)
    assert first.startswith("attention/")
    with pytest.raises(ValueError, match="a part of another layer"):
        Recipe([Rule("attention", Penalty(GroupLasso(0.1)))]).wrap(model)


def test_penalty_on_a_regularized_layer_raises():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer="l2", name="a")]
    )
    with pytest.raises(ValueError, match=r"kernel_regularizer=.* already"):
        Recipe([Rule("a/", Penalty(GroupLasso(0.1)))]).wrap(model)


def test_wrap_of_a_subclassed_model_raises():
    with pytest.raises(ValueError, match="subclassed"):
        Recipe([Rule("inner", STRAIGHT)]).wrap(subclassed())


# ---- compress -----------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("recipe_test")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(8, name="inner")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.inner(x))


def subclassed():
    model = Net()
    model(np.zeros((1, 4), "float32"))
    return model


def zeros(variable):
    return int(np.sum(keras.ops.convert_to_numpy(variable) == 0))


def test_compress_is_pure():
    model = network()
    before = weights(model)
    small = compress(model, PRUNE)
    for one, other in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert zeros(small.get_layer("hidden").kernel) == small.get_layer("hidden").kernel.shape[0] * 8
    assert zeros(small.get_layer("conv").kernel) == 54
    assert zeros(small.get_layer("head").kernel) == 0
    for one, other in zip(model.variables, small.variables, strict=True):
        assert one is not other


def test_compress_by_a_recipe_chains_what_a_rule_has():
    model = network()
    rule = Rule("hidden", Every(5, PRUNE), Proximal(GroupLasso(9.9)), AtEnd(UniformQuantization(2)))
    small = compress(model, Recipe([rule]))
    w = keras.ops.convert_to_numpy(small.get_layer("hidden").kernel)
    assert len(np.unique(np.abs(w))) == 2
    assert np.sum(w == 0) >= w.size // 2
    by_hand = Chain([PRUNE, UniformQuantization(2)])(model.get_layer("hidden").kernel.value)
    np.testing.assert_allclose(w, keras.ops.convert_to_numpy(by_hand), atol=1e-6)


def test_compress_a_subclassed_model():
    model = subclassed()
    small = compress(model, Recipe([Rule("inner", Every(5, PRUNE))]))
    assert type(small) is Net
    assert zeros(small.inner.kernel) == 16
    assert zeros(small.head.kernel) == 0
    assert zeros(model.inner.kernel) == 0
    with pytest.raises(ValueError, match="is not known which these are"):
        compress(model, PRUNE)


def test_compress_a_wrapped_model_drops_its_basis():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            Compressed(keras.layers.Dense(8, name="wide"), LowRank(rank=2)),
            keras.layers.Dense(2, name="head"),
        ]
    )
    model.layers[0].refresh()
    small = compress(model, LowRank(rank=1))
    ((_, forward),) = small.layers[0].forward_kernels()
    latent = keras.ops.convert_to_numpy(small.layers[0].layer.kernel)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(forward), latent)
    assert model.layers[0].is_fitted
    assert np.linalg.matrix_rank(latent, tol=1e-5) == 1


def test_compress_without_a_compressor_raises():
    with pytest.raises(ValueError, match="no compressor for any kernel"):
        compress(network(), Recipe([Rule("hidden", Proximal(GroupLasso(1.0)))]))


def test_final_compressors():
    recipe = Recipe(
        [
            Rule("conv", Every(5, PRUNE), AtEnd(UniformQuantization(4))),
            Rule("hidden", STRAIGHT),
            Rule("head", Proximal(GroupLasso(1.0))),
        ]
    )
    assert recipe.final_compressors(network()) == {
        "conv/kernel": Chain([PRUNE, UniformQuantization(4)]),
        "hidden/kernel": UniformQuantization(4),
    }


def test_an_action_that_saves_nothing_leaves_the_others_of_its_rule():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="small")])
    rule = Rule("small", Every(5, LowRank(rank=2)), AtEnd(UniformQuantization(8)))
    (row,) = Recipe([rule]).plan(model).rows
    assert row.actions == (AtEnd(UniformQuantization(8)),)
    assert "rank 2 saves nothing on a 3 x 4 matrix" in row.reason
    assert "(other actions left out: rank 2 saves nothing" in str(Recipe([rule]).plan(model))
