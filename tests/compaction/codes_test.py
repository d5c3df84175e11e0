"""Factors that were quantized stay quantized through compaction."""

import keras
import numpy as np
import pytest

from keras_compaware import (
    AtEnd,
    Every,
    LowRank,
    Recipe,
    Rule,
    Tucker2,
    UniformQuantization,
    compact,
)


@pytest.fixture
def trained():
    """A model of 4-bit factors of rank 2, and the codes that its callback leaves."""
    return train(Rule(None, Every(2, LowRank(rank=2)), AtEnd(UniformQuantization(4))))


def train(*rules):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(12, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(20, name="dense"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    model.compile("sgd", "mse")
    callback = Recipe(rules).callbacks(model)[0]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 6, 6, 2)).astype("float32"), rng.normal(size=(12, 2))
    model.fit(x, y, batch_size=4, callbacks=[callback], verbose=0)
    return model, callback.codes


def levels(layer):
    return len(np.unique(keras.ops.convert_to_numpy(layer.kernel)))


def test_the_factors_of_the_codes_are_taken(trained):
    model, codes = trained
    assert sorted(codes) == ["conv/kernel", "dense/kernel"]
    result = compact(model, codes)
    assert result.max_error < 1e-5
    for name in ("conv", "dense"):
        left, right = result.model.get_layer(name).layers
        assert max(levels(left), levels(right)) <= 15
    # Found again by a decomposition, the factors would lie on no grid.
    assert levels(compact(model).model.get_layer("dense").layers[0]) > 15


def test_three_factors_are_taken_and_tiles_are_left_as_they_are():
    quantized = AtEnd(UniformQuantization(4))
    model, codes = train(
        Rule("conv", Every(2, Tucker2(ranks=(1, 3))), quantized),
        Rule("dense", Every(2, LowRank(rank=1, tile=8)), quantized),  # no layers express these
    )
    assert {name: code.split for name, code in codes.items()} == {
        "conv/kernel": "tucker",
        "dense/kernel": None,
    }
    result = compact(model, codes)
    assert result.max_error < 1e-5
    assert "ranks 1 of 2 and 3 of 12, Tucker-2" in result.rows[0].note
    factors = result.model.get_layer("conv").layers
    assert [layer.name for layer in factors] == ["conv_input", "conv_core", "conv_output"]
    assert max(map(levels, factors)) <= 15
    assert result.rows[1].note.startswith("as it is")


def test_a_code_of_another_kernel_is_refused(trained):
    model, codes = trained
    dense = model.get_layer("dense")
    dense.kernel.assign(keras.ops.convert_to_numpy(dense.kernel) * 2)
    with pytest.raises(ValueError, match="'dense': the kernel has changed since its code was made"):
        compact(model, codes)


def test_a_code_without_a_kernel_is_refused(trained):
    model, codes = trained
    with pytest.raises(ValueError, match=r"no kernel 'dens/kernel'.*conv/kernel, dense/kernel"):
        compact(model, {"dens/kernel": codes["dense/kernel"]})
