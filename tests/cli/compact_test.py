"""The program `compact` with a budget: a smaller model without any training."""

import json

import keras
import pytest

pytest.importorskip("tensorflow")

from keras_compaware import measure

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, "relu", name="dense"),
            keras.layers.Dense(10, "softmax", name="head"),
        ]
    )
    path = tmp_path_factory.mktemp("models") / "model.keras"
    model.save(path)
    return path


@pytest.mark.parametrize("data", [[], ["--data=digits", "--examples=100"]])
def test_a_budget(programs, model, tmp_path, data):
    small, allocation = tmp_path / "small.keras", tmp_path / "allocation.json"
    out = programs.succeeds(
        "compact", model, small, "--target=macs=0.5", f"--allocation={allocation}", *data
    )
    whole, found = (keras.models.load_model(path) for path in (model, small))
    assert 0.4 < measure.macs(found) / measure.macs(whole) <= 0.5
    assert f"{measure.macs(found):,} MACs instead of {measure.macs(whole):,}" in out

    edited = json.loads(allocation.read_text())
    edited["keep"] = {"conv": [0, 1, 2, 3]}
    edited["ranks"] = {}
    allocation.write_text(json.dumps(edited))
    programs.succeeds("compact", model, small, f"--allocation={allocation}")
    assert keras.models.load_model(small).get_layer("conv").filters == 4


def test_multiples(programs, model, tmp_path):
    small = tmp_path / "small.keras"
    programs.succeeds("compact", model, small, "--target=params=0.4", "--round_to=8")
    assert keras.models.load_model(small).get_layer("conv").filters % 8 == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=half"], "--target must be like macs=0.5"),
        (["--target=flops=0.5"], "exactly one of the keys"),
        (["--target=macs=2"], "target"),
        (["--target=macs=0.001"], "cannot be met"),
        (["--data=digits"], "--data is of no use without --target"),
        (["--round_to=8"], "--round_to is of no use without --target"),
        (["--allocation=missing.json"], "missing.json"),
        (["third.keras"], "unexpected argument 'third.keras': without a name, this program takes"),
        (["--out=twice.keras"], "--out is given twice"),
    ],
)
def test_mistakes(programs, model, tmp_path, arguments, message):
    small = tmp_path / "small.keras"
    assert message in programs.fails("compact", model, small, *arguments)
    assert not small.exists()


def test_an_allocation_that_is_none(programs, model, tmp_path):
    file = tmp_path / "allocation.json"
    for text in ("{", "[]", '{"keep": {}, "unknown": 1}', '{"keep": {}}'):
        file.write_text(text)
        message = programs.fails("compact", model, tmp_path / "a.keras", f"--allocation={file}")
        assert "is not what --target has written" in message
