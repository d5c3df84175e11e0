"""Sensitivities against models that are really cut."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_compaware as kc
from keras_compaware.compaction.rebuild import copy_model
from keras_compaware.search import sensitivities
from tests.coupling import networks
from tests.coupling.helpers import inputs_of, outputs_of, randomise

JAX = keras.backend.backend() == "jax"


def batches(model, number=2):
    return [inputs_of(model, seed) for seed in range(number)]


def outputs_by_batch(model, x):
    """What batch normalisation by the statistics of this very batch makes of it."""
    copy = copy_model(model)
    return outputs_of(kc.recalibrate_batch_norm(copy, [x]), x)


def change(model, small, data):
    pairs = [
        (a, b)
        for x in data
        for a, b in zip(outputs_by_batch(small, x), outputs_by_batch(model, x), strict=True)
    ]
    size = sum(np.sum(np.square(b.astype("float64"))) for _, b in pairs)
    share = sum(np.sum(np.square(a.astype("float64") - b)) for a, b in pairs) / size
    return -np.log(max(1 - share, 1e-3))


@pytest.mark.parametrize(
    "make",
    [
        networks.two_inputs,
        pytest.param(networks.residual, marks=[pytest.mark.slow] if JAX else []),
    ],
)
def test_equals_what_the_smaller_model_does(make):
    model = randomise(make())
    before = [np.array(w) for w in model.get_weights()]
    data = batches(model)
    found = kc.sensitivity(model, data, steps=2)
    assert found.measure == "change of the outputs"
    assert found.baseline == pytest.approx(0, abs=1e-10)
    assert set(found.channels) == {space.name for space in kc.channel_spaces(model).free}
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, curve in found.channels.items():
        number, value = max(curve.items())
        size = kc.channel_spaces(model)[name].size
        keep = kc.choose_channels(
            model, budget={"channels": number / size}, exclude=[f"^(?!{name}$)"]
        )
        assert len(keep[name]) == number < size
        assert value == pytest.approx(change(model, kc.shrink(model, keep), data), rel=1e-3)
    assert found.ranks
    for name, curve in found.ranks.items():
        rank, value = min(curve.items())
        small = kc.compress(model, kc.Recipe([kc.Rule(f"^{name}$", kc.AtEnd(kc.LowRank(rank)))]))
        assert value == pytest.approx(change(model, small, data), rel=1e-3)


def test_frozen_batch_norm_keeps_its_statistics_and_dropout_is_off():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5),
            layers.Dense(1, name="head"),
        ]
    )
    randomise(model)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    y = outputs_of(model, x)[0]
    norm = model.get_layer("norm")

    def baseline():
        return kc.sensitivity(model, [(x, y)], loss="mse", ranks=False).baseline

    norm.trainable = False
    assert baseline() == pytest.approx(0, abs=1e-10)
    norm.trainable = True
    expected = np.mean(np.square(outputs_by_batch(model, x)[0] - y))
    assert expected > 1e-3
    assert baseline() == pytest.approx(expected, rel=1e-4)
    assert "call" not in vars(norm)


def classifier():
    return randomise(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(12, "relu", name="hidden"),
                layers.Dense(3, "softmax", name="head"),
            ]
        )
    )


def test_a_loss():
    model = classifier()
    random = np.random.default_rng(0)
    data = [(random.normal(size=(n, 6)), random.integers(0, 3, n)) for n in (5, 2)]
    x, y = (np.concatenate(parts) for parts in zip(*data, strict=True))
    expected = float(np.mean(-np.log(outputs_of(model, x)[0][np.arange(7), y])))
    found = kc.sensitivity(model, data, loss="sparse_categorical_crossentropy", ranks=False)
    assert found.baseline == pytest.approx(expected, rel=1e-4)
    (curve,) = found.channels.values()
    assert list(curve) == sorted(curve)
    assert min(curve) == 1

    def wrong(y_true, y_pred):
        guess = keras.ops.argmax(y_pred, axis=-1)
        return keras.ops.cast(guess != keras.ops.cast(y_true, guess.dtype), "float32")

    errors = kc.sensitivity(model, data, loss=wrong, ranks=False)
    assert errors.measure == "wrong"
    assert errors.baseline == pytest.approx(np.mean(outputs_of(model, x)[0].argmax(1) != y))


def test_from_the_weights_alone():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="a", use_bias=False), layers.Dense(1, name="b")]
    )
    model.layers[0].kernel.assign(np.diag([2.0, 1.0, 0.5, 0.0]))
    model.layers[1].kernel.assign(np.ones((4, 1)))
    found = kc.sensitivity(model)
    assert found.measure == "-log(energy kept)"
    assert found.ranks["a/kernel"] == {1: pytest.approx(-np.log(4 / 5.25), rel=1e-5)}
    norms = kc.scores.L2()(model)["a"]
    lost = np.cumsum(np.sort(norms**2))[:-1] / np.sum(norms**2)
    assert found.channels["a"] == {
        3 - i: pytest.approx(-np.log(1 - share), rel=1e-5) for i, share in enumerate(lost)
    }


def test_the_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    model, cache = classifier(), tmp_path / "cache.jsonl"
    data = batches(model)
    whole = kc.sensitivity(model, data, steps=3)
    calls = []
    compute = sensitivities._Measured.loss

    def counted(self, group, amount):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(amount)
        return compute(self, group, amount)

    monkeypatch.setattr(sensitivities._Measured, "loss", counted)
    with pytest.raises(KeyboardInterrupt):
        kc.sensitivity(model, data, steps=3, cache=cache)
    assert len(cache.read_text().splitlines()) == 3
    with open(cache, "a") as file:
        file.write('{"id": "channels:hid')  # the process was killed while it wrote
    calls[:] = ["none yet"] * 100  # longer than 3, so that nothing interrupts
    assert kc.sensitivity(model, data, steps=3, cache=cache) == whole
    done = len(calls)
    assert kc.sensitivity(model, data, steps=3, cache=cache) == whole
    assert len(calls) == done == 100 + 1 + 6 - 3 + (len(whole.ranks.get("hidden/kernel", ())) - 3)

    model.layers[0].kernel.assign(2 * keras.ops.convert_to_tensor(model.layers[0].kernel))
    for changed in ({"data": data}, {"data": data, "steps": 2}):
        with pytest.raises(ValueError, match="another model, other data or other arguments"):
            kc.sensitivity(model, cache=cache, **changed)


def test_progress_is_shown_when_it_is_asked_for(capsys):
    model = classifier()
    quiet = kc.sensitivity(model, batches(model), steps=3)
    assert capsys.readouterr().out == ""
    assert kc.sensitivity(model, batches(model), steps=3, verbose=1) == quiet
    points = sum(len(curve) for of in (quiet.channels, quiet.ranks) for curve in of.values())
    out = capsys.readouterr().out
    assert f"1/{points}" in out
    assert f"{points}/{points}" in out


def test_json_and_text():
    found = kc.sensitivity(classifier(), None, steps=2)
    again = kc.Sensitivity.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert "hidden/kernel" in str(found)


def test_losses_between_the_measured_amounts():
    found = kc.Sensitivity("given", 1.0, {"a": {2: 3.0, 6: 0.5, 8: 1.4}}, {})
    group = sensitivities.Group("channels", 0, "a", [1, 2, 4, 6, 8, 10])
    # 6 channels seem better than 8: what is interpolated never falls with fewer channels.
    np.testing.assert_allclose(found.losses(group), [2.0, 2.0, 0.75, 0.4, 0.4, 0.0])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "yields no batch"),
        (np.ones((2, 6)), {}, TypeError, "iterable of batches"),
        ([np.ones((2, 5))], {}, ValueError, "has the shape"),
        ([np.ones((2, 6))], {"loss": "mse"}, ValueError, "batches \\(x, y\\)"),
        ([np.ones((2, 6))], {"steps": 0}, ValueError, "steps"),
        ([np.ones((2, 6))], {"num_batches": 0}, ValueError, "num_batches"),
        ([np.ones((2, 6))], {"score": "best"}, ValueError, "score"),
    ],
)
def test_bad_arguments(data, options, error, message):
    with pytest.raises(error, match=message):
        kc.sensitivity(classifier(), data, **options)


def test_weights_that_are_not_finite():
    model = classifier()
    model.layers[-1].bias.assign(np.full(3, np.nan))
    with pytest.raises(ValueError, match="not finite"):
        kc.sensitivity(model, [np.ones((2, 6))])
