"""Removing channels: the law, what follows in configurations, what is refused, the optimizer."""

import importlib
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware import GroupLasso, Proximal, Recipe, Rule
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import Channels, channel_spaces, register_channel_rule
from keras_compaware.coupling.flow import LAYER_RULES, OPERATION_RULES
from tests.coupling import networks
from tests.coupling.helpers import (
    array,
    check_law,
    inputs_of,
    outputs_of,
    random_keep,
    randomise,
)
from tests.marks import slow_on_jax

BACKEND = keras.backend.backend()
# JAX computes in float32 unless it is told otherwise before anything runs, and compiles every
# operation for every shape: a few networks stand for all. On PyTorch Keras takes means and products
# of three axes in float32 under any policy.
TOLERANCE = {"tensorflow": 1e-9, "torch": 1e-5, "jax": 1e-3}[BACKEND]
FAST_ON_JAX = {"squeeze_and_excite", "reshapes", "split"}


def marks(name):
    return [pytest.mark.slow] if BACKEND == "jax" and name not in FAST_ON_JAX else []


EVERY = [
    pytest.param(make, id=make.__name__, marks=marks(make.__name__)) for make in networks.NETWORKS
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("make", EVERY)
def test_law(make):
    spaces, keep, small = check_law(make(), TOLERANCE)
    after = channel_spaces(small)
    assert [space.name for space in after] == [space.name for space in spaces]
    for before, space in zip(spaces, after, strict=True):
        assert space.size == np.sum(keep.get(before.name, np.ones(before.size)))


@slow_on_jax
def test_law_in_float32():
    check_law(networks.residual(), 1e-3)


@slow_on_jax
def test_control_wrong_channels_are_noticed():
    # The same number of other channels: the outputs differ, so the law is no matter of shapes.
    model = randomise(networks.residual())
    spaces = channel_spaces(model)
    keep = random_keep(spaces)
    inputs = inputs_of(model)
    (right,) = outputs_of(shrink(model, keep), inputs)
    (wrong,) = outputs_of(shrink(model, {k: np.roll(m, 1) for k, m in keep.items()}), inputs)
    assert np.max(np.abs(right - wrong)) > 0.01 * np.max(np.abs(right))


def test_kept_indices_in_every_weight():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(2, name="z")]
    )
    model.set_weights(
        [
            np.arange(12.0).reshape(3, 4),
            np.arange(4.0),
            10 + np.arange(8.0).reshape(4, 2),
            np.ones(2),
        ]
    )
    small = shrink(model, {"a": np.array([True, False, False, True])})
    expected = [
        [[0, 3], [4, 7], [8, 11]],
        [0, 3],
        [[10, 11], [16, 17]],
        [1, 1],
    ]
    for weight, value in zip(small.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert [layer.name for layer in small.layers] == ["a", "z"]
    assert type(small) is keras.Sequential


def test_nothing_cut_is_a_copy_with_memory_of_its_own():
    model = randomise(networks.squeeze_and_excite())
    small = shrink(model, {})
    for a, b in zip(model.weights, small.weights, strict=True):
        assert a is not b
        np.testing.assert_array_equal(array(a), array(b))
    model.weights[0].assign(model.weights[0] * 0)
    assert np.any(array(small.weights[0]))


@slow_on_jax
def test_configurations_follow():
    small = shrink(networks.squeeze_and_excite(), {"a": [0, 2, 5], "down": [1]})
    (reshape,) = [layer for layer in small.layers if isinstance(layer, layers.Reshape)]
    assert reshape.target_shape == (1, 1, 3)
    assert (small.get_layer("a").filters, small.get_layer("down").filters) == (3, 1)
    small = shrink(networks.grouped(), {"a": [0, 3]})
    layer = small.get_layer("grouped")
    assert (layer.groups, layer.filters, tuple(layer.kernel.shape)) == (2, 4, (3, 3, 3, 4))
    small = shrink(networks.u_net(), {"bottom": [1]})
    (norm,) = [layer for layer in small.layers if isinstance(layer, layers.GroupNormalization)]
    assert (norm.groups, tuple(norm.gamma.shape)) == (1, (2,))


def test_names_inputs_and_structures_stay():
    model = networks.two_inputs()
    small = shrink(model, {"a": [0, 1]})
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
    x = {"first": np.ones((2, 6), "float32"), "second": np.ones((2, 4), "float32")}
    assert set(small(x)) == {"u", "v"}
    unnamed = networks.shared_layer()
    assert shrink(unnamed, {}).layers[0].name == unnamed.layers[0].name


@slow_on_jax
def test_shared_layers_stay_shared_and_nested_models_keep_their_kind():
    small = shrink(networks.nested(), {"stem": [0, 4], "middle/inner/c": [2]})
    middle = small.get_layer("middle")
    assert isinstance(middle.get_layer("sequence"), keras.Sequential)
    assert tuple(middle.get_layer("inner").get_layer("c").kernel.shape) == (3, 3, 2, 1)
    assert len(small.weights) == len(networks.nested().weights)
    assert sum(layer.name == "middle" for layer in small.layers) == 1


@slow_on_jax
def test_trainable_flags_stay():
    model = networks.nested()
    middle = model.get_layer("middle")
    middle.trainable = False
    middle.get_layer("sequence").layers[0].trainable = True
    model.get_layer("head").trainable = False
    small = shrink(model, {"stem": [0, 4]})
    assert [w.trainable for w in small.weights] == [w.trainable for w in model.weights]
    assert {w.trainable for w in small.weights} == {True, False}
    assert small.get_layer("middle").trainable is False


def test_a_functional_subclass_becomes_a_plain_model():
    class Net(keras.Model):
        def __init__(self, width):
            inputs = keras.Input((3,))
            x = layers.Dense(width, name="a")(inputs)
            super().__init__(inputs, layers.Dense(1, name="z")(x))

    small = shrink(Net(4), {"a": [1, 2]})
    assert small.get_layer("a").units == 2


@slow_on_jax
def test_the_file_needs_only_keras(tmp_path):
    model = randomise(networks.nested())
    model.get_layer("stem").kernel_regularizer = GroupLasso(1e-3)
    small = shrink(model, {"stem": [0, 2, 3]})
    path = tmp_path / "small.keras"
    small.save(path)
    with zipfile.ZipFile(path) as file:
        assert b"keras_compaware" not in file.read("config.json")
    inputs = inputs_of(small)
    for a, b in zip(
        outputs_of(small, inputs), outputs_of(keras.saving.load_model(path), inputs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_adapted_layers_and_functions_go_on():
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(0).normal(3, 2, (50, 4)))
    scale = 2.0
    model = keras.Sequential(
        [
            keras.Input((4,)),
            norm,
            layers.Dense(5, name="a"),
            layers.Lambda(lambda x: scale * x),
            layers.Dense(2, name="z"),
        ]
    )
    inputs = inputs_of(model)
    (a,), (b,) = outputs_of(model, inputs), outputs_of(shrink(model, {}), inputs)
    np.testing.assert_allclose(a, b, rtol=1e-6)


@slow_on_jax
def test_what_a_nested_model_leaves_open_stays_open():
    inner_in = keras.Input((None, None, 4))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, padding="same", name="c")(inner_in))
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="a")(inputs)
    y = layers.GlobalMaxPooling2D()(inner(layers.MaxPooling2D(2)(x)))
    x = layers.Concatenate()([layers.GlobalMaxPooling2D()(inner(x)), y])
    check_law(keras.Model(inputs, layers.Dense(2, name="z")(x)), 1e-3)


@slow_on_jax
def test_open_sizes_that_must_be_large():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 40, name="a")(inputs)
    small = shrink(keras.Model(inputs, layers.Conv2D(2, 1, name="z")(x)), {"a": [0, 3]})
    assert tuple(small.get_layer("a").kernel.shape) == (40, 40, 3, 2)


def test_a_registered_rule_edits_the_configuration():
    class Scale(layers.Layer):
        def __init__(self, width, **kwargs):
            super().__init__(**kwargs)
            self.width = width

        def build(self, shape):
            self.factor = self.add_weight(shape=(self.width,), name="factor")

        def call(self, x):
            return x * self.factor

        def get_config(self):
            return {**super().get_config(), "width": self.width}

    @register_channel_rule(Scale)
    def scale(call, flow):
        ids = flow.ids(call.inputs[0], -1)
        flow.carry(call.operation.factor, 0, ids)
        flow.configure(call, lambda keep, config: {"width": keep.count(ids)})
        return Channels(ids, -1)

    try:
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(6, name="a"), Scale(6), layers.Dense(2, name="z")]
        )
        _, _, small = check_law(model, 1e-5)
        assert small.layers[1].width == 4
    finally:
        del LAYER_RULES[Scale]


def test_a_wrong_rule_is_noticed():
    class Twice(layers.Layer):
        def call(self, x):
            return ops.concatenate([x, x[..., :2]], axis=-1)

    @register_channel_rule(Twice)
    def twice(call, flow):
        ids = flow.ids(call.inputs[0], -1)
        return Channels(np.concatenate([ids, ids[:2]]), -1)

    try:
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(6, name="a"), Twice(), layers.Dense(2, name="z")]
        )
        with pytest.raises((RuntimeError, ValueError), match=r"shape"):
            shrink(model, {"a": [2, 3, 4]})
    finally:
        del LAYER_RULES[Twice]


def test_a_layer_that_infers_a_wrong_shape_is_noticed():
    class Halves(layers.Layer):
        """Says that its outputs have the shape of its inputs, which holds for 8 channels only."""

        def compute_output_shape(self, shape):
            return shape

        def call(self, x):
            return ops.reshape(ops.reshape(x, (-1, 2, 4)), (-1, 8))

    @register_channel_rule(Halves)
    def halves(call, flow):
        return flow.channels(call.inputs[0])

    try:
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(8, name="a"), Halves(), layers.Dense(2, name="z")]
        )
        with pytest.raises(RuntimeError, match=r"does not run.*a rule registered"):
            shrink(model, {"a": [2, 3, 4]})
        with pytest.raises(RuntimeError, match="does not run"):
            shrink(model, {"a": [0, 1, 2, 3]})  # two examples would become one
    finally:
        del LAYER_RULES[Halves]


def test_a_size_behind_an_open_batch_is_noticed(monkeypatch):
    def rule(call, flow):  # as the true one, but for the configuration
        ids = flow.channels(call.inputs[0]).ids.reshape(2, 4)
        flow.merge(ids[:1], ids)
        return Channels(ids[0], 2)

    monkeypatch.setitem(OPERATION_RULES, "Reshape", rule)
    inputs = keras.Input((3,))
    x = ops.reshape(layers.Dense(8, name="a")(inputs), (-1, 2, 4))
    model = keras.Model(inputs, layers.Dense(2, name="z")(x))
    with pytest.raises(RuntimeError, match=r"does not take inputs of the shapes \[\(1, 3\)\]"):
        shrink(model, {"a": [0, 1]})


def test_layers_of_keras_alone_need_no_run(monkeypatch):
    module = importlib.import_module("keras_compaware.compaction.shrink")
    runs = []
    monkeypatch.setattr(module, "_check_runs", lambda *args: runs.append(args))
    shrink(networks.sequences(), {"a": [0, 1]})
    assert not runs

    class Own(layers.Dense):
        pass

    own = keras.Sequential([keras.Input((3,)), Own(4, name="a"), layers.Dense(2, name="z")])
    steps = keras.Sequential(
        [keras.Input((5, 3)), layers.TimeDistributed(Own(4), name="a"), layers.Dense(2, name="z")]
    )
    with keras.saving.custom_object_scope({"Own": Own}):
        shrink(own, {"a": [0, 1]})
        shrink(steps, {})
    assert len(runs) == 2


def dense():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(2, name="z")], name="net"
    )


REFUSED = {
    "unknown": ({"b": [0]}, r"no channel space 'b'. Those that can be cut: a\."),
    "frozen": ({"z": [0]}, "'z' is frozen: it is an output of the model"),
    "empty": ({"a": []}, "is empty; at least one"),
    "empty mask": ({"a": [False] * 4}, "is empty; at least one"),
    "out of range": ({"a": [1, 4]}, r"must lie in \[0, 4\). Received indices from 1 to 4"),
    "negative": ({"a": [-1]}, r"must lie in \[0, 4\)"),
    "repeated": ({"a": [1, 1]}, "must increase, without repetitions"),
    "unsorted": ({"a": [2, 1]}, "must increase"),
    "not integers": ({"a": [0.5]}, "must hold integers"),
    "short mask": ({"a": [True, False]}, "a mask of 2 entries for 4 channels"),
    "a table": ({"a": [[0]]}, "must be one list of indices"),
}


@pytest.mark.parametrize(("keep", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        shrink(dense(), keep)


def test_refused_keep_and_models():
    with pytest.raises(TypeError, match="must be a mapping"):
        shrink(dense(), [0, 1])

    class Net(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"subclassed, or not built.*functional or Sequential"):
        shrink(Net(), {})


def test_a_part_of_a_space_without_channels_is_refused():
    inputs = keras.Input((3,))
    a, b, c = (layers.Dense(n, name=name)(inputs) for name, n in (("a", 2), ("b", 3), ("c", 5)))
    x = layers.Add()([layers.Concatenate()([a, b]), c])
    model = keras.Model(inputs, layers.Dense(1, name="z")(x))
    with pytest.raises(ValueError, match="leaves no channel of 'a/kernel'"):
        shrink(model, {"a": [2, 3, 4]})
    assert shrink(model, {"a": [1, 2]}).get_layer("b").units == 1


def test_all_of_a_frozen_space_may_be_kept():
    assert shrink(dense(), {"z": [0, 1]}).count_params() == dense().count_params()


def test_allow_inexact():
    model = randomise(
        keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4, name="a"),
                layers.LayerNormalization(),
                layers.Dense(2, name="z"),
            ]
        )
    )
    with pytest.raises(ValueError, match="mixes its channels"):
        shrink(model, {"a": [0, 1]})
    small = shrink(model, {"a": [0, 1]}, allow_inexact=True)
    assert tuple(small.layers[1].gamma.shape) == (2,)


def training_model(width=6):
    inputs = keras.Input((5,))
    x = layers.Dense(width, activation="relu", name="a")(inputs)
    y = layers.Dense(width, activation="relu", name="b")(x)
    return keras.Model(inputs, layers.Dense(1, name="z")(layers.Add()([x, y])))


def kill(model, dead):
    """Channels of 'a' and 'b' that are zero, that nobody reads, and that stay so in training."""
    a, b, z = (model.get_layer(name) for name in "abz")
    for layer in (a, b):
        kernel, bias = array(layer.kernel).copy(), array(layer.bias).copy()
        kernel[:, dead], bias[dead] = 0, -1
        layer.kernel.assign(kernel)
        layer.bias.assign(bias)
    for layer in (b, z):
        kernel = array(layer.kernel).copy()
        kernel[dead] = 0
        layer.kernel.assign(kernel)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(0.01, 100), amsgrad=True
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_after_dead_channels_are_cut(make):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5)).astype("float32")
    y = x[:, :1] - 2 * x[:, 1:2]
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model = training_model()
    model.compile(make(), "mse")
    dead, alive = [1, 4], [0, 2, 3, 5]
    kill(model, dead)
    model.fit(x, y, **fit)
    small = shrink(model, {"a": alive}, optimizer=True)
    assert small.count_params() < model.count_params()
    assert int(array(small.optimizer.iterations)) == 8
    model.fit(x, y, **fit)
    small.fit(x, y, **fit)
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    expected = array(model.get_layer("b").kernel)[np.ix_(alive, alive)]
    np.testing.assert_allclose(array(small.get_layer("b").kernel), expected, atol=1e-6)
    assert int(array(small.optimizer.iterations)) == 16


def test_a_fresh_optimizer_by_default():
    model = training_model()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(np.ones((4, 5)), np.ones((4, 1)), verbose=0)
    small = shrink(model, {"a": [0, 1]})
    assert small.compiled
    assert int(array(small.optimizer.iterations)) == 0
    assert float(array(small.optimizer.learning_rate)) == pytest.approx(0.02)


def test_slots_of_layers_of_one_name_are_told_apart():
    inputs = keras.Input((3,))
    x = keras.Sequential([layers.Dense(4, name="a")], name="first")(inputs)
    x = keras.Sequential([layers.Dense(3, name="b"), layers.Dense(4, name="a")], name="second")(x)
    model = keras.Model(inputs, layers.Dense(1, name="z")(x))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    slots = model.optimizer.variables[2:]
    for number, (slot, weight) in enumerate(zip(slots, model.trainable_variables, strict=True)):
        slot.assign(np.full(weight.shape, number) + np.arange(weight.shape[-1]) / 10)
    small = shrink(model, {"first/a": [0, 2], "second/a": [1, 2, 3]}, optimizer=True)
    received = [array(slot) for slot in small.optimizer.variables[2:]]
    assert [slot.shape for slot in received] == [tuple(w.shape) for w in small.weights]
    np.testing.assert_allclose(received[1], [1.0, 1.2])
    np.testing.assert_allclose(received[5], [5.1, 5.2, 5.3])


def test_factored_statistics_are_refused():
    model = training_model()
    model.compile(keras.optimizers.Adafactor(), "mse")
    model.fit(np.ones((4, 5)), np.ones((4, 1)), verbose=0)
    with pytest.raises(ValueError, match=r"so it cannot be cut\. Leave out"):
        shrink(model, {"a": [0, 1]}, optimizer=True)
    with pytest.raises(ValueError, match="is not compiled"):
        shrink(training_model(), {}, optimizer=True)


def test_the_wrapper_of_a_recipe_is_taken_off_and_its_state_goes_on():
    model = training_model()
    recipe = Recipe([Rule("a", Proximal(GroupLasso(1e-3)))])
    model.compile(recipe.optimizer(keras.optimizers.Adam(0.01)), "mse")
    callbacks = recipe.callbacks(model)
    model.fit(np.ones((8, 5)), np.ones((8, 1)), verbose=0, callbacks=callbacks)
    small = shrink(model, {"a": [0, 1, 5]}, optimizer=True)
    assert isinstance(small.optimizer, keras.optimizers.Adam)
    assert int(array(small.optimizer.iterations)) == 1
    inner = model.optimizer.inner_optimizer
    for old, new in zip(inner.variables, small.optimizer.variables, strict=True):
        if tuple(old.shape) == (5, 6):
            np.testing.assert_array_equal(array(new), array(old)[:, [0, 1, 5]])
    small.fit(np.ones((8, 5)), np.ones((8, 1)), verbose=0)
