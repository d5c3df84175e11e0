"""Blocks of KerasHub: their hidden units can be cut, and are counted."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from keras_compaware import measure
from keras_compaware.coupling import analyse, channel_spaces
from keras_compaware.scores import cost
from tests.coupling.helpers import check_law, inputs_of, randomise

hub = pytest.importorskip("keras_hub")

UNITS = 24


def network(block, *extra, mask_zero=False):
    """Tokens through an embedding and a block; `extra` are shapes of what else the block reads."""
    tokens = keras.Input((6,), dtype="int32")
    others = [keras.Input(shape) for shape in extra]
    x = layers.Embedding(9, 8, mask_zero=mask_zero, name="embedding")(tokens)
    x = block(x, *others)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model([tokens, *others], layers.Dense(3, name="head")(x))


def encoder(**arguments):
    return hub.layers.TransformerEncoder(UNITS, 2, name="block", **arguments)


def decoder(**arguments):
    return hub.layers.TransformerDecoder(UNITS, 2, name="block", **arguments)


NETWORKS = {
    "encoder": lambda: network(encoder()),
    "encoder, normalised first": lambda: network(encoder(normalize_first=True, activation="gelu")),
    "encoder, masked": lambda: network(encoder(), mask_zero=True),
    "decoder": lambda: network(decoder()),
    "decoder of what an encoder has read": lambda: network(decoder(), (5, 4)),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_cutting_equals_zeroing(make):
    keras.config.set_floatx("float64")
    try:
        model = make()
        spaces, keep, small = check_law(model)
    finally:
        keras.config.set_floatx("float32")
    assert [space.name for space in spaces.free] == ["block/units"]
    assert small.get_layer("block").intermediate_dim == keep["block/units"].sum() < UNITS
    assert spaces["embedding"].frozen == (
        f"of 'block' ({type(model.get_layer('block')).__name__}) only the hidden units can be cut"
    )


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_costs_are_those_of_the_smaller_model(make):
    model = make()
    analysis = analyse(model)
    keep = {"block/units": np.arange(7)}
    small = kc.shrink(model, keep)
    kept = analysis.keep({"block/units": np.arange(UNITS) < 7})
    for of, measured in ((cost.macs, measure.macs), (cost.parameters, measure.parameters)):
        assert of(model, analysis)(kept) == measured(small) < measured(model)


def test_macs_by_hand():
    model = NETWORKS["decoder of what an encoder has read"]()
    width, length, other = 8, 6, 5
    own = 4 * length * width**2 + 2 * length**2 * width
    cross = 2 * length * width**2 + 2 * other * 4 * width + 2 * length * other * width
    feed_forward = 2 * length * width * UNITS
    assert measure.macs_by_layer(model)["block"] == own + cross + feed_forward


def test_a_budget_and_scores():
    model = randomise(NETWORKS["encoder"]())
    data = [inputs_of(model)]
    for score in ("l1", kc.scores.Activation(data)):
        keep = kc.choose_channels(model, score, budget={"macs": 0.8})
        assert 0 < len(keep["block/units"]) < UNITS
    found = kc.fit_budget(model, data, {"params": 0.9}, ranks=False)
    assert measure.parameters(found.apply(model).model) <= 0.9 * measure.parameters(model)


def test_units_that_an_activation_may_mix_stay():
    model = network(encoder(activation="softmax"))
    assert "softmax of 'block' may mix" in channel_spaces(model)["block/units"].frozen


class Own(hub.layers.TransformerEncoder):
    """A block that computes something else."""

    def call(self, inputs, **arguments):
        return 2 * super().call(inputs, **arguments)


def test_subclasses_have_no_rule():
    assert not channel_spaces(network(Own(UNITS, 2, name="block"))).free


def test_backbones():
    model = hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=UNITS,
        max_sequence_length=6,
    )
    names = [space.name for space in channel_spaces(model).free]
    assert names == ["transformer_layer_0/units", "transformer_layer_1/units"]
