"""Decompositions of stacks, and the polar factor without one."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_compaware._math.backend import compiled, float32_products
from keras_compaware._math.svd import above_rounding, polar_factor, svd

polar = compiled(polar_factor)


def arrays(*tensors):
    return [np.asarray(ops.convert_to_numpy(tensor)) for tensor in tensors]


def exact(matrix):
    left, _, right = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 4, 7), (1, 5, 5), (3, 6, 1), (1, 1, 1)])
def test_svd_of_a_stack(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype("float32")
    left, values, right = arrays(*svd(ops.convert_to_tensor(matrix)))
    k = min(shape[1:])
    assert left.shape == (shape[0], shape[1], k)
    assert values.shape == (shape[0], k)
    assert right.shape == (shape[0], k, shape[2])
    assert np.all(np.diff(values, axis=-1) <= 0)
    np.testing.assert_allclose(left * values[:, None, :] @ right, matrix, atol=1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_svd_of_numbers_that_are_not_finite(number):
    """PyTorch raises an error of its own; the other backends return what is not finite."""
    matrix = np.ones((1, 4, 3), "float32")
    matrix[0, 1, 1] = number
    if keras.backend.backend() == "torch":
        with pytest.raises(FloatingPointError, match="received one with NaN or infinity"):
            svd(ops.convert_to_tensor(matrix))
    else:
        assert not all(np.isfinite(a).all() for a in arrays(*svd(ops.convert_to_tensor(matrix))))


@pytest.mark.parametrize("shape", [(2, 30, 20), (2, 20, 30), (1, 9, 1), (1, 1, 9)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_polar_factor(shape, scale):
    matrix = np.random.default_rng(0).normal(size=shape)
    (found,) = arrays(polar(ops.convert_to_tensor((scale * matrix).astype("float32"))))
    np.testing.assert_allclose(found, exact(matrix), atol=2e-5)


def test_the_polar_factor_of_a_wide_spectrum():
    """Singular values down to 1e-4 of the norm end at one; far smaller ones in between."""
    random = np.random.default_rng(1)
    left, _ = np.linalg.qr(random.normal(size=(40, 6)))
    right, _ = np.linalg.qr(random.normal(size=(6, 6)))
    values = np.array([1, 0.1, 1e-2, 1e-3, 3e-4, 1e-7])
    matrix = (left * values @ right.T)[None]
    (found,) = arrays(polar(ops.convert_to_tensor(matrix.astype("float32"))))
    on_directions = np.diag(left.T @ found[0] @ right)
    np.testing.assert_allclose(on_directions[:5], 1.0, atol=1e-3)
    assert -1e-3 <= on_directions[5] <= 1.001
    assert np.linalg.norm(found[0], 2) <= 1.001


def test_the_polar_factor_of_nothing_is_nothing():
    (found,) = arrays(polar(ops.zeros((2, 4, 3))))
    np.testing.assert_array_equal(found, 0)


def product():
    """1 + 2**-12 needs 12 bits of mantissa; TF32 has 10, bfloat16 7."""
    a = np.full((1, 8, 8), 1 + 2.0**-12, "float32")
    return arrays(ops.matmul(ops.convert_to_tensor(a), ops.ones((1, 8, 8))))[0]


def allowed():
    """Whether the backend may shorten the mantissa of float32 products."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.backends.cuda.matmul.allow_tf32
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.tensor_float_32_execution_enabled()
    import jax

    return jax.config.jax_default_matmul_precision != "float32"


@pytest.fixture
def _shortened():
    """Switches shortened products on, where that is a global switch that is off."""
    if keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = True
        yield
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        yield


@pytest.mark.usefixtures("_shortened")
def test_products_are_full_float32_and_the_setting_is_restored():
    assert allowed()
    with float32_products():
        assert not allowed()
        np.testing.assert_array_equal(product(), 8 * (1 + 2.0**-12))
    assert allowed()
    found = []

    def fail():
        found.append(allowed())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), float32_products():
        fail()
    assert found == [False]
    assert allowed()


def test_a_compiled_function_keeps_its_name_and_takes_no_gradients():
    def double(w):
        """Doubles."""
        return 2 * w

    function = compiled(double)
    assert (function.__name__, function.__doc__) == ("double", "Doubles.")
    np.testing.assert_array_equal(arrays(function(ops.ones((2,))))[0], [2, 2])


@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (30, 400)])
def test_what_is_above_rounding_is_the_rank(rows, columns):
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, rows, 7)), random.normal(size=(2, 7, columns))
    left[1, :, 4:] = 0.0  # the second one has rank 4
    matrices = (left @ right).astype("float32")
    values = np.linalg.svd(matrices, compute_uv=False)
    np.testing.assert_array_equal(above_rounding(values, (rows, columns)).sum(axis=-1), [7, 4])
    assert not above_rounding(np.zeros((1, 3)), (3, 3)).any()
