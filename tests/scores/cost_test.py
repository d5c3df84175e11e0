"""What channels would cost, without cutting them, against what is measured when they are cut."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import measure
from keras_compaware.compaction.shrink import shrink
from keras_compaware.coupling import analyse
from keras_compaware.scores import cost
from tests.coupling import networks
from tests.coupling.helpers import random_keep

BACKEND = keras.backend.backend()
FAST_ON_JAX = {"grouped", "split"}


def marks(name):
    return [pytest.mark.slow] if BACKEND == "jax" and name not in FAST_ON_JAX else []


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=make.__name__, marks=marks(make.__name__))
        for make in networks.NETWORKS
    ],
)
def test_equals_what_is_measured(make):
    model = make()
    analysis = analyse(model)
    keep = random_keep(analysis.spaces, share=0.4)
    assert keep
    small, kept = shrink(model, keep), analysis.keep(keep)
    for of, measured in ((cost.parameters, measure.parameters), (cost.macs, measure.macs)):
        count = of(model, analysis)
        assert count(analysis.keep({})) == measured(model)
        assert count(kept) == measured(small) < measured(model)
        assert isinstance(count(kept), int)


def test_by_hand():
    inputs = keras.Input((4, 4, 3))
    x = layers.SeparableConv2D(6, 3, padding="same", name="a")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", use_bias=False, name="b")(x)
    model = keras.Model(inputs, layers.Conv2D(5, 1, use_bias=False, name="z")(x))
    analysis = analyse(model)
    kept = analysis.keep({"a": np.arange(6) < 2})
    # 16 positions: a reads 3 channels in 9 places and writes 2; b makes 4 of them; z reads 4.
    assert cost.macs(model, analysis)(kept) == 16 * (3 * 9 + 3 * 2 + 9 * 4 + 4 * 5)
    assert cost.parameters(model, analysis)(kept) == 3 * 9 + 3 * 2 + 2 + 9 * 4 + 4 * 5


def test_layers_that_are_not_cut_or_not_known_stay_as_they_are():
    class Own(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], 7), name="table")

        def call(self, x):
            return x

    inputs = keras.Input((4, 3))
    x = layers.LSTM(2, name="steps")(Own(name="own")(inputs))
    x = layers.Dense(4, name="a")(x)
    model = keras.Model(inputs, layers.Dense(2, name="z")(x))
    analysis = analyse(model)
    kept = analysis.keep({"a": np.arange(4) < 3})
    # Four gates of 2 units, on 3 inputs and 2 states, in 4 steps.
    assert cost.macs(model, analysis)(kept) == 4 * 4 * 2 * (3 + 2) + 2 * 3 + 3 * 2
    assert cost.parameters(model, analysis)(kept) == 3 * 7 + 4 * 2 * (3 + 2 + 1) + 9 + 8


def test_open_sizes_have_no_macs():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 1, name="a")(inputs)
    model = keras.Model(inputs, layers.Conv2D(2, 1, name="z")(x))
    with pytest.raises(ValueError, match="undefined dimensions"):
        cost.macs(model, analyse(model))
    assert cost.parameters(model, analyse(model))(analyse(model).keep({})) == 16 + 10
