"""The program `export`."""

from absl import flags

from keras_compaware import export
from keras_compaware.cli import program
from keras_compaware.cli.files import load_model, writing


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "The model, a .keras file.")
    flags.DEFINE_string("out", None, "The .tflite file to write.")


def main() -> None:
    """Writes the LiteRT file, run and compared."""
    path, out = program.required("model"), program.output_path("out", ".tflite")
    model = load_model(path)
    with program.console.status("converting, running and comparing"), writing(out):
        result = export.to_litert(model, out)
    program.say(result)


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
