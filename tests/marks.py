"""Marks that tests share."""

import keras
import pytest


def slow_on_jax(test):
    """A decorator: on JAX, which compiles every operation for every shape, the test is slow."""
    return pytest.mark.slow(test) if keras.backend.backend() == "jax" else test


needs_gates = pytest.mark.skipif(
    "use_gate" not in keras.layers.MultiHeadAttention(1, 1).get_config(),
    reason="this Keras has no gates in attention layers",
)
