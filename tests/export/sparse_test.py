"""Files that store pruned kernels without their zeros: smaller, and the same function."""

import keras
import numpy as np
import pytest
from keras import layers

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

import keras_compaware as kc
from keras_compaware import export
from tests.export.networks import EVERYTHING, FORMS, NETWORKS, convnet, examples, images, randomised

on_tensorflow = pytest.mark.tensorflow  # elsewhere each export starts a process, for seconds


def pruned(model, *more, sparsity=0.9):
    pruning = kc.MagnitudePruning(sparsity)
    compressor = kc.Chain([pruning, *more]) if more else pruning
    return kc.compress(model, kc.Recipe([kc.Rule(EVERYTHING, kc.AtEnd(compressor))]))


def both(model, tmp_path, x, **options):
    """Exports a model densely and sparsely."""
    return [
        export.to_litert(model, tmp_path / f"{sparse}.tflite", inputs=x, sparse=sparse, **options)
        for sparse in (False, True)
    ]


@on_tensorflow
@pytest.mark.parametrize("mode", [None, "float16"])
def test_a_sparse_file_is_smaller_and_computes_the_same(tmp_path, mode):
    x = images(7)
    plain, sparse = both(pruned(convnet()), tmp_path, x, quantization=mode)
    assert (plain.sparse, sparse.sparse) == (0, 4)
    assert "4 tensors" in str(sparse)
    assert sparse.bytes < 0.6 * plain.bytes
    files = [tmp_path / f"{name}.tflite" for name in (False, True)]
    np.testing.assert_array_equal(*(export.predict(file, x) for file in files))


@on_tensorflow
def test_without_zeros_nothing_is_sparse(tmp_path):
    plain, sparse = both(convnet(), tmp_path, images(7))
    assert sparse.sparse == 0
    assert sparse.bytes == pytest.approx(plain.bytes, rel=0.01)


@on_tensorflow
def test_grids_are_told_of_sparse_files_as_of_others(tmp_path):
    model = pruned(convnet(), kc.UniformQuantization(8, axis="outputs"))
    plain, sparse = both(model, tmp_path, images(7), quantization="float16")
    assert sparse.sparse == 4
    assert sparse.grids == plain.grids
    assert set(sparse.grids.values()) == {"float16"}


@on_tensorflow
def test_tiles_are_refused_where_litert_reads_them_wrongly(tmp_path):
    model = randomised(keras.Sequential([keras.Input((64,)), layers.Dense(64), layers.Dense(8)]))
    tiles = kc.Rule(EVERYTHING, kc.AtEnd(kc.GroupPruning(0.75, block=(4, 4))))
    model = kc.compress(model, kc.Recipe([tiles]))
    plain, sparse = both(model, tmp_path, images(5, (64,)))
    assert sparse.sparse == 2
    assert sparse.bytes < 0.6 * plain.bytes
    assert sparse.max_error < 1e-5
    with pytest.raises(export.ExportError, match=r"'compare'.*pruned in tiles wrongly"):
        both(model, tmp_path, images(5, (64,)), quantization="float16")


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8", "weight_int8", "weight_int4"])
def test_integers_are_refused(tmp_path, mode):
    calibration = np.zeros((4, 3)) if mode == "int8" else None
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    options = {"quantization": mode, "calibration": calibration, "sparse": True}
    with pytest.raises(ValueError, match=f"does not go with quantization='{mode}'"):
        export.to_litert(model, tmp_path / "m.tflite", **options)
    with pytest.raises(ValueError, match="`sparse` must be True or False"):
        export.to_litert(model, tmp_path / "m.tflite", sparse=0.9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_any_backend(tmp_path):
    plain, sparse = both(pruned(convnet()), tmp_path, images(7))
    assert sparse.sparse == 4
    assert sparse.bytes < 0.6 * plain.bytes


@on_tensorflow
@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(tmp_path, network, form, mode):
    model = pruned(FORMS[form](randomised(NETWORKS[network]())))
    plain, sparse = both(model, tmp_path, examples(model, network, 5), quantization=mode)
    assert sparse.sparse > 0
    # Indices cost something: the smallest kernels of 16 bits gain nothing.
    assert sparse.bytes < (1.0 if mode is None else 1.02) * plain.bytes
    assert sparse.max_error == pytest.approx(plain.max_error, abs=1e-6)
