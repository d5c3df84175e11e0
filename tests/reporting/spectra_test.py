"""What TensorBoard shows: the scalars of a recipe, and histograms of singular values."""

import importlib.util

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import keras_compaware as kc
from keras_compaware.reporting import SpectrumHistograms


def network():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(6, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, name="hidden"),
            keras.layers.Dense(1, name="vector"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def fit(model, callbacks, epochs=3):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 4, 4, 1)), random.normal(size=(8, 1))
    return model.fit(x, y, epochs=epochs, batch_size=4, verbose=0, callbacks=callbacks)


def events(folder):
    """Tag to {step: array} of all that lies in a folder of events."""
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return {
        tag: {e.step: tensor_util.make_ndarray(e.tensor_proto) for e in found.Tensors(tag)}
        for tag in found.Tags()["tensors"]
    }


def recipe():
    rules = [
        kc.Rule("conv", kc.Every(1, kc.MagnitudePruning(0.5))),
        kc.Rule("hidden", kc.Every(1, kc.LowRank(rank=2))),
    ]
    return kc.Recipe(rules)


@pytest.mark.tensorflow
def test_scalars_reach_tensorboard_behind_the_callback_of_a_recipe(tmp_path):
    model = network()
    board = keras.callbacks.TensorBoard(str(tmp_path))
    history = fit(model, [*recipe().callbacks(model), board]).history
    found = events(tmp_path / "train")
    for name in ("sparsity", "rank", "distortion", "compression_seconds"):
        written = [found[f"epoch_{name}"][epoch] for epoch in range(3)]
        np.testing.assert_allclose(written, history[name], rtol=1e-6)
    assert history["rank"] == [2.0] * 3
    assert history["sparsity"][-1] == pytest.approx(27 / (54 + 120))


@pytest.mark.tensorflow
def test_scalars_do_not_reach_it_before_that_callback(tmp_path):
    model = network()
    board = keras.callbacks.TensorBoard(str(tmp_path))
    fit(model, [board, *recipe().callbacks(model)])
    found = events(tmp_path / "train")
    assert "epoch_loss" in found
    assert "epoch_sparsity" not in found


def test_histograms_hold_the_singular_values(tmp_path):
    model = network()
    fit(model, [*recipe().callbacks(model), SpectrumHistograms(tmp_path, every=2)])
    found = events(tmp_path)
    assert set(found) == {"singular_values/conv/kernel", "singular_values/hidden/kernel"}
    assert all(set(steps) == {0, 2} for steps in found.values())
    kernel = keras.ops.convert_to_numpy(model.get_layer("hidden").kernel)
    values = np.linalg.svd(kernel, compute_uv=False)
    buckets = found["singular_values/hidden/kernel"][2]  # (buckets, [left, right, count])
    assert buckets[:, 2].sum() == 5
    np.testing.assert_allclose(buckets[[0, -1], [0, 1]], [values[-1], values[0]], atol=1e-5)
    assert buckets[0, 2] == (values < values[0] / 30).sum() == 3  # rank 2


def test_arguments_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`every` must be an integer >= 1"):
        SpectrumHistograms(tmp_path, every=0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "tensorboard" else find(n)
    )
    with pytest.raises(ImportError, match=r"keras-compaware\[tensorboard\]"):
        SpectrumHistograms(tmp_path)
