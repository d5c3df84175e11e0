"""What the tests of compaction share."""

import keras
import pytest


@pytest.fixture
def double():
    """Layers compute in float64, where the backend does."""
    before = keras.config.dtype_policy()
    if keras.backend.backend() != "jax":
        keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)
