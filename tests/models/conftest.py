import keras
import pytest


@pytest.fixture
def no_values():
    """Builds models whose weights have shapes and no values: JAX compiles a draw for each shape."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session(free_memory=False)  # forgets the weights that wait for a value
