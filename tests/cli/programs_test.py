"""The programs besides `train`: evaluate, compact, export, report; and what --help shows."""

import ast
import pathlib
import re

import keras
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import measure

pytestmark = pytest.mark.tensorflow

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = {
    "train": {
        *("config", "workdir", "data_dir", "init_from", "overwrite"),
        *("distribute", "num_devices", "coordinator", "num_processes", "process_id"),
    },
    "compact": {
        *("model", "out", "target", "data", "data_dir", "examples", "round_to", "allocation"),
        *("cache", "plot"),
    },
    "export": {
        *("model", "out", "quantization", "data", "data_dir", "examples", "min_agreement"),
        "sparse",
    },
    "evaluate": {"model", "data", "data_dir", "image_size", "split", "batch_size"},
    "report": {"workdir", "compare", "out"},
    "sweep": {"config", "workdir", "data_dir", "workers", "dry_run", "report", "retry_failed"},
}


def test_every_program_is_in_the_table():
    assert set(FLAGS) == {file.stem for file in (ROOT / "apps").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", FLAGS)
def test_help(programs, name):
    outcome = programs(name, "--help")
    assert outcome.status in (0, 1)  # absl's choice
    document = ast.get_docstring(ast.parse((ROOT / f"apps/{name}.py").read_text()))
    assert document in outcome.out
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+)", outcome.out, flags=re.MULTILINE))
    assert shown == FLAGS[name] | {"debug"}
    assert outcome.err == ""


def test_help_needs_no_data(programs, tmp_path):
    """As a process of its own, where every folder that it could look at is missing."""
    nowhere = str(tmp_path / "nowhere")
    environment = {"KERAS_COMPAWARE_CACHE": nowhere, "TFDS_DATA_DIR": nowhere}
    outcome = programs.process("train", "--help", **environment)
    assert outcome.status in (0, 1)
    assert "Trains a network so that it becomes small" in outcome.out
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_the_examples_name_files_that_exist(name):
    text = (ROOT / f"apps/{name}.py").read_text()
    for file in re.findall(r"--config=(\S+)", text):
        assert (ROOT / file).is_file()
    assert f"python -m apps.{name} --" in text


def test_the_programs_can_be_imported_together():
    """Several have flags of the same name, which are defined only when one of them runs."""
    import importlib

    for name in FLAGS:
        assert callable(importlib.import_module(f"keras_compaware.cli.{name}").run)


@pytest.mark.parametrize("file", ["model.tflite", "compact.keras", "model.keras"])
def test_evaluate_agrees_with_the_report(programs, finished, file):
    compact = finished.report["compact"]
    expected = compact["accuracy" if file == "model.tflite" else "keras_accuracy"]
    out = programs.succeeds("evaluate", f"--model={finished.path / file}", "--batch_size=100")
    assert out == (
        f"accuracy {100 * expected:.2f} %: {round(expected * 896):,} of 896 examples of digits "
        f"(test) right, {finished.path / file}\n"
    )


def test_evaluate_on_the_training_split(programs, finished):
    out = programs.succeeds(
        "evaluate", f"--model={finished.path / 'model.tflite'}", "--split=train"
    )
    assert "of 901 examples of digits (train) right" in out


def test_compact_and_export_make_what_train_made(programs, finished, tmp_path):
    small, litert = tmp_path / "[small].keras", tmp_path / "small.tflite"
    out = programs.succeeds("compact", f"--model={finished.path / 'model.keras'}", f"--out={small}")
    report = finished.report["compact"]
    assert "rank 4 of 32" in out
    assert f"written to {small}: {report['parameters']:,} parameters instead of 2,778" in out
    assert measure.parameters(keras.models.load_model(small)) == report["parameters"]
    out = programs.succeeds("export", f"--model={small}", f"--out={litert}")
    assert out.startswith(f"{litert}: {litert.stat().st_size:,} bytes, ")
    assert litert.stat().st_size == pytest.approx(report["litert_bytes"], rel=0.01)
    out = programs.succeeds("evaluate", f"--model={litert}")
    assert f"accuracy {100 * report['accuracy']:.2f} %" in out


def test_export_of_integers(programs, finished, tmp_path):
    model, litert = finished.path / "compact.keras", tmp_path / "int8.tflite"
    flags = (f"--model={model}", f"--out={litert}", "--quantization=int8")
    outcome = programs("export", *flags)
    assert outcome.status != 0
    assert "such as --data=digits" in outcome.err
    assert not litert.exists()
    folder = f"--data_dir={programs.environment['TFDS_DATA_DIR']}"
    arguments = (*flags, "--data=digits", folder, "--min_agreement=0.7")  # hardly trained
    out = programs.succeeds("export", *arguments)
    assert "predictions agree to" in out
    assert "DEQUANTIZE" in out


def test_export_to_onnx(programs, finished, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    model, out = finished.path / "compact.keras", tmp_path / "small.onnx"
    flags = (f"--model={model}", f"--out={out}")
    for flag in ("--quantization=float16", "--min_agreement=0.5", "--sparse"):
        outcome = programs("export", *flags, flag)
        assert outcome.status != 0
        assert f"{flag.split('=')[0]} is for .tflite files" in outcome.err
    assert not out.exists()
    shown = programs.succeeds("export", *flags)
    assert shown.startswith(f"{out}: {out.stat().st_size:,} bytes, ")
    assert "MatMul" in shown
    outcome = programs("export", f"--model={model}", f"--out={tmp_path / 'small.pb'}")
    assert "--out must end in .tflite or .onnx" in outcome.err


def test_report(programs, finished):
    out = programs.succeeds("report", f"--workdir={finished.path}")
    compact = finished.report["compact"]
    lines = out.splitlines()
    assert lines[0].strip() == "digits, lenet_300_100: LiteRT on the test split, seed 0"
    assert f"{100 * compact['accuracy']:.2f} %" in lines[3]
    assert f"{compact['parameters']:,}" in lines[3]
    assert f"1 / {2778 / compact['parameters']:.2f}" in lines[4]
    assert lines[-1] == finished.report["command"]


def test_report_compares(programs, finished):
    paths = f"{finished.path},{finished.path}"
    out = programs.succeeds("report", f"--workdir={finished.path}", f"--compare={paths}")
    lines = [line.split()[0] for line in out.splitlines()[1:] if line.strip()]
    assert lines == ["dense", *[finished.path.name] * 3]  # one twin for all of them
    assert out.count(f"{finished.report['compact']['parameters']:,}") == 3
