"""Running .tflite files."""

import keras
import numpy as np
import pytest
from keras import layers

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import export
from keras_compaware.export import interpreter

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((8,), name="x"), layers.Dense(3, name="y")])


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "dense.tflite"
    export.to_litert(model, path)
    return path


def convert(folder, name, function, *specs, **options):
    """A file straight from the converter, for what `to_litert` does not write."""
    import tensorflow as tf

    module = tf.Module()
    module.serve = tf.function(function, input_signature=[tf.TensorSpec(*s) for s in specs])
    concrete = module.serve.get_concrete_function()
    with interpreter.quiet():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
        for key, value in options.items():
            setattr(converter, key, value)
        content = converter.convert()
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("num_examples", [1, 4, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_predict_in_batches(model, path, num_examples, batch_size):
    x = np.random.default_rng(0).normal(size=(num_examples, 8)).astype("float32")
    found = export.predict(path, x, batch_size=batch_size)
    np.testing.assert_allclose(found, model.predict(x, verbose=0), atol=1e-6)


def test_predict_takes_dicts_lists_and_other_dtypes(model, path, capsys):
    x = np.arange(16).reshape(2, 8)
    expected = model.predict(x.astype("float32"), verbose=0)
    for given in (x, {"x": x}, [x], x.astype("float64")):
        np.testing.assert_allclose(export.predict(path, given), expected, rtol=1e-5)
    assert capsys.readouterr().out == ""
    export.predict(path, x, progress=True, num_threads=2)
    assert "2/2" in capsys.readouterr().out


def test_predict_where_the_graph_fixes_the_batch(tmp_path):
    """The signature leaves the batch open, a reshape inside does not."""
    import tensorflow as tf

    path = convert(
        tmp_path, "fixed.tflite", lambda x: tf.reshape(x * 2.0, (1, 4)), ((None, 4), "float32", "x")
    )
    x = np.arange(12, dtype="float32").reshape(3, 4)
    np.testing.assert_array_equal(export.predict(path, x, batch_size=2), 2 * x)


def test_several_inputs(tmp_path):
    path = convert(
        tmp_path,
        "two.tflite",
        lambda a, b: {"sum": a + b, "difference": a - b},
        ((None, 2), "float32", "a"),
        ((None, 2), "float32", "b"),
    )
    a, b = np.ones((3, 2), "float32"), np.full((3, 2), 5.0, "float32")
    found = export.predict(path, {"a": a, "b": b})
    np.testing.assert_array_equal(found["sum"], a + b)
    np.testing.assert_array_equal(found["difference"], a - b)
    with pytest.raises(ValueError, match=r"not clear.*dict"):
        export.predict(path, [a, b])
    with pytest.raises(ValueError, match="dict with the keys"):
        export.predict(path, a)
    with pytest.raises(ValueError, match=r"Expected the inputs \['a', 'b'\]"):
        export.predict(path, {"a": a})
    with pytest.raises(ValueError, match="same number"):
        export.predict(path, {"a": a, "b": b[:2]})


def test_a_list_is_matched_by_shape(tmp_path):
    import tensorflow as tf

    path = convert(
        tmp_path,
        "shapes.tflite",
        lambda z, a: tf.concat([z, a], axis=1),
        ((None, 2), "float32", "z"),
        ((None, 3), "float32", "a"),
    )
    z, a = np.zeros((2, 2), "float32"), np.ones((2, 3), "float32")
    expected = np.concatenate([z, a], axis=1)
    for order in ([z, a], [a, z]):
        np.testing.assert_array_equal(export.predict(path, order), expected)


def test_quantized_inputs_and_outputs_are_real_numbers(tmp_path):
    import tensorflow as tf

    random = np.random.default_rng(0)
    weights = tf.constant(random.normal(size=(8, 3)), "float32")
    data = random.normal(size=(64, 8)).astype("float32")
    path = convert(
        tmp_path,
        "int8.tflite",
        lambda x: tf.matmul(x, weights),
        ((None, 8), "float32", "x"),
        optimizations=[tf.lite.Optimize.DEFAULT],
        representative_dataset=lambda: ([row[None]] for row in data),
        inference_input_type=tf.int8,
        inference_output_type=tf.int8,
    )
    found = export.predict(path, data)
    expected = data @ weights.numpy()
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
    # Far outside the range it saturates and does not wrap around.
    assert np.all(np.abs(export.predict(path, 100 * data)) <= np.abs(found).max() * 1.5)


def test_bad_inputs(path):
    with pytest.raises(ValueError, match=r"x: \(None, 8\) float32.*received \(2, 7\)"):
        export.predict(path, np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"received \(2, 8\) <U1"):
        export.predict(path, np.full((2, 8), "a"))
    with pytest.raises(ValueError, match="number >= 1"):
        export.predict(path, np.zeros((0, 8)))
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        export.predict(path, np.zeros((2, 8)), batch_size=0)
    with pytest.raises(ValueError, match="num_threads must be a positive integer"):
        export.predict(path, np.zeros((2, 8)), num_threads=0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
@pytest.mark.parametrize("use", ["predict", "latency", "operators"])
def test_damaged_files(path, tmp_path, damage, use):
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        for i in np.random.default_rng(0).integers(8, len(content), 300):
            content[i] ^= 255
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(
        {"empty": b"", "text": b"hello " * 50, "cut": content[: len(content) // 2]}.get(
            damage, bytes(content)
        )
    )
    functions = {
        "predict": lambda: export.predict(broken, np.zeros((1, 8))),
        "latency": lambda: export.latency([broken]),
        "operators": lambda: interpreter.operators(broken),
    }
    with pytest.raises(ValueError, match=r"broken\.tflite.*not a valid \.tflite file"):
        functions[use]()


def test_missing_files(tmp_path):
    for function in (
        lambda p: export.predict(p, np.zeros((1, 8))),
        lambda p: export.latency([p]),
        interpreter.operators,
    ):
        with pytest.raises(FileNotFoundError, match=r"none\.tflite"):
            function(tmp_path / "none.tflite")


def test_latency_of_several_files(path, tmp_path):
    big = keras.Sequential([keras.Input((512,)), layers.Dense(1024), layers.Dense(1024)])
    export.to_litert(big, tmp_path / "big.tflite")
    paths = [path, str(tmp_path / "big.tflite")]
    found = export.latency(paths, repeats=7, warmup=1)
    assert list(found) == paths
    for value in found.values():
        assert value.repeats == 7
        assert 0 < value.minimum_ms <= value.median_ms <= value.p90_ms
    small, large = found.values()
    assert large.median_ms > 5 * small.median_ms  # 1.6 M against 24 MACs
    assert "ms" in str(small)


def test_latency_refuses(path, tmp_path):
    with pytest.raises(TypeError, match="list of paths"):
        export.latency(path)
    with pytest.raises(ValueError, match="every path once"):
        export.latency([path, path])
    with pytest.raises(ValueError, match="repeats"):
        export.latency([path], repeats=0)
    with pytest.raises(ValueError, match="warmup"):
        export.latency([path], warmup=-1)
    with pytest.raises(ValueError, match="batch_size"):
        export.latency([path], batch_size=0)
    fixed = convert(tmp_path, "fixed.tflite", lambda x: x * 2.0, ((3, 4), "float32", "x"))
    with pytest.raises(ValueError, match="takes batches of 3"):
        export.latency([fixed])
    assert export.latency([fixed], batch_size=3, repeats=2)[fixed].repeats == 2
    assert export.latency([]) == {}


def test_operators(path, tmp_path):
    assert interpreter.operators(path) == {"FULLY_CONNECTED": 1}


@pytest.mark.slow
def test_importing_does_not_import_the_runtimes():
    import subprocess
    import sys

    code = (
        "import sys, keras_compaware.export as e; "
        "assert 'ai_edge_litert' not in sys.modules; assert e.predict"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
