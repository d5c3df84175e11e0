"""Export to ONNX: the file computes what the model computes, or is not written."""

import importlib.util
import os

import keras
import numpy as np
import pytest
from keras import layers

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

from keras_compaware import export
from keras_compaware.export import onnx as module
from tests.export.networks import (
    FORMS,
    NETWORKS,
    convnet,
    dense,
    diverged,
    examples,
    images,
    randomised,
    untouched,
)

pytestmark = [
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("tf2onnx", "torch"))), reason="no converter"
    )
]
if keras.backend.backend() == "jax":  # each export starts a process, which takes seconds
    pytestmark.append(pytest.mark.slow)


def ran(path, feeds):
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def test_a_file_computes_what_the_model_computes(tmp_path):
    model, x = convnet(), images(7)
    path = tmp_path / "m.onnx"
    result = export.to_onnx(model, path, inputs=x)
    assert (result.path, result.bytes) == (path, path.stat().st_size)
    assert result.inputs == {"image": (None, 12, 12, 3)}
    assert result.outputs == {"logits": (None, 8)}
    assert result.ops["Conv"] == 3
    assert result.agreement == 1.0
    expected = keras.ops.convert_to_numpy(model(x))
    largest = 0.0
    for size in (1, 7):  # an open batch
        (received,) = ran(path, {"image": x[:size]})
        largest = max(largest, np.abs(received - expected[:size]).max() / np.abs(expected).max())
    assert largest < 1e-5
    assert result.max_error == pytest.approx(largest, abs=1e-6)
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_several_inputs_and_outputs(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([b, layers.Dense(4, name="wide")(a)])
    outputs = {"z": layers.Dense(2)(joined), "b": joined}  # one has the name of an input
    model = keras.Model({"b": b, "a": a}, outputs)
    random = np.random.default_rng(0)
    x = {"b": random.normal(size=(5, 2)), "a": random.normal(size=(5, 3))}
    x = {name: value.astype("float32") for name, value in x.items()}
    result = export.to_onnx(model, tmp_path / "m.onnx", inputs=x)
    assert result.inputs == {"a": (None, 3), "b": (None, 2)}
    assert result.outputs == {"b_output": (None, 6), "z": (None, 2)}
    expected = model(x)
    received = ran(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(received[0], keras.ops.convert_to_numpy(expected["b"]), atol=1e-5)
    np.testing.assert_allclose(received[1], keras.ops.convert_to_numpy(expected["z"]), atol=1e-5)


def test_a_fixed_batch_stays(tmp_path):
    inputs = keras.Input(batch_shape=(4, 3))
    model = keras.Model(inputs, layers.Dense(2, name="scores")(inputs))
    result = export.to_onnx(model, tmp_path / "m.onnx")
    assert result.inputs == {"input": (4, 3)}
    assert result.outputs == {"scores": (4, 2)}


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="refused on JAX")
def test_a_subclassed_model(tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = layers.BatchNormalization(), layers.Dense(2)

        def call(self, x, training=None):
            return self.dense(self.norm(x, training=training))

    model, x = Model(), np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    model(x)
    with pytest.raises(ValueError, match="`inputs=`"):
        export.to_onnx(model, tmp_path / "m.onnx")
    result = export.to_onnx(model, tmp_path / "m.onnx", inputs=x)
    assert result.inputs == {"input": (None, 4)}
    assert result.outputs == {"output": (None, 2)}


def test_the_model_is_not_touched_and_nothing_is_printed(tmp_path, capfd):
    model = convnet()
    model.compile("adam", "mse")
    with untouched(model, capfd):
        export.to_onnx(model, tmp_path / "m.onnx")


# ---- failures -----------------------------------------------------------------------------------


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")
    with pytest.raises(export.ExportError, match=r"'compare'.*'logits' is not finite"):
        export.to_onnx(diverged(dense()), path)
    received = module._received
    monkeypatch.setattr(module, "_received", lambda *a: [1.01 * received(*a)[0]])
    model = randomised(dense())
    with pytest.raises(export.ExportError, match=r"'compare'.*0\.01, above the tolerance 0\.0001"):
        export.to_onnx(model, path)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert export.to_onnx(model, path, tolerance=0.02).max_error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.tensorflow
def test_what_onnx_does_not_have_is_named(tmp_path, monkeypatch):
    """On TensorFlow alone: PyTorch may have a way for it."""
    monkeypatch.setattr(module, "_NEEDS", {"tensorflow": module._NEEDS["tensorflow"]})
    import tensorflow as tf

    x = keras.Input((4,))
    odd = layers.Lambda(lambda t: tf.math.lgamma(t), output_shape=(4,), name="odd")(x)
    message = r"'convert'.*On tensorflow, ONNX has no operation for Lgamma \(in .*odd.*Replace it"
    with pytest.raises(export.ExportError, match=message):
        export.to_onnx(keras.Model(x, odd), tmp_path / "m.onnx", inputs=np.ones((3, 4)))
    assert os.listdir(tmp_path) == []


@pytest.mark.tensorflow
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_another_backend_tries_what_the_first_cannot(tmp_path, monkeypatch):
    model = randomised(dense())
    refused = module.ConversionError("other", "not today")

    def refuse(*_):
        raise refused

    monkeypatch.setattr(module, "convert", refuse)
    assert export.to_onnx(model, tmp_path / "m.onnx").outputs == {"logits": (None, 5)}
    producer = onnx.load(tmp_path / "m.onnx").producer_name
    assert producer == "pytorch"


def test_arguments_are_checked(tmp_path, monkeypatch):
    model = dense()
    with pytest.raises(TypeError, match=r"keras\.Model, received Dense"):
        export.to_onnx(layers.Dense(1), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"'\.onnx'"):
        export.to_onnx(model, tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="tolerance"):
        export.to_onnx(model, tmp_path / "m.onnx", tolerance=0)
    with pytest.raises(ValueError, match=r"\('num_examples', 24\).*\(2, 9\)"):
        export.to_onnx(model, tmp_path / "m.onnx", inputs=np.zeros((2, 9)))
    with pytest.raises(FileNotFoundError, match="Create it first"):
        export.to_onnx(model, tmp_path / "missing" / "m.onnx")
    find = importlib.util.find_spec
    for hidden, message in (
        ({"onnxruntime"}, r"needs onnxruntime, .*keras-compaware\[onnx\]"),
        ({"tf2onnx", "torch"}, r"needs a converter: .*keras-compaware\[onnx,tensorflow\]"),
    ):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, hidden=hidden: None if n in hidden else find(n)
        )
        with pytest.raises(ImportError, match=message):
            export.to_onnx(model, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


# ---- every kind of network, dense, factorised and shrunk ----------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(tmp_path, network, form):
    model = FORMS[form](randomised(NETWORKS[network]()))
    x = examples(model, network, 5)
    result = export.to_onnx(model, tmp_path / "m.onnx", inputs=x)
    assert result.max_error < 1e-5
    assert result.agreement == 1.0
    assert [shape[0] for shape in (*result.inputs.values(), *result.outputs.values())] == [None] * 2
