"""What a report tells of single layers and kernels."""

import keras
import numpy as np

from keras_compaware import compact, measure
from keras_compaware.cli.details import layers_of, spectra_of


def low_rank(kernel, rank):
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(16, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(40, name="hidden"),
            keras.layers.Dense(10, name="head"),
        ]
    )


def compacted():
    model = network()
    layer = model.get_layer("hidden")
    layer.kernel.assign(low_rank(keras.ops.convert_to_numpy(layer.kernel), 3))
    return model, compact(model)


def test_what_replaced_a_layer_counts_under_its_name():
    model, result = compacted()
    rows = layers_of(model, result.model)
    assert [row["name"] for row in rows] == ["conv", "norm", "hidden", "head"]
    hidden = rows[2]
    assert hidden["parameters"] == [576 * 40 + 40, 3 * (576 + 40) + 40]
    assert hidden["macs"] == [576 * 40, 3 * (576 + 40)]
    assert hidden["channels"] == [40, 40]
    for place, one in enumerate((model, result.model)):
        assert sum(row["parameters"][place] for row in rows) == measure.parameters(one)
        assert sum(row["macs"][place] for row in rows) == measure.macs(one)


def test_nested_models_and_shared_layers_count_once():
    shared = keras.layers.Dense(8, name="shared")
    inputs = keras.Input((8,))
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="deep")], name="inner")
    model = keras.Model(inputs, shared(inner(shared(inputs))))
    rows = {row["name"]: row for row in layers_of(model, model)}
    assert rows["shared"]["parameters"] == [72, 72]
    assert rows["shared"]["macs"] == [128, 128]
    assert rows["inner/deep"]["parameters"] == [72, 72]


def test_a_layer_that_is_gone_or_new():
    small = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, name="new")])
    large = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, name="old")])
    old, new = layers_of(large, small)
    assert (old["parameters"], old["channels"]) == ([18, 0], [2, None])
    assert (new["parameters"], new["channels"]) == ([0, 18], [None, 2])


def test_spectra():
    _, result = compacted()
    twin = network()
    rows = {row["name"]: row for row in spectra_of(twin, result.whole)}
    assert list(rows) == ["conv/kernel", "hidden/kernel", "head/kernel"]
    hidden = rows["hidden/kernel"]
    assert (hidden["layer"], hidden["rank"], hidden["full_rank"]) == ("hidden", 3, 40)
    kernel = keras.ops.convert_to_numpy(twin.get_layer("conv").kernel).reshape(27, 16)
    values = [value for _, value in rows["conv/kernel"]["dense"]]
    np.testing.assert_allclose(values, np.linalg.svd(kernel, compute_uv=False), rtol=1e-4)


def test_long_spectra_are_thinned_and_kernels_of_zeros_have_no_rank():
    model = keras.Sequential(
        [
            keras.Input((300,)),
            keras.layers.Dense(200, name="long"),
            keras.layers.Dense(5, kernel_initializer="zeros", name="zeros"),
        ]
    )
    long, zeros = spectra_of(None, model)
    places = [k for k, _ in long["trained"]]
    assert len(places) <= 96
    assert (places[0], places[-1], long["rank"]) == (1, 200, 200)
    assert "dense" not in long
    assert zeros["rank"] == 0


def test_kernels_that_diverged_have_no_spectrum():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")])
    model.layers[0].kernel.assign(np.full((4, 4), np.nan))
    assert spectra_of(None, model) == []
