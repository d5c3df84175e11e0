"""The lasso of entries, and its name beside the score of the same name."""

import json

import keras
import numpy as np
import pytest

import keras_compaware as kc
from tests.laws.helpers import array, value_and_gradient

W = np.array([[3.0, -1.0], [0.5, -2.0]], "float32")


def test_soft_thresholding_by_hand():
    result = array(kc.L1(2.0).prox(W, 0.4))  # threshold 0.8
    np.testing.assert_allclose(result, [[2.2, -0.2], [0, -1.2]], atol=1e-6)
    assert result[1, 0] == 0


def test_the_penalty_is_that_of_keras():
    value, gradient = value_and_gradient(kc.L1(0.3), W)
    expected, expected_gradient = value_and_gradient(keras.regularizers.L1(0.3), W)
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


def test_three_classes_of_this_name_are_told_apart():
    for value in (kc.L1(0.3), kc.scores.L1(), keras.regularizers.L1(0.3)):
        text = json.dumps(keras.saving.serialize_keras_object(value))
        restored = keras.saving.deserialize_keras_object(json.loads(text))
        assert type(restored) is type(value)
    assert kc.L1 is kc.regularizers.L1


@pytest.mark.parametrize(
    ("strength", "error"), [(-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)]
)
def test_bad_strengths_are_refused(strength, error):
    with pytest.raises(error, match="L1: `strength` must be"):
        kc.L1(strength)
