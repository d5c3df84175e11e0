"""The program `compact` with a budget: a smaller model without any training."""

import io
import json

import keras
import pytest

pytest.importorskip("tensorflow")

from keras_compaware import measure
from keras_compaware.reporting import plots

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


def test_the_cache_goes_on_where_it_was(programs, model, tmp_path):
    cache, small = tmp_path / "cache.jsonl", tmp_path / "small.keras"
    arguments = ("compact", model, small, f"--cache={cache}", "--data=digits", "--examples=100")
    out = programs.succeeds(*arguments, "--target=macs=0.5")
    lines = cache.read_text().splitlines(keepends=True)
    assert len(lines) > 10
    cache.write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote
    assert programs.succeeds(*arguments, "--target=macs=0.5") == out
    found = cache.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in found] == [json.loads(line)["id"] for line in lines]
    assert found[:4] == lines[:4]
    programs.succeeds(*arguments, "--target=params=0.5")  # nothing new is measured
    assert cache.read_text() == "".join(found)
    message = programs.fails(*arguments, "--target=macs=0.5", "--round_to=8")
    assert "another model, other data or other arguments" in message


@pytest.mark.parametrize("data", [[], ["--data=digits", "--examples=64"]])
def test_a_plot(programs, model, tmp_path, data):
    pytest.importorskip("matplotlib")
    small, file = tmp_path / "small.keras", tmp_path / "own.svg"
    out = programs.succeeds("compact", model, small, "--target=macs=0.5", f"--plot={file}", *data)
    assert f"sensitivities drawn in {file}\n" in out
    measure = "change of the outputs" if data else "-log(energy kept)"
    assert f"growth of {measure}" in file.read_text()
    assert not file.with_suffix(".png").exists()
    if not data:
        folder = tmp_path / "plots"
        folder.mkdir()
        programs.succeeds("compact", model, small, "--target=macs=0.5", f"--plot={folder}")
        assert {path.name for path in folder.iterdir()} == {"sensitivity.png", "sensitivity.svg"}


def test_a_plot_stays_when_the_budget_cannot_be_met(programs, model, tmp_path):
    pytest.importorskip("matplotlib")
    small, file = tmp_path / "small.keras", tmp_path / "own.png"
    programs.fails("compact", model, small, "--target=macs=0.001", f"--plot={file}")
    assert file.read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_only(programs, model, tmp_path, monkeypatch):
    arguments = ("compact", model, tmp_path / "small.keras", "--target=macs=0.5")
    assert "/step" not in programs.succeeds(*arguments)
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert "/step" in programs.succeeds(*arguments)


def test_a_plot_without_matplotlib(programs, model, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    arguments = (tmp_path / "small.keras", "--target=macs=0.5", f"--plot={tmp_path}")
    message = programs.fails("compact", model, *arguments)
    assert "pip install 'keras-compaware[plots]'" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=half"], "--target must be like macs=0.5"),
        (["--target=flops=0.5"], "exactly one of the keys"),
        (["--target=macs=2"], "target"),
        (["--target=macs=0.001"], "cannot be met"),
        (["--data=digits"], "--data is of no use without --target"),
        (["--round_to=8"], "--round_to is of no use without --target"),
        (["--cache=a.jsonl"], "--cache is of no use without --target"),
        (["--plot=a.png"], "--plot is of no use without --target"),
        (["--target=macs=0.5", "--cache=a.jsonl"], "--cache is of no use without --data"),
        (["--target=macs=0.5", "--cache=a.json"], "--cache must end in .jsonl"),
        (
            ["--target=macs=0.5", "--plot=a.pdf"],
            "--plot must name a .png or .svg file, or a folder",
        ),
        (["--target=macs=0.5", "--plot=none/a.png"], "--plot: there is no folder"),
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
