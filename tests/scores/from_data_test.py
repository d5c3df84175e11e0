"""Scores of gradients and activations: values, oracles, and that the model stays as it is."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware.coupling import Channels, channel_spaces, register_channel_rule
from keras_compaware.coupling.flow import LAYER_RULES
from keras_compaware.scores import Activation, Taylor
from tests.coupling import networks as coupled
from tests.coupling.helpers import array, inputs_of, randomise
from tests.marks import slow_on_jax
from tests.scores import networks

BACKEND = keras.backend.backend()


def product():
    """z(a(x)) = (1 * 3 + 2 * 5) x, or with other weights."""
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(2, use_bias=False, name="a"),
            layers.Dense(1, use_bias=False, name="z"),
        ]
    )
    model.set_weights([np.array([[1.0, 2.0]]), np.array([[3.0], [5.0]])])
    model.compile(loss="mse")
    return model


def test_taylor_by_hand():
    # The output is 13 x, dL/dy = 2 (13 x - t); of channel c the weights a_c and z_c each get
    # dL/dy * x * a_c * z_c as gradient times weight.
    batches = [([[1.0]], [[12.0]]), ([[1.0]], [[14.0]]), ([[2.0]], [[26.5]])]
    batches = [(np.array(x), np.array(t)) for x, t in batches]
    change = np.array([2 * 3.0, 2 * 10.0])  # with dL/dy * x = 1
    per_batch = [2.0**2, (-2.0) ** 2, (-1.0 * 2) ** 2]
    found = Taylor(batches, normalize=None)(product())["a"]
    np.testing.assert_allclose(found, np.mean(per_batch) * change**2, rtol=1e-5)
    first = Taylor([batches[0], (np.ones((1, 1)), np.full((1, 1), 13.5))], normalize=None)
    np.testing.assert_allclose(first(product())["a"], 2.5 * change**2, rtol=1e-5)
    limited = Taylor(first.data, 1, None)(product())["a"]
    np.testing.assert_allclose(limited, 4 * change**2, rtol=1e-5)
    weighted = [(*batches[0], np.array([3.0]))]
    found = Taylor(weighted, normalize=None)(product())["a"]
    np.testing.assert_allclose(found, 36 * change**2, rtol=1e-5)


def test_taylor_is_the_slope_of_the_loss():
    # All slices of a channel are scaled by 1 - t: the loss changes by -t times the sum.
    model = randomise(coupled.two_inputs())
    x = inputs_of(model)
    y = {"u": np.ones((2, 2)), "v": np.zeros((2, 2))}
    loss = {"u": "mse", "v": "mae"}
    model.compile(loss=loss, loss_weights={"u": 0.5, "v": 3.0})
    scores = Taylor([(x, y)], normalize=None)(model)["a"]
    space = channel_spaces(model)["a"]
    before = model.get_weights()

    def loss_with(channel, factor):
        for member in space.members:
            if len(member.variable.shape) > 1:
                kernel = np.array(array(member.variable))
                np.moveaxis(kernel, member.axis, 0)[member.index_map == channel] *= factor
                member.variable.assign(kernel)
        u, v = (array(t) for t in keras.tree.flatten(model(x, training=False)))
        model.set_weights(before)
        u, v = u.astype("float64"), v.astype("float64")
        return 0.5 * np.mean((u - 1) ** 2) + 3.0 * np.mean(np.abs(v))

    step = 1e-3
    for channel in range(space.size):
        slope = (loss_with(channel, 1 + step) - loss_with(channel, 1 - step)) / (2 * step)
        assert scores[channel] == pytest.approx(slope**2, rel=0.02, abs=1e-6)


def test_outputs_without_a_loss():
    def scores(loss, weights=None):
        model = randomise(coupled.two_inputs())
        x = inputs_of(model)
        y = {"u": np.ones((2, 2)), "v": np.ones((2, 2))}
        model.compile(loss=loss, loss_weights=weights)
        return Taylor([(x, {name: y[name] for name in loss})], normalize=None)(model)["a"]

    without = scores({"u": "mse"})
    assert without.min() > 0
    expected = scores({"u": "mse", "v": "mse"}, {"u": 1.0, "v": 0.0})
    np.testing.assert_allclose(without, expected, rtol=1e-5)


def everything():
    """A model with whatever changes in training, trained for a few steps, partly frozen."""
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(6, 3, padding="same", kernel_constraint="max_norm", name="a")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(0.3)(layers.Conv2D(4, 1, activity_regularizer="l2", name="b")(x))
    x = layers.Lambda(lambda t: ops.mean(t, (1, 2)), output_shape=(4,))(x)
    model = keras.Model(inputs, layers.Dense(2, name="z")(x))
    model.get_layer("b").trainable = False
    model.compile("adam", lambda y, p: ops.mean((y - p) ** 2, axis=-1), metrics=["mae"])
    rng = np.random.default_rng(0)
    data = rng.normal(size=(6, 4, 4, 3)).astype("float32"), rng.normal(size=(6, 2))
    model.fit(*data, batch_size=3, verbose=0)
    model.get_layer("a").kernel.assign(3 * model.get_layer("a").kernel)  # beyond the constraint
    return model, data


def everything_of(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [array(v).copy() for v in variables], [v.trainable for v in model.variables]


@slow_on_jax
def test_the_model_stays_bit_for_bit():
    model, data = everything()
    state, trainable = everything_of(model)
    compiled = model.optimizer, model.loss
    for score in (Taylor([data, data]), Activation([data])):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a lambda as loss is no reason to warn
            scores = score(model)
        assert set(scores) == {"a"}  # the Lambda layer has no rule, which freezes 'b'
        assert scores["a"].min() > 0
    after, trainable_after = everything_of(model)
    for a, b in zip(state, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert trainable == trainable_after
    assert compiled == (model.optimizer, model.loss)
    history = model.fit(*data, verbose=0).history
    assert set(history) == {"loss", "mae"}


def test_frozen_layers_have_gradients_too():
    data = [(np.ones((1, 1)), np.zeros((1, 1)))]
    expected = Taylor(data)(product())
    model = product()
    model.trainable = False
    model.compile(loss="mse")
    np.testing.assert_allclose(Taylor(data)(model)["a"], expected["a"])
    assert not model.trainable_variables


@slow_on_jax
def test_a_frozen_batch_normalization_stays_in_inference_mode():
    # With batch statistics the loss would not depend on the scale of `a` at all.
    model = networks.planted()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 2))
    model.compile(loss="mse")
    training = Taylor([(x, y)], normalize=None)(model)["a"]
    model.get_layer("norm").trainable = False
    frozen = Taylor([(x, y)], normalize=None)(model)["a"]
    useful = np.setdiff1d(np.arange(6), networks.USELESS)
    assert np.min(np.abs(training / np.maximum(frozen, 1e-12) - 1)[useful]) > 1e-3


def test_planted_channels_are_found():
    model = networks.planted()
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(16, 5)), rng.normal(size=(16, 2))) for _ in range(2)]
    model.compile(loss="mse")
    for score in (Taylor(data), Activation(data)):
        scores = score(model)["a"]
        np.testing.assert_allclose(scores[list(networks.USELESS)], 0, atol=1e-12)
        assert np.delete(scores, networks.USELESS).min() > 1e-6


@pytest.mark.tensorflow
def test_small_gradients_survive_half_precision():
    def scores(policy):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            model = product()
            target = 13.0 - 2e-6  # gradients of 4e-6, far below the normal float16 numbers
            model.add(layers.Rescaling(1e-3))
            model.add(layers.Activation("linear", dtype="float32"))
        finally:
            keras.config.set_dtype_policy(before)
        model.compile(loss=lambda y, p: 1e-3 * (p - y))
        return Taylor([(np.ones((1, 1)), np.full((1, 1), target))])(model)["a"]

    np.testing.assert_allclose(scores("mixed_float16"), scores("float32"), rtol=0.02)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.full((1, 1), 1.0 + index), np.zeros((1, 1))


def test_kinds_of_data():
    model = product()
    batches = [Batches()[i] for i in range(2)]
    for score in (Taylor, Activation):
        expected = score(batches)(model)["a"]
        for data in (Batches(), iter(batches), [list(batch) for batch in batches]):
            np.testing.assert_allclose(score(data)(model)["a"], expected)
    np.testing.assert_allclose(
        Activation([x for x, _ in batches])(model)["a"], Activation(batches)(model)["a"]
    )


X, Y = np.ones((4, 1)), np.ones((4, 1))


@pytest.mark.parametrize("score", [Taylor, Activation])
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X, Y), TypeError, r"iterable of batches\. Received: a tuple.*into a list"),
        (X, TypeError, "Received: a ndarray"),
        ({"x": X}, TypeError, "Received: a dict"),
        (3, TypeError, "Received: a int"),
        ([], ValueError, "`data` yields no batch"),
    ],
)
def test_data_that_are_refused(score, data, error, message):
    with pytest.raises(error, match=message):
        score(data)(product())


def test_refused():
    with pytest.raises(ValueError, match="`num_batches` must be at least 1"):
        Taylor([], 0)
    with pytest.raises(TypeError, match="`num_batches` must be an integer"):
        Activation([], 1.5)
    with pytest.raises(ValueError, match=r"is not compiled.*model\.compile\(loss="):
        Taylor([(X, Y)])(networks.dense_pair())
    with pytest.raises(ValueError, match="the loss needs targets"):
        Taylor([X])(product())
    model = product()
    model.compile(loss=functools.partial(keras.losses.mean_squared_error))
    with pytest.raises(ValueError, match=r"cannot be written down.*a function or a keras"):
        Taylor([(X, Y)])(model)
    assert repr(Taylor([(X, Y)], 2)) == "Taylor(num_batches=2, normalize='mean')"
    other = channel_spaces(product())
    with pytest.raises(ValueError, match=r"'.*kernel' of `spaces` is not one of the model"):
        Taylor([(X, Y)])(product(), other)
    with pytest.raises(ValueError, match=r"holds 1 inputs, and the model '.*' takes 2\."):
        Activation([X])(coupled.two_inputs())
    with pytest.raises(ValueError, match="`spaces` are not channel spaces of the model"):
        Activation([X])(product(), other)


def test_activation_by_hand():
    model = networks.dense_pair()
    model.get_layer("a").bias.assign([0.0, 0.0, 1.0])
    # x @ a + bias: (3, 0, 2), (0, -1, -1), (-3, 0, 0)
    data = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[-1.0, 0.0]])]
    found = Activation(data, normalize=None)(model)["a"]
    np.testing.assert_allclose(found, [2, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(Activation(data, 1, None)(model)["a"], [1.5, 0.5, 1.5])


def test_activation_of_convolutions_in_inference_mode():
    model = networks.convolutions()
    norm = model.get_layer("norm")
    norm.moving_mean.assign([0.0, -1.0])
    norm.moving_variance.assign([4.0 - norm.epsilon, 1.0 - norm.epsilon])
    x = np.concatenate([np.ones((1, 4, 4, 1)), -np.ones((1, 4, 4, 1))])
    # a: 2 and -3 times x; normalised -0.5 * (+-2) / 2 and 4 * (-+3 + 1); after ReLU:
    # (0, 0) for x = 1 and (0.5, 16) for x = -1. b reads them: 1 * 0.5 and -0.5 + 5 * 16.
    found = Activation([x], normalize=None)(model)
    np.testing.assert_allclose(found["a"], [0.25, 8.0], rtol=1e-5)
    np.testing.assert_allclose(found["b"], [0.25, 39.75], rtol=1e-5)


def test_activation_is_the_mean_over_the_layers_that_read():
    # b reads a(x) = (1, 2); z reads a(x) + b(a(x)) = (1 + 3 + 14, 2 + 5 + 22).
    found = Activation([np.ones((1, 1))], normalize=None)(networks.residual())["a"]
    np.testing.assert_allclose(found, [(1 + 18) / 2, (2 + 29) / 2])
    # Behind a concatenation every space has its own entries.
    found = Activation([np.ones((1, 1))], normalize=None)(networks.concatenation())
    np.testing.assert_allclose(found["a"], [1, 2])
    np.testing.assert_allclose(found["b"], [4])


def test_activation_behind_a_flattening():
    inputs = keras.Input((1, 2, 1))
    x = layers.Conv2D(2, 1, use_bias=False, name="a")(inputs)
    model = keras.Model(inputs, layers.Dense(1, name="z")(layers.Flatten()(x)))
    model.get_layer("a").kernel.assign(np.array([1.0, -4.0]).reshape(1, 1, 1, 2))
    found = Activation([np.array([1.0, 3.0]).reshape(1, 1, 2, 1)], normalize=None)(model)
    np.testing.assert_allclose(found["a"], [2.0, 8.0])


@slow_on_jax
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (coupled.residual, "b"),
        (coupled.u_net, "head"),
        (coupled.sequences, "steps"),
        (coupled.frames, "head"),
    ],
)
def test_activation_runs_what_the_model_runs(make, name):
    # What the only layer that reads a space gets is the output of the model up to there.
    model = randomise(make())
    reader = model.get_layer(name)
    x = inputs_of(model)
    values = array(keras.Model(model.inputs[0], reader.input)(x, training=False))
    values = np.abs(values).reshape(-1, values.shape[-1]).mean(axis=0)
    (space,) = (
        space
        for space in channel_spaces(model).free
        if {id(m.variable) for m in space.members if m.role == "consumer"}
        == {id(reader.weights[0])}
    )
    found = Activation([x], normalize=None)(model)[space.name]
    np.testing.assert_allclose(found, values, rtol=1e-4)


def test_activation_under_a_layer_normalization():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(3, name="a"),
            layers.LayerNormalization(),
            layers.Dense(1, name="z"),
        ]
    )
    spaces = channel_spaces(model, allow_inexact=True)
    found = Activation([np.ones((2, 2))])(model, spaces)
    assert list(found) == ["a"]
    assert found["a"].mean() == pytest.approx(1.0)


def test_channels_that_nobody_reads_have_no_activation():
    class Mix(layers.Dense):
        def call(self, x):
            return super().call(x)

    @register_channel_rule(Mix)
    def mix(call, flow):
        flow.carry(call.operation.kernel, 0, flow.ids(call.inputs[0], -1))
        return Channels(flow.produce(call.operation.kernel, 1), -1)

    try:
        model = keras.Sequential([keras.Input((2,)), layers.Dense(3, name="a"), Mix(1, name="z")])
        with pytest.raises(ValueError, match="no layer reads 3 of the 3 channels of the space 'a'"):
            Activation([np.ones((2, 2))])(model)
    finally:
        del LAYER_RULES[Mix]
