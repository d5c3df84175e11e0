"""The program `export`."""

import os

import numpy as np
from absl import flags

from keras_compaware import export
from keras_compaware.cli import examples, program
from keras_compaware.cli.files import load_model, writing
from keras_compaware.export.litert import MODES

_LITERT_ONLY = ("quantization", "min_agreement", "sparse")


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "The model, a .keras file.")
    flags.DEFINE_string("out", None, "The file to write: .tflite for LiteRT, .onnx for ONNX.")
    flags.DEFINE_enum(
        "quantization",
        None,
        MODES,
        "How weights and activations of a .tflite file are stored. Kernels that were trained on a "
        "grid by UniformQuantization keep it. Default: float32.",
    )
    examples.define_flags(
        "The data set, of TensorFlow Datasets or digits, on whose training images the file is "
        "compared with the model, and the ranges of int8 are measured. Default: random numbers; "
        "int8 needs it.",
        256,
    )
    flags.DEFINE_float(
        "min_agreement",
        0.9,
        "With integers: the least share of predictions that agree with the model's, or nothing is "
        "written.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_bool(
        "sparse",
        False,
        "Store kernels with many zeros in a .tflite file without them; float32 and float16 only.",
    )


def main() -> None:
    """Writes the LiteRT or ONNX file, run and compared."""
    values = flags.FLAGS
    path, out = program.required("model"), program.output_path("out", ".tflite", ".onnx")
    to_onnx = out.endswith(".onnx")
    given = [name for name in _LITERT_ONLY if values[name].present]
    if to_onnx and given:
        raise program.UserError(
            f"--{given[0]} is for .tflite files; an .onnx file holds float32. Leave it out, or let "
            f"--out end in .tflite. Received: {os.path.basename(out)}"
        )
    if values.quantization == "int8" and not values.data:
        raise program.UserError(
            "--quantization=int8 measures the ranges of activations: name a data set, such as "
            "--data=digits."
        )
    model = load_model(path)
    images = np.concatenate(list(examples.batches())) if values.data else None
    with program.console.status("converting, running and comparing"), writing(out):
        if to_onnx:
            result = export.to_onnx(model, out, inputs=images)
        else:
            result = export.to_litert(
                model,
                out,
                inputs=images,
                quantization=values.quantization,
                calibration=images if values.quantization == "int8" else None,
                min_agreement=values.min_agreement,
                sparse=values.sparse,
            )
    program.say(result)


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags, positional=("model", "out"))
