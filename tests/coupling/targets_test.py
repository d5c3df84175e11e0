"""Channels gathered to one matrix: against plain loops, and on networks with known numbers."""

import collections
import json

import keras
import numpy as np
import pytest

from keras_compaware import GroupLasso, GroupPruning
from keras_compaware.base import ChannelLayout
from keras_compaware.compaction.dead_channels import live_channels
from keras_compaware.coupling import analyse, coupled_targets
from tests.coupling import networks
from tests.coupling.helpers import array, randomise

ON_JAX = keras.backend.backend() == "jax"
LAYOUTS = {
    "dense, bias, dense": ChannelLayout(
        ((3, 2), (2,), (2, 4)), (1, 0, 0), ((0, 1), (0, 1), (0, 1)), 2
    ),
    "a window before the channels": ChannelLayout(((2, 3, 4),), (2,), ((0, 1, 2, 3),), 4),
    "channels in another order": ChannelLayout(((3, 4),), (1,), ((2, 0, 3, 1),), 4),
    "after flattening": ChannelLayout(((6, 2), (2,)), (0, 0), ((0, 1, 0, 1, 0, 1), (0, 1)), 2),
    "groups of neighbours": ChannelLayout(((4, 3), (4,)), (0, 0), ((0, 0, 1, 1), (0, 0, 1, 1)), 2),
    "behind a concatenation": ChannelLayout(((5, 3), (5,)), (0, 0), ((-1, -1, 0, 1, 2),) * 2, 3),
    "ragged": ChannelLayout(((5, 2), (6,)), (0, 0), ((0, 0, 0, 1, 2), (2, 2, -1, 1, 0, 2)), 3),
    "a channel that is not there": ChannelLayout(
        ((2, 3, 2), (3,)), (1, 0), ((2, -1, 0), (0, 1, 2)), 3
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def numbered(layout, begin=1.0):
    """Weights of a layout in which every entry has another number."""
    weights = []
    for shape in layout.shapes:
        size = int(np.prod(shape))
        weights.append(np.arange(begin, begin + size, dtype="float32").reshape(shape))
        begin += size
    return weights


def slices_of(layout):
    """Yields `(channel, number of the weight, index of one slice)` in the order of the rows."""
    for channel in range(layout.size):
        for number, (axis, index_map) in enumerate(
            zip(layout.axes, layout.index_maps, strict=True)
        ):
            for place, owner in enumerate(index_map):
                if owner == channel:
                    yield channel, number, (*(slice(None),) * axis, place)


def gathered_by_loops(layout, weights):
    found = collections.defaultdict(list)
    for channel, number, index in slices_of(layout):
        found[channel, number].extend(weights[number][index].reshape(-1))
    columns = []
    for number in range(len(weights)):
        width = max(len(found[channel, number]) for channel in range(layout.size))
        rows = [found[channel, number] for channel in range(layout.size)]
        columns.append(np.array([[*row, *[0.0] * (width - len(row))] for row in rows]))
    return np.concatenate(columns, axis=1)


def as_tensors(weights, dtypes=None):
    dtypes = dtypes or ["float32"] * len(weights)
    return [
        keras.ops.cast(keras.ops.convert_to_tensor(weight), dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    ]


# ---- layouts ----------------------------------------------------------------------------------


@layouts
def test_gathering_is_what_loops_find(layout):
    weights = numbered(layout)
    rows = array(layout.gather(as_tensors(weights)))
    assert rows.shape == layout.shape
    np.testing.assert_array_equal(rows, gathered_by_loops(layout, weights))


@layouts
def test_scattering_overwrites_the_slices_of_channels_and_nothing_else(layout):
    old, new = numbered(layout), numbered(layout, begin=-500.0)
    expected = [weight.copy() for weight in old]
    for _, number, index in slices_of(layout):
        expected[number][index] = new[number][index]
    rows = keras.ops.convert_to_tensor(gathered_by_loops(layout, new).astype("float32"))
    received = layout.scatter(rows, as_tensors(old))
    assert len(received) == len(expected)
    for result, weight in zip(received, expected, strict=True):
        np.testing.assert_array_equal(array(result), weight)
    assert layout.num_parameters == sum(
        np.count_nonzero(weight != before) for weight, before in zip(expected, old, strict=True)
    )


@layouts
def test_reading_and_writing_back_changes_nothing(layout):
    weights = as_tensors(numbered(layout))
    back = layout.scatter(layout.gather(weights), weights)
    for before, after in zip(weights, back, strict=True):
        np.testing.assert_array_equal(array(after), array(before))


def test_what_fills_up_the_rows_is_not_written():
    layout = LAYOUTS["ragged"]
    weights = as_tensors([np.zeros((5, 2), "float32"), np.zeros(6, "float32")])
    ones, zeros = layout.scatter(keras.ops.ones(layout.shape), weights)
    np.testing.assert_array_equal(array(ones), np.ones((5, 2)))
    np.testing.assert_array_equal(array(zeros), [1, 1, 0, 1, 1, 1])
    assert layout.shape == (3, 3 * 2 + 3)
    assert layout.num_parameters == 5 * 2 + 5


@pytest.mark.parametrize(
    ("dtypes", "together"),
    [
        (("bfloat16", "float32", "bfloat16"), "float32"),
        (("float32", "float16", "float16"), "float32"),
        (("float16", "float16", "float16"), "float16"),
    ],
)
def test_weights_keep_their_dtypes(dtypes, together):
    layout = LAYOUTS["dense, bias, dense"]
    weights = as_tensors(numbered(layout), dtypes)
    rows = layout.gather(weights)
    assert keras.backend.standardize_dtype(rows.dtype) == together
    scattered = layout.scatter(2 * rows, weights)
    for before, after, dtype in zip(weights, scattered, dtypes, strict=True):
        assert keras.backend.standardize_dtype(after.dtype) == dtype
        expected = 2 * array(keras.ops.cast(before, "float32"))
        np.testing.assert_array_equal(array(keras.ops.cast(after, "float32")), expected)


def test_layouts_are_values():
    layout = LAYOUTS["ragged"]
    config = keras.saving.serialize_keras_object(layout)
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    assert again == layout
    assert hash(again) == hash(layout)
    weights = numbered(layout)
    np.testing.assert_array_equal(
        array(again.gather(as_tensors(weights))), gathered_by_loops(layout, weights)
    )
    in_lists = ChannelLayout([[5, 2], [6]], [0, 0], [list(m) for m in layout.index_maps], 3)
    assert in_lists == layout
    assert hash(in_lists) == hash(layout)
    assert len(set(LAYOUTS.values())) == len(LAYOUTS)
    other = ChannelLayout(layout.shapes, layout.axes, (layout.index_maps[0], (2, 2, 0, 1, 0, 2)), 3)
    assert other != layout


# ---- targets of networks ----------------------------------------------------------------------


def targets_of(model):
    return {target.name: target for target in coupled_targets(model)[0]}


def chain():
    """Dense(2 -> 2), BatchNormalization, Dense(2 -> 1): every number is known."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="hidden"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    values = [[[1, 2], [3, 4]], [5, 6], [7, 8], [9, 10], [100, 101], [102, 103], [[11], [12]], [13]]
    for variable, value in zip(model.weights, values, strict=True):
        variable.assign(value)
    return model


def test_a_row_holds_all_that_belongs_to_a_channel():
    model = chain()
    (target,), skipped = coupled_targets(model)
    assert target.name == "hidden/channels"
    assert target.layer is model.get_layer("hidden")
    assert (target.axes.inputs, target.axes.outputs) == ((0,), (1,))
    assert not target.is_head
    # incoming, bias, gamma, beta, outgoing; moving statistics are not trained
    expected = [[1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12]]
    np.testing.assert_array_equal(array(target.read()), expected)
    assert (target.shape, target.num_parameters, target.dtype) == ((2, 6), 12, "float32")
    reasons = {entry.name: entry.reason for entry in skipped}
    assert reasons["head/channels"] == "it is an output of the model"


def test_writing_a_target_reaches_every_weight():
    model = chain()
    (target,), _ = coupled_targets(model)
    target.write(keras.ops.convert_to_tensor(-array(target.read())))
    values = [[[-1, -2], [-3, -4]], [-5, -6], [-7, -8], [-9, -10], [100, 101], [102, 103]]
    for variable, value in zip(model.weights, [*values, [[-11], [-12]], [13]], strict=True):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.parametrize("halves", ["hidden", "head"])
def test_layers_of_different_precision_meet_in_the_wider_one(halves):
    policy = {name: "bfloat16" if name == halves else "float32" for name in ("hidden", "head")}
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="hidden", dtype=policy["hidden"]),
            keras.layers.Dense(1, name="head", dtype=policy["head"]),
        ]
    )
    (target,), _ = coupled_targets(model)
    rows = target.read()
    assert target.dtype == keras.backend.standardize_dtype(rows.dtype) == "float32"
    target.write(keras.ops.ones(target.shape))
    for layer in model.layers:
        assert layer.kernel.dtype == policy[layer.name]
        kernel = array(keras.ops.cast(layer.kernel, "float32"))
        np.testing.assert_array_equal(kernel, np.ones_like(kernel))


def planted(model):
    """Gives every weight a number of its own; returns `{number: name}`."""
    names = {}
    for number, variable in enumerate(model.weights, 1):
        variable.assign(np.full(variable.shape, number, "float32"))
        names[number] = variable.path
    return names


# Of every space: number of channels, and how many entries of which weight a channel has.
CONTENTS = {
    "residual": {
        "stem/channels": (
            8,
            {
                "stem/kernel": 27,
                "stem/bias": 1,
                "bn/gamma": 1,
                "bn/beta": 1,
                "a/kernel": 9 * 6,
                "b/kernel": 9 * 6,
                "b/bias": 1,
                "head/kernel": 3,
            },
        ),
        "a/channels": (6, {"a/kernel": 72, "gamma": 1, "beta": 1, "b/kernel": 72}),
    },
    "concatenation": {
        "a/channels": (
            4,
            {"a/kernel": 27, "a/bias": 1, "bn/gamma": 1, "bn/beta": 1, "head/kernel": 64 * 3},
        ),
        "b/channels": (
            5,
            {"b/kernel": 3, "b/bias": 1, "bn/gamma": 1, "bn/beta": 1, "head/kernel": 64 * 3},
        ),
    },
    # A layer that adds to its own input: its kernel belongs to the channel that it reads.
    "tokens": {
        "embedding/channels": (
            6,
            {"embedding/embeddings": 5, "a/kernel": 6, "a/bias": 1, "head/kernel": 2},
        )
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if ON_JAX and name != "tokens" else name
        for name in CONTENTS
    ],
)
def test_rows_of_networks_hold_the_weights_of_their_channels(name):
    model = getattr(networks, name)()
    names = planted(model)
    targets = targets_of(model)
    assert list(targets) == list(CONTENTS[name])
    for target, (size, contents) in zip(targets.values(), CONTENTS[name].values(), strict=True):
        rows = array(target.read())
        assert target.shape == rows.shape == (size, sum(contents.values()))
        for row in rows:
            counts = collections.Counter(names[int(number)] for number in row)
            assert len(counts) == len(contents)
            for path, count in counts.items():
                (key,) = [key for key in contents if path.endswith(key)]
                assert count == contents[key], path


def test_a_concatenation_gives_each_space_its_own_entries():
    model = networks.concatenation()
    gamma = model.get_layer("bn").gamma
    gamma.assign(np.arange(9.0) + 100)
    found = {
        name: [set(row[row >= 100].tolist()) for row in array(target.read())]
        for name, target in targets_of(model).items()
    }
    assert found == {
        "a/channels": [{100.0}, {101.0}, {102.0}, {103.0}],
        "b/channels": [{104.0}, {105.0}, {106.0}, {107.0}, {108.0}],
    }


def test_a_layer_that_adds_to_its_own_input_stands_by_what_it_reads():
    model = networks.tokens()
    kernel = model.get_layer("a").kernel
    kernel.assign(np.repeat(np.arange(101.0, 107.0)[:, None], 6, axis=1))  # by input
    (target,) = targets_of(model).values()
    for channel, row in enumerate(array(target.read())):
        assert row[row > 100].tolist() == [101.0 + channel] * 6


def test_frozen_layers_are_skipped_with_the_reason():
    model = networks.residual()
    model.get_layer("b").trainable = False
    targets, skipped = coupled_targets(model)
    assert targets == []
    reasons = {entry.name: entry for entry in skipped}
    assert reasons["stem/channels"].reason == "'b/kernel' is frozen (trainable=False)"
    assert reasons["a/channels"].reason == "'b/kernel' is frozen (trainable=False)"
    assert reasons["a/channels"].layer is model.get_layer("a")


def test_a_frozen_normalisation_leaves_the_space_to_its_kernels():
    """Its scale is no parameter then: the row holds what is trained."""
    model = networks.concatenation()
    model.get_layer("bn").trainable = False
    targets = targets_of(model)
    assert targets["a/channels"].shape == (4, 27 + 1 + 64 * 3)
    assert targets["b/channels"].shape == (5, 3 + 1 + 64 * 3)


def test_models_without_a_graph_are_refused():
    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="graph"):
        coupled_targets(Own())
    with pytest.raises(TypeError, match=r"keras\.Model, received int"):
        coupled_targets(3)


# ---- maps on targets --------------------------------------------------------------------------


def rows_of_the_first_space(model):
    """The rows of the residual network's space "a", in NumPy, from the weights themselves."""
    a, b = model.get_layer("a"), model.get_layer("b")
    norm = next(
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.name != "bn"
    )
    return np.stack(
        [
            np.concatenate(
                [
                    array(a.kernel)[..., channel].reshape(-1),
                    [array(norm.gamma)[channel], array(norm.beta)[channel]],
                    array(b.kernel)[..., channel, :].reshape(-1),
                ]
            )
            for channel in range(6)
        ]
    ).astype("float64")


def test_regularizers_and_pruning_see_one_group_for_each_channel():
    model = randomise(networks.residual())
    target = targets_of(model)["a/channels"]
    rows = rows_of_the_first_space(model)
    norms = np.linalg.norm(rows, axis=1)
    width = 72 + 2 + 72
    w = target.read()
    lasso = GroupLasso(0.3)
    penalty = float(keras.ops.convert_to_numpy(lasso(w, target.axes)))
    assert penalty == pytest.approx(0.3 * np.sqrt(width) * norms.sum(), rel=1e-5)
    # Between the third and the fourth norm: three rows vanish.
    limit = np.sort(norms)[2:4].mean()
    step = limit / (0.3 * np.sqrt(width))
    target.write(lasso.prox(w, step, target.axes))
    expected = rows * np.maximum(0, 1 - limit / norms)[:, None]
    np.testing.assert_allclose(rows_of_the_first_space(model), expected, atol=1e-6)
    assert np.count_nonzero(rows_of_the_first_space(model).any(axis=1)) == 3

    target.write(w)
    target.write(GroupPruning(0.5)(w, axes=target.axes))
    kept = norms >= np.sort(norms)[3]
    np.testing.assert_array_equal(rows_of_the_first_space(model), rows * kept[:, None])


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(network, marks=pytest.mark.slow)
        if ON_JAX and network.__name__ not in ("concatenation", "tokens", "shared_layer")
        else network
        for network in networks.NETWORKS
    ],
    ids=lambda network: network.__name__,
)
def test_a_channel_whose_row_is_zero_is_dead_and_no_other(network):
    model = randomise(network())
    targets, _ = coupled_targets(model)
    assert targets
    for target in targets:
        rows = np.array(array(target.read()))
        rows[1] = 0
        target.write(keras.ops.convert_to_tensor(rows))
    masks = live_channels(analyse(model))
    assert sorted(f"{name}/channels" for name in masks) == sorted(t.name for t in targets)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.arange(mask.size) != 1, err_msg=name)
