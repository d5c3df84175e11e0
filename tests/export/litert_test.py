"""Export to LiteRT: the file computes what the model computes, or is not written."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import export
from keras_compaware.export import _elsewhere, _places
from tests.export.networks import diverged, untouched

# On another backend each export starts a process with TensorFlow in it, which takes seconds.
pytestmark = pytest.mark.tensorflow


def dense_model():
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(3, name="logits")]
    )


def trained_norm(model):
    """Moves batch-norm statistics away from their initial 0 and 1."""
    random = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 2.0, w.shape) for w in layer.get_weights()])
    return model


def convnet():
    return trained_norm(
        keras.Sequential(
            [
                keras.Input((12, 12, 3), name="image"),
                layers.Conv2D(4, 3, strides=2, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.DepthwiseConv2D(3),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(5, "softmax", name="classes"),
            ]
        )
    )


def residual_model():
    x = keras.Input((8, 8, 3), name="image")
    y = stem = layers.Conv2D(4, 3, padding="same")(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Add()([stem, layers.Conv2D(4, 1)(y)])
    y = layers.Concatenate()([y, stem])
    return trained_norm(
        keras.Model(x, layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(y)))
    )


def many_ends_model():
    """Inputs and outputs of one shape, so that only their names tell them apart."""
    inputs = [keras.Input((4,), name=name) for name in ("zeta", "alpha", "mid")]
    x = layers.Concatenate()([layers.Dense(i + 2)(t) for i, t in enumerate(inputs)])
    return keras.Model(inputs, [layers.Dense(2, name=f"out{i}")(x) for i in range(12)])


@pytest.mark.parametrize("make", [dense_model, convnet, residual_model])
def test_the_file_computes_what_the_model_computes(tmp_path, make):
    model = make()
    path = tmp_path / "model.tflite"
    result = export.to_litert(model, path)
    assert result.path == path
    assert result.bytes == path.stat().st_size
    assert 0 < result.gzip_bytes < result.bytes + 100
    assert result.max_error < 1e-5
    assert os.listdir(tmp_path) == ["model.tflite"]
    x = np.random.default_rng(7).normal(size=(7, *model.inputs[0].shape[1:])).astype("float32")
    np.testing.assert_allclose(export.predict(path, x), model.predict(x, verbose=0), atol=1e-5)


def test_batch_norm_is_folded_and_ops_are_counted(tmp_path):
    result = export.to_litert(convnet(), tmp_path / "model.tflite")
    assert result.ops["CONV_2D"] == result.ops["DEPTHWISE_CONV_2D"] == 1
    assert result.ops["FULLY_CONNECTED"] == result.ops["SOFTMAX"] == 1
    assert "MUL" not in result.ops
    assert result.inputs == {"image": (None, 12, 12, 3)}
    assert result.outputs == {"classes": (None, 5)}
    text = str(result)
    assert "1 CONV_2D" in text
    assert f"{result.bytes:,} bytes" in text


def test_inputs_and_outputs_keep_their_names(tmp_path):
    model = many_ends_model()
    path = tmp_path / "model.tflite"
    result = export.to_litert(model, path)
    assert list(result.inputs) == ["zeta", "alpha", "mid"]
    assert list(result.outputs) == [f"out{i}" for i in range(12)]
    random = np.random.default_rng(0)
    x = {name: random.normal(size=(3, 4)).astype("float32") for name in result.inputs}
    outputs = export.predict(path, x)
    for name, expected in zip(
        result.outputs, model.predict(list(x.values()), verbose=0), strict=True
    ):
        np.testing.assert_allclose(outputs[name], expected, atol=1e-6)


def test_dict_model_and_given_examples(tmp_path):
    a, b = keras.Input((2,), name="b_first"), keras.Input((3,), name="a_second")
    x = layers.Concatenate()([a, b])
    outputs = {"total": layers.Dense(1)(x), "parts": layers.Dense(2)(x)}
    model = keras.Model({"b_first": a, "a_second": b}, outputs)
    examples = {"b_first": np.ones((5, 2)), "a_second": np.full((5, 3), 2.0)}
    result = export.to_litert(model, tmp_path / "model.tflite", inputs=examples)
    assert result.inputs == {"a_second": (None, 3), "b_first": (None, 2)}
    assert result.outputs == {"parts": (None, 2), "total": (None, 1)}
    found = export.predict(tmp_path / "model.tflite", examples)
    expected = model.predict({k: v.astype("float32") for k, v in examples.items()}, verbose=0)
    np.testing.assert_allclose(found["parts"], expected["parts"], rtol=1e-5)
    np.testing.assert_allclose(found["total"], expected["total"], rtol=1e-5)


def test_the_same_model_gives_the_same_file(tmp_path):
    model = residual_model()
    export.to_litert(model, tmp_path / "a.tflite")
    export.to_litert(model, tmp_path / "b.tflite")
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


def test_recurrent_layers_get_a_batch_of_one(tmp_path):
    model = keras.Sequential(
        [keras.Input((6, 3), name="steps"), layers.Bidirectional(layers.LSTM(4)), layers.Dense(2)]
    )
    path = tmp_path / "model.tflite"
    result = export.to_litert(model, path)
    assert result.inputs == {"steps": (1, 6, 3)}
    assert not any(name.startswith("Flex") for name in result.ops)
    x = np.random.default_rng(0).normal(size=(5, 6, 3)).astype("float32")
    np.testing.assert_allclose(export.predict(path, x), model.predict(x, verbose=0), atol=1e-5)


def test_fixed_batch_size(tmp_path):
    x = keras.Input((4,), batch_size=3, name="x")
    model = keras.Model(x, layers.Dense(2)(x))
    path = tmp_path / "model.tflite"
    assert export.to_litert(model, path).inputs == {"x": (3, 4)}
    values = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    expected = np.concatenate(
        [model.predict_on_batch(np.resize(values[i : i + 3], (3, 4))) for i in (0, 3, 6)]
    )[:8]
    np.testing.assert_allclose(export.predict(path, values), expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of the model's batch size"):
        export.to_litert(model, path, inputs=values)


def test_embeddings_get_valid_indices(tmp_path):
    for dtype in ("int32", "float32"):
        tokens = keras.Input((5,), dtype=dtype, name="tokens")
        x = layers.GlobalAveragePooling1D()(layers.Embedding(4, 3)(tokens))
        result = export.to_litert(keras.Model(tokens, x), tmp_path / "model.tflite")
        assert result.max_error < 1e-5


def test_undefined_dimensions_need_examples(tmp_path):
    x = keras.Input((None, None, 3), name="image")
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(x))
    model = keras.Model(x, layers.Dense(2)(y))
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=r"\(None, None, None, 3\).*inputs="):
        export.to_litert(model, path)
    assert not path.exists()
    examples = np.random.default_rng(0).normal(size=(2, 9, 7, 3))
    assert export.to_litert(model, path, inputs=examples).max_error < 1e-5


def test_subclassed_models_need_examples(tmp_path):
    class Mlp(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Mlp()
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="not built"):
        export.to_litert(model, path, inputs=np.zeros((1, 3), "float32"))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model(x)
    with pytest.raises(ValueError, match="`inputs=`"):
        export.to_litert(model, path)
    result = export.to_litert(model, path, inputs=x)
    assert result.inputs == {"input": (None, 3)}
    assert result.outputs == {"output": (None, 2)}


def test_the_model_is_not_touched_and_nothing_is_printed(tmp_path, capfd):
    model = convnet()
    model.compile("adam", "mse")
    with untouched(model, capfd):
        export.to_litert(model, tmp_path / "model.tflite")


# Failures


def inverse_model():
    import tensorflow as tf

    x = keras.Input((4,))
    y = layers.Lambda(
        lambda t: tf.linalg.inv(tf.reshape(t, (-1, 2, 2))), output_shape=(2, 2), name="inverse"
    )(x)
    return keras.Model(x, y)


def diverged_model():
    return diverged(dense_model())


def unrunnable_model():
    """Converts, but LiteRT's kernel of the Fourier transform refuses this use of it."""
    import tensorflow as tf

    def spectrum(t):
        return tf.math.real(tf.signal.fft(tf.cast(t, tf.complex64)))

    x = keras.Input((4,))
    return keras.Model(x, layers.Lambda(spectrum, output_shape=(4,), name="spectrum")(x))


def nested_unrunnable_model():
    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), *unrunnable_model().layers[1:]], name="block")
    return keras.Model(x, layers.Dense(2)(inner(layers.Dense(4)(x))))


def half_precision_model():
    x = keras.Input((4,))
    y = layers.Dense(3, dtype="mixed_float16", name="half")(layers.Dense(3, name="whole")(x))
    return keras.Model(x, y)


def custom_operation_model():
    import tensorflow as tf

    x = keras.Input((4,))
    return keras.Model(x, layers.Lambda(lambda t: tf.math.erfinv(tf.tanh(t)), name="odd")(x))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (inverse_model, {}, r"'convert'.*MatrixInverse \(in 'inverse'\).*allow_select_ops"),
        (custom_operation_model, {}, r"'convert'.*Erfinv \(in 'odd'\)\. Replace it"),
        (custom_operation_model, {"allow_select_ops": True}, r"'convert'.*Erfinv"),
        (diverged_model, {}, r"'compare'.*'logits' is not finite"),
        (unrunnable_model, {}, r"'run'.*LiteRT does not run it.*here 'spectrum'\. LiteRT says"),
        (nested_unrunnable_model, {}, r"'run'.*here 'block/spectrum'\. LiteRT says"),
        (half_precision_model, {}, r"'convert'.*in float16 \(in 'half'\).*set_weights"),
    ],
    ids=["select", "custom", "custom allowed", "not finite", "unrunnable", "nested", "float16"],
)
def test_a_failed_export_leaves_the_old_file(tmp_path, make, options, message):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"the old file")
    with pytest.raises(export.ExportError, match=message):
        export.to_litert(make(), path, **options)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["model.tflite"]


def test_an_operator_is_traced_to_its_layers(tmp_path):
    x = keras.Input((8, 8, 3))
    y = layers.BatchNormalization(name="conv_1")(layers.Conv2D(4, 3, name="conv")(x))
    y = layers.Flatten(name="flat")(layers.ReLU(name="relu")(y))
    model = trained_norm(keras.Model(x, layers.Dense(3, name="logits")(y)))
    path = tmp_path / "model.tflite"
    export.to_litert(model, path)

    def blamed(*operators):
        message = ", ".join(f"Node number {number} ({kind}) failed" for number, kind in operators)
        return _places.blamed(model, path.read_bytes(), message)

    assert set(blamed((0, "CONV_2D"))) == {"conv", "conv_1", "relu"}  # one operator of all three
    assert blamed((4, "RESHAPE"), (1, "SHAPE")) == ["flat"]
    assert blamed((5, "FULLY_CONNECTED")) == ["logits"]  # by its weights: the output has no name
    assert blamed((5, "SOFTMAX"), (99, "CONV_2D")) == blamed() == []
    assert _places.layers_at(model, ["a_1/conv_1/Add", "a_1/conv_1_2/Add", "a/none/Add"]) == [
        *("conv", "conv_1"),
        "a/none/Add",
    ]
    assert _places.listed("abcdefghij") == "'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more"


def test_half_precision_of_subclassed_models():
    class Halves(keras.Model):
        def __init__(self, of_one, **kwargs):
            super().__init__(**kwargs)
            self.one, self.two = layers.Dense(1, dtype=of_one, name="one"), layers.Dense(1)

    assert _places.half_precision(Halves("mixed_float16")) == ("float16", ["one"])
    assert _places.half_precision(Halves(None)) is None
    whole = Halves(None, dtype="mixed_bfloat16", name="net")
    assert _places.half_precision(whole) == ("bfloat16", ["net"])


def test_what_a_process_logs_is_not_what_it_says():
    text = """WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795750880.069784    7726 cudart_stub.cc:31] Could not find cuda drivers.
W0000 00:00:1795750880.069784    7726 cudart_stub.cc:31] Nor this.
2026-01-02 03:04:05.678901: I tensorflow/core/util/port.cc:153] oneDNN is on.
/lib/interpreter.py:457: UserWarning:     Warning: tf.lite.Interpreter is deprecated.
    Please use another.

  warnings.warn(_WARNING)
{}"""
    assert _elsewhere._last_words(text.format("")) == ""
    said = "Traceback:\n  File 'a.py'\nF0000 00:00:17.6 77 a.cc:1] Check failed"
    assert _elsewhere._last_words(text.format(said)) == said
    assert _elsewhere._last_words(said, 6) == "failed"


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch):
    """Weights that went astray during the conversion are caught by the comparison."""
    from keras_compaware.export import litert

    good, other = dense_model(), dense_model()
    right = litert.convert
    monkeypatch.setattr(litert, "convert", lambda model, *a, **k: right(other, *a, **k))
    with pytest.raises(export.ExportError, match=r"'compare'.*converted wrongly"):
        export.to_litert(good, tmp_path / "model.tflite")
    assert os.listdir(tmp_path) == []


def test_the_error_is_relative_to_the_largest_output(tmp_path, monkeypatch):
    from keras_compaware.export import litert

    x = keras.Input((2,))
    model = keras.Model(x, layers.Rescaling(1.0, name="same")(x))
    received = litert._received
    monkeypatch.setattr(litert, "_received", lambda *a: [received(*a)[0] + 0.5])
    examples = np.array([[1.0, -50.0], [25.0, 0.0]])
    options = {"inputs": examples}
    with pytest.raises(export.ExportError, match=r"'same' is 0\.01, above the tolerance 0\.009"):
        export.to_litert(model, tmp_path / "model.tflite", tolerance=0.009, **options)
    result = export.to_litert(model, tmp_path / "model.tflite", tolerance=0.011, **options)
    assert result.max_error == pytest.approx(0.5 / 50)


def test_select_operations_when_allowed(tmp_path):
    path = tmp_path / "model.tflite"
    result = export.to_litert(
        inverse_model(),
        path,
        inputs=np.array([[2.0, 0.0, 0.0, 4.0]]),
        allow_select_ops=True,
    )
    assert result.ops["FlexMatrixInverse"] == 1
    assert result.max_error is None
    assert "not compared" in str(result)
    assert path.is_file()
    # The permission alone changes nothing where it is not needed.
    assert export.to_litert(dense_model(), path, allow_select_ops=True).max_error < 1e-5


def test_arguments_are_checked(tmp_path):
    model = dense_model()
    with pytest.raises(TypeError, match=r"keras\.Model, received Dense"):
        export.to_litert(layers.Dense(1), tmp_path / "a.tflite")
    with pytest.raises(ValueError, match=r"'\.tflite'"):
        export.to_litert(model, tmp_path / "a.keras")
    with pytest.raises(ValueError, match="tolerance"):
        export.to_litert(model, tmp_path / "a.tflite", tolerance=0)
    with pytest.raises(FileNotFoundError, match="Create it first"):
        export.to_litert(model, tmp_path / "missing" / "a.tflite")
    with pytest.raises(ValueError, match=r"\('num_examples', 8\).*\(2, 9\)"):
        export.to_litert(model, tmp_path / "a.tflite", inputs=np.zeros((2, 9)))
    with pytest.raises(ValueError, match="number of examples"):
        export.to_litert(model, tmp_path / "a.tflite", inputs=np.zeros((0, 8)))
    two = keras.Model([a := keras.Input((2,)), b := keras.Input((2,))], layers.Add()([a, b]))
    with pytest.raises(ValueError, match="list of 2 arrays"):
        export.to_litert(two, tmp_path / "a.tflite", inputs=[np.zeros((1, 2))])
    with pytest.raises(ValueError, match="received \\['wrong'\\]"):
        export.to_litert(two, tmp_path / "a.tflite", inputs={"wrong": np.zeros((1, 2))})
    assert os.listdir(tmp_path) == []


def test_without_tensorflow(tmp_path, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    with pytest.raises(export.ExportError, match="pip install tensorflow"):
        export.to_litert(dense_model(), tmp_path / "a.tflite")


# Other backends

OTHER_BACKEND = """
    import sys
    import keras
    import numpy as np
    from keras import layers
    from keras_compaware import export
    import doubling

    folder = sys.argv[1]
    x = keras.Input((6, 6, 2), name="image")
    y = layers.BatchNormalization()(layers.Conv2D(3, 3)(x))
    y = doubling.Doubling()(layers.Flatten()(y))
    model = keras.Model(x, {"logits": layers.Dense(2)(y), "features": y})
    model.compile("adam", "mse")
    result = export.to_litert(model, f"{folder}/model.tflite")
    assert result.outputs == {"features": (None, 48), "logits": (None, 2)}, result
    assert result.max_error < 1e-5, result

    class Local(layers.Layer):
        def call(self, x):
            return x + 1

    bad = keras.Model(x, Local()(x))
    before = open(f"{folder}/model.tflite", "rb").read()
    try:
        export.to_litert(bad, f"{folder}/model.tflite")
    except export.ExportError as error:
        assert "'load'" in str(error) and "register_keras_serializable" in str(error), error
    else:
        raise AssertionError("a class that only __main__ knows cannot be loaded elsewhere")
    assert open(f"{folder}/model.tflite", "rb").read() == before
    print("backend", keras.backend.backend(), "done")
"""

DOUBLING = """
    import keras

    @keras.saving.register_keras_serializable("doubling")
    class Doubling(keras.layers.Layer):
        def call(self, x):
            return 2.0 * x

        def compute_output_shape(self, shape):
            return shape
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends(tmp_path, backend):
    pytest.importorskip(backend)
    (tmp_path / "script.py").write_text(textwrap.dedent(OTHER_BACKEND))
    (tmp_path / "doubling.py").write_text(textwrap.dedent(DOUBLING))
    (tmp_path / "out").mkdir()
    process = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"backend {backend} done" in process.stdout
    assert os.listdir(tmp_path / "out") == ["model.tflite"]
