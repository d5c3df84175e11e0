"""Ramps against values computed by hand."""

import itertools
import json
import math

import keras
import numpy as np
import pytest

from keras_compaware import Every, MagnitudePruning, Ramp


def test_the_cubic_ramp_of_gradual_pruning():
    ramp = Ramp(initial=0.0, begin=100, end=300)
    assert ramp(0, 0.8) == 0.0
    assert ramp(100, 0.8) == 0.0
    assert ramp(150, 0.8) == pytest.approx(0.8 * (1 - 0.75**3))  # a quarter of the way
    assert ramp(200, 0.8) == pytest.approx(0.8 * 0.875)
    assert ramp(300, 0.8) == 0.8
    assert ramp(10**9, 0.8) == 0.8


def test_a_ramp_downwards():
    """A ratio of parameters falls from one."""
    ramp = Ramp(initial=1.0, begin=0, end=10, power=2)
    assert ramp(5, 0.2) == pytest.approx(0.2 + 0.8 * 0.25)
    assert ramp(10, 0.2) == 0.2


def test_the_cosine_ramp():
    ramp = Ramp(initial=0.1, begin=0, end=6, shape="cosine")
    assert ramp(0, 0.5) == pytest.approx(0.1)
    assert ramp(2, 0.5) == pytest.approx(0.5 - 0.4 * (1 + math.cos(math.pi / 3)) / 2)
    assert ramp(3, 0.5) == pytest.approx(0.3)
    assert ramp(6, 0.5) == 0.5


def test_the_exponential_ramp():
    ramp = Ramp(initial=0.0, begin=0, end=4, shape="exponential", power=math.log(16))
    # r(p) = (16^-p - 1/16) / (15/16): at a half (1/4 - 1/16) / (15/16) = 1/5
    assert ramp(2, 0.5) == pytest.approx(0.5 * 4 / 5)
    assert ramp(0, 0.5) == pytest.approx(0.0)
    assert ramp(4, 0.5) == 0.5


def test_one_shot_waits_for_the_end():
    ramp = Ramp(initial=0.1, begin=5, end=20, shape="one_shot")
    assert [ramp(step, 0.9) for step in (0, 5, 19)] == [pytest.approx(0.1)] * 3
    assert ramp(20, 0.9) == 0.9


@pytest.mark.parametrize("shape", ["polynomial", "cosine", "exponential", "one_shot"])
def test_a_traced_step_gives_the_same_budget(shape):
    ramp = Ramp(initial=0.25, begin=3, end=13, shape=shape, power=2)
    for step in (0, 3, 4, 9, 12, 13, 50):
        traced = float(ramp(keras.ops.convert_to_tensor(step, "int32"), 0.9))
        assert traced == pytest.approx(ramp(step, 0.9), abs=1e-6)
        assert step < 13 or traced == np.float32(0.9)


def test_steps_are_taken_from_the_window_of_the_action():
    action = Every(10, MagnitudePruning(0.8), begin=100, end=200, ramp=Ramp(0.0, power=1))
    assert action.schedule == Ramp(0.0, 100, 200, power=1)
    assert Every(10, MagnitudePruning(0.8), end=200, ramp=Ramp(0.0, 50, 100)).schedule.end == 100
    with pytest.raises(ValueError, match="does not know when the final value is reached"):
        Every(10, MagnitudePruning(0.8), ramp=Ramp(0.0))
    with pytest.raises(ValueError, match="it takes them from an action"):
        Ramp(0.0)(5, 0.8)


@pytest.mark.parametrize("shape", ["polynomial", "cosine", "exponential", "one_shot"])
@pytest.mark.parametrize("final", [0.1, 1 / 3, 0.9, 1e-4])
def test_it_is_monotone_and_ends_at_the_final_value_exactly(shape, final):
    ramp = Ramp(initial=0.05, begin=3, end=53, shape=shape)
    values = [ramp(step, final) for step in range(60)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(step >= 0 for step in steps) if final > 0.05 else all(step <= 0 for step in steps)
    assert values[:4] == [pytest.approx(0.05)] * 4
    assert values[53:] == [final] * 7


def test_the_configuration_is_the_constructor():
    ramp = Ramp(initial=0.25, begin=5, end=50, shape="cosine", power=2.0)
    text = json.dumps(keras.saving.serialize_keras_object(ramp))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again == ramp
    assert hash(again) == hash(ramp)
    assert ramp.get_config() == {
        "initial": 0.25, "begin": 5, "end": 50, "shape": "cosine", "power": 2.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"initial": -0.1}, ValueError, r"`initial` must be in \[0, inf\). Received: -0.1"),
        ({"initial": True}, TypeError, "`initial` must be a number"),
        ({"begin": -1}, ValueError, "`begin` must be at least 0"),
        ({"begin": 1.5}, TypeError, "`begin` must be an integer"),
        (
            {"begin": 10},
            ValueError,
            "`end` must be greater than `begin`. Received: begin=10, end=10",
        ),
        ({"end": 0}, ValueError, "`end` must be at least 1"),
        (
            {"shape": "linear"},
            ValueError,
            "must be one of 'polynomial', 'cosine', 'exponential', 'one_shot'",
        ),
        ({"power": 0}, ValueError, r"`power` must be in \(0, inf\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Ramp(**{"initial": 0.0, "begin": 0, "end": 10, **arguments})
