"""Units of recurrent layers are removed: the law, weights by hand, files, states, dead units."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import (
    AtEnd,
    Every,
    GroupPruning,
    LowRank,
    Recipe,
    Rule,
    UniformQuantization,
    choose_channels,
    compact,
    compress,
    find_targets,
)
from keras_compaware.compaction.dead_channels import live_channels
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import analyse, channel_spaces
from keras_compaware.layers import LowRankLSTMCell
from keras_compaware.scores import Activation
from tests.coupling import networks
from tests.coupling.helpers import array, check_law, inputs_of, outputs_of, randomise
from tests.marks import slow_on_jax

BACKEND = keras.backend.backend()
# JAX computes in float32 here, and so do products on PyTorch, whatever the policy.
TOLERANCE = {"tensorflow": 1e-12, "torch": 1e-5, "jax": 1e-4}[BACKEND]


def in_front(*steps, shape=(5, 3), batch_size=None, last=None):
    """Layers one after the other, with a Dense layer 'head' behind them."""
    inputs = x = keras.Input(shape, batch_size=batch_size)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, (last or layers.Dense(2, name="head"))(x))


def own_direction():
    backward = layers.GRU(4, go_backwards=True, name="backward")
    return layers.Bidirectional(layers.LSTM(4), backward_layer=backward, name="a")


def merged(mode):
    return layers.Bidirectional(layers.SimpleRNN(4), merge_mode=mode, name="a")


def shared():
    inputs = keras.Input((5, 3))
    layer = layers.LSTM(4, return_sequences=True, name="a")
    x = layer(layer(layers.Dense(4, name="before")(inputs)))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def apart():
    """Both directions without a merge."""
    inputs = keras.Input((5, 3))
    x, y = layers.Bidirectional(layers.GRU(4), merge_mode=None, name="a")(inputs)
    return keras.Model(inputs, [layers.Dense(2, name="u")(x), layers.Dense(2, name="v")(y)])


def nested():
    inner = keras.Sequential([keras.Input((5, 3)), layers.GRU(4, name="a")], name="inner")
    return in_front(inner)


MODELS = {
    "SimpleRNN": lambda: in_front(layers.SimpleRNN(4, name="a")),
    "LSTM": lambda: in_front(layers.LSTM(4, name="a", go_backwards=True)),
    "LSTM without biases": lambda: in_front(layers.LSTM(4, name="a", use_bias=False, unroll=True)),
    "GRU": lambda: in_front(layers.GRU(4, name="a", return_sequences=True)),
    "GRU, reset before": lambda: in_front(layers.GRU(4, name="a", reset_after=False)),
    "RNN": lambda: in_front(layers.RNN(layers.LSTMCell(4), name="a")),
    "two kinds": lambda: in_front(own_direction()),
    "sum": lambda: in_front(merged("sum")),
    "ave": lambda: in_front(merged("ave")),
    "apart": apart,
    "distributed": lambda: in_front(
        layers.TimeDistributed(layers.Bidirectional(layers.GRU(4)), name="a"), shape=(2, 5, 3)
    ),
    "shared": shared,
    "nested": nested,
    "1d": lambda: in_front(layers.ConvLSTM1D(4, 3, name="a"), layers.Flatten(), shape=(2, 6, 3)),
    "3d": lambda: in_front(
        layers.ConvLSTM3D(4, 2, name="a"), layers.Flatten(), shape=(2, 3, 3, 3, 2)
    ),
}
FAST_ON_JAX = {"LSTM", "two kinds"}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (BACKEND == "jax" and name not in FAST_ON_JAX)
        )
        for name in MODELS
    ],
)
def test_law_and_file(name, tmp_path):
    spaces, keep, small = check_law(MODELS[name](), TOLERANCE)
    assert spaces.coverage() == 1.0
    assert keep
    after = {space.name: space.size for space in channel_spaces(small).free}
    assert after == {name: np.count_nonzero(mask) for name, mask in keep.items()}
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    inputs = inputs_of(small)
    for a, b in zip(outputs_of(small, inputs), outputs_of(loaded, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "make", [networks.recurrent, networks.both_directions, networks.translation, networks.films]
)
@slow_on_jax
def test_law_of_networks(make):
    check_law(make(), TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "gates"),
    [
        (lambda: layers.SimpleRNN(3, name="a"), 1),
        (lambda: layers.LSTM(3, name="a"), 4),
        (lambda: layers.GRU(3, name="a"), 3),
        (lambda: layers.GRU(3, name="a", reset_after=False), 3),
        (lambda: layers.ConvLSTM1D(3, 1, name="a"), 4),
    ],
    ids=["SimpleRNN", "LSTM", "GRU", "GRU, reset before", "ConvLSTM1D"],
)
def test_kept_units_in_every_weight(layer, gates):
    shape = (2, 5, 2) if "conv" in layer().__class__.__name__.lower() else (5, 2)
    model = randomise(in_front(layer(), shape=shape))
    small = shrink(model, {"a": [0, 2]})
    before, after = model.get_layer("a"), small.get_layer("a")
    assert type(after) is type(before)
    kept = [3 * gate + unit for gate in range(gates) for unit in (0, 2)]
    kernel, recurrent, bias = map(array, before.weights)
    for received, expected in zip(
        after.weights,
        (kernel[..., kept], recurrent[..., [0, 2], :][..., kept], bias[..., kept]),
        strict=True,
    ):
        np.testing.assert_array_equal(array(received), expected)
    config = before.get_config()
    config["filters" if "filters" in config else "units"] = 2
    assert after.get_config() == config
    np.testing.assert_array_equal(
        array(small.get_layer("head").kernel), array(model.get_layer("head").kernel)[[0, 2]]
    )


def test_members_of_a_layer():
    space = channel_spaces(in_front(layers.LSTM(3, name="a", return_sequences=True)))["a"]
    cell = "a/lstm_cell"
    assert {(m.name, m.axis, m.role) for m in space.members} == {
        (f"{cell}/kernel", 1, "producer"),
        (f"{cell}/recurrent_kernel", 0, "consumer"),
        (f"{cell}/recurrent_kernel", 1, "producer"),
        (f"{cell}/bias", 0, "producer"),
        ("head/kernel", 0, "consumer"),
    }
    maps = {(m.name, m.axis): m.index_map.tolist() for m in space.members}
    assert maps[f"{cell}/recurrent_kernel", 1] == [0, 1, 2] * 4
    assert maps[f"{cell}/recurrent_kernel", 0] == [0, 1, 2]
    names = {target.name for target in find_targets(in_front(layers.LSTM(3, name="a")))[0]}
    assert {f"{cell}/kernel", f"{cell}/recurrent_kernel"} <= names


def test_coverage_counts_recurrent_kernels():
    # kernel 3 x 16 and recurrent kernel 4 x 16 of a layer that cannot be cut; 4 x 2 of the head.
    model = in_front(layers.RNN(OwnCell(4), name="a"), layers.Dense(5, name="b"))
    assert channel_spaces(model).coverage() == pytest.approx((20 + 10) / (48 + 64 + 20 + 10))
    films = in_front(
        layers.ConvLSTM1D(4, 3, name="a", activation="softmax"), layers.Flatten(), shape=(2, 6, 3)
    )
    # The input kernel 3 x 3 x 16, the recurrent one 3 x 4 x 16 and the head 16 x 2.
    assert channel_spaces(films).coverage() == 0.0
    assert sum(np.prod(kernel.shape) for kernel in channel_spaces(films)._kernels) == 144 + 192 + 32


@pytest.mark.usefixtures("double")
def test_states_of_a_stateful_layer_begin_anew():
    model = randomise(in_front(layers.LSTM(4, name="a", stateful=True), batch_size=2))
    x = inputs_of(model)
    small = shrink(model, {"a": [0, 1, 3]})
    assert [tuple(state.shape) for state in small.get_layer("a").states] == [(2, 3)] * 2
    kernel = np.array(array(model.get_layer("head").kernel))
    recurrent = np.array(array(model.get_layer("a").cell.recurrent_kernel))
    kernel[2] = recurrent[2] = 0
    model.get_layer("head").kernel.assign(kernel)
    model.get_layer("a").cell.recurrent_kernel.assign(recurrent)
    first = outputs_of(model, x)[0]
    np.testing.assert_allclose(outputs_of(small, x)[0], first, rtol=0, atol=TOLERANCE)
    second = outputs_of(model, x)[0]
    np.testing.assert_allclose(outputs_of(small, x)[0], second, rtol=0, atol=TOLERANCE)
    assert np.max(np.abs(first - second)) > 1e-3  # the states count


@pytest.mark.parametrize("return_sequences", [False, True])
def test_channels_first(return_sequences):
    inputs = keras.Input((2, 3, 5, 6))
    x = inputs
    for name, sequences in (("a", True), ("b", return_sequences)):
        arguments = {"return_sequences": sequences, "data_format": "channels_first"}
        x = layers.ConvLSTM2D(4, 3, name=name, padding="same", **arguments)(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    spaces = channel_spaces(model)
    assert {space.name: space.size for space in spaces.free} == {"a": 4, "b": 4}
    (read,) = [m for m in spaces["b"].members if m.name == "head/kernel"]
    frames = 2 if return_sequences else 1
    assert read.index_map.tolist() == np.repeat([0, 1, 2, 3], 30).tolist() * frames
    if BACKEND == "torch":  # on others, convolutions of this format need a GPU
        check_law(model, TOLERANCE)


def test_states_are_the_same_channels():
    spaces = channel_spaces(networks.translation())
    found = {(m.name, m.axis, m.role) for m in spaces["encoder"].members}
    for layer in ("encoder", "decoder"):
        assert (f"{layer}/lstm_cell/recurrent_kernel", 0, "consumer") in found
    assert ("memory/kernel", 1, "producer") in {
        (m.name, m.axis, m.role) for m in spaces["memory"].members
    }
    assert ("state/kernel", 0) in {(m.name, m.axis) for m in spaces["memory"].members}


@keras.saving.register_keras_serializable("recurrent_test")
class OwnCell(layers.LSTMCell):
    def call(self, inputs, states, training=False):
        return super().call(inputs, states, training=training)


@keras.saving.register_keras_serializable("recurrent_test")
class OwnLoop(layers.LSTM):
    def inner_loop(self, *args, **kwargs):
        return super().inner_loop(*args, **kwargs)


@keras.saving.register_keras_serializable("recurrent_test")
class OwnCall(layers.LSTM):
    def call(self, sequences, initial_state=None, mask=None, training=False):
        return super().call(sequences, initial_state, mask, training)


def begun_with_an_input():
    inputs, state = keras.Input((5, 3)), keras.Input((4,), name="state")
    x = layers.GRU(4, name="a")(inputs, initial_state=state)
    return keras.Model([inputs, state], layers.Dense(2, name="head")(x))


def begun_with_constants():
    inputs = keras.Input((5, 3), batch_size=2)
    x = layers.GRU(4, name="a")(inputs, initial_state=np.ones((2, 4), "float32"))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def returned_state():
    inputs = keras.Input((5, 3))
    x, state = layers.GRU(4, return_state=True, name="a")(inputs)
    return keras.Model(inputs, [layers.Dense(2, name="head")(x), state])


FREEZES = {
    "an input as state": (begun_with_an_input, "'a' begins with the model's input 'state'"),
    "constants as state": (begun_with_constants, "'a' begins with constants for every channel"),
    "state is an output": (returned_state, "it is an output of the model"),
    "softmax": (
        lambda: in_front(layers.LSTM(4, activation="softmax", name="a")),
        "the activation softmax of 'a' may mix its channels",
    ),
    "softmax of gates": (
        lambda: in_front(layers.GRU(4, recurrent_activation="softmax", name="a")),
        "the activation softmax of 'a' may mix its channels",
    ),
}


@pytest.mark.parametrize(("make", "reason"), FREEZES.values(), ids=FREEZES)
def test_freezes(make, reason):
    assert channel_spaces(make())["a"].frozen == reason


UNKNOWN = {
    "a cell of one's own": (
        lambda: layers.RNN(OwnCell(4), name="a"),
        "the cell of 'a' (OwnCell) is none of SimpleRNNCell, LSTMCell and GRUCell, of which the "
        "units are known",
    ),
    "a cell of low rank": (
        lambda: layers.RNN(LowRankLSTMCell(4, rank=2), name="a"),
        "the cell of 'a' (LowRankLSTMCell) is none of SimpleRNNCell",
    ),
    "a loop of one's own": (
        lambda: OwnLoop(4, name="a"),
        "'a' (OwnLoop) has a `inner_loop` of its own",
    ),
    "a call of one's own": (
        lambda: OwnCall(4, name="a"),
        "'a' (OwnCall) has no rule for channels, for its `call` is not that of LSTM",
    ),
    "a direction of one's own": (
        lambda: layers.Bidirectional(OwnCall(4, name="own"), name="a"),
        "'a/forward_own' (OwnCall) inside 'a' has no rule for channels",
    ),
}


@pytest.mark.parametrize(("make", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_layers_freeze_what_is_around_them(make, reason):
    model = in_front(layers.Dense(3, name="before"), make())
    spaces = channel_spaces(model)
    assert reason in spaces["before"].frozen
    assert len(spaces.free) == 0
    small = shrink(model, {})
    inputs = inputs_of(model)
    np.testing.assert_allclose(outputs_of(small, inputs)[0], outputs_of(model, inputs)[0], 1e-6)


def test_directions_are_cut_in_pairs():
    model = in_front(layers.Bidirectional(layers.LSTM(4), name="a"))
    (space,) = channel_spaces(model).free
    assert space.size == 4
    maps = {(m.name, m.axis): m.index_map.tolist() for m in space.members}
    assert maps["head/kernel", 0] == [0, 1, 2, 3] * 2
    small = shrink(model, {"a": [1, 2]}).get_layer("a")
    assert (small.forward_layer.units, small.backward_layer.units) == (2, 2)
    assert small.backward_layer.go_backwards


# ---- dead units, scores, training ---------------------------------------------------------------


def kill(model, units):
    """Nothing reads these units: neither the head nor the layer itself."""
    for kernel in (model.get_layer("head").kernel, model.get_layer("a").cell.recurrent_kernel):
        values = np.array(array(kernel))
        values[units] = 0
        kernel.assign(values)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_units_that_nothing_reads_are_removed(kind):
    model = randomise(in_front(kind(6, name="a")))
    kill(model, [1, 4])
    masks = live_channels(analyse(model))
    assert np.flatnonzero(masks["a"]).tolist() == [0, 2, 3, 5]
    inputs = inputs_of(model)
    result = compact(model)
    assert [(row.name, row.before, row.after) for row in result.channels] == [("a", 6, 4)]
    np.testing.assert_allclose(
        outputs_of(result.model, inputs)[0], outputs_of(model, inputs)[0], rtol=0, atol=1e-5
    )


def test_a_unit_that_only_the_recurrent_kernel_reads_is_alive():
    model = randomise(in_front(layers.LSTM(4, name="a")))
    values = np.array(array(model.get_layer("head").kernel))
    values[2] = 0
    model.get_layer("head").kernel.assign(values)
    assert live_channels(analyse(model)) == {}


@slow_on_jax
def test_codes_of_kernels_are_cut():
    model = randomise(in_front(layers.LSTM(6, name="a")))
    kill(model, [1])
    recipe = Recipe([Rule("a/", Every(100, LowRank(rank=2)), AtEnd(UniformQuantization(8)))])
    (callback,) = recipe.callbacks(model)
    callback.finish(model)
    result = compact(model, callback.codes)
    kernels = {target.name: array(target.read()) for target in find_targets(result.whole)[0]}
    for name, shape in (("kernel", (3, 20)), ("recurrent_kernel", (5, 20))):
        parts = result.codes[f"a/lstm_cell/{name}"].parts
        left, right = (array(parts[part])[0] for part in ("left", "right"))
        assert kernels[f"a/lstm_cell/{name}"].shape == shape
        np.testing.assert_allclose(left @ right, kernels[f"a/lstm_cell/{name}"], atol=1e-6)


def test_pruned_units_are_removed():
    model = randomise(in_front(layers.GRU(6, name="a")))
    pruned = compress(model, Recipe(channels=[Rule("a", Every(1, GroupPruning(0.5)))]))
    result = compact(pruned)
    assert [(row.before, row.after) for row in result.channels] == [(6, 3)]


def test_budget_and_scores():
    model = randomise(networks.both_directions())
    keep = choose_channels(model, "l2", {"macs": 0.5})
    small = shrink(model, keep)
    assert small.count_params() < model.count_params()
    scores = Activation([inputs_of(model)])(model)
    assert {name: score.shape for name, score in scores.items()} == {"first": (4,), "second": (3,)}


@slow_on_jax
def test_training_goes_on_with_the_optimizer():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5, 3)).astype("float32"), rng.normal(size=(16, 2))
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model = randomise(in_front(layers.LSTM(4, name="a")))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, **fit)
    small = shrink(model, {"a": [0, 3]}, optimizer=True)
    assert int(array(small.optimizer.iterations)) == 4
    before = [np.array(array(weight)) for weight in small.trainable_weights]
    small.fit(x, y, **fit)
    for old, weight in zip(before, small.trainable_weights, strict=True):
        assert np.any(array(weight) != old)
