"""The program `compact`."""

import os

from absl import flags

from keras_compaware import measure
from keras_compaware.cli import program
from keras_compaware.cli.files import load_model, save_model
from keras_compaware.compaction import compact


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "The trained model, a .keras file.")
    flags.DEFINE_string("out", None, "The .keras file to write.")


def main() -> None:
    """Writes the compacted model."""
    path, out = program.required("model"), program.output_path("out", ".keras")
    if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
        raise program.UserError(
            f"--out names the trained model itself, {path}. Choose another file: training goes on "
            "from the trained model, not from the compacted one."
        )
    model = load_model(path)
    result = compact(model)
    program.say(result)
    save_model(result.model, out)
    before, after = measure.parameters(model), measure.parameters(result.model)
    program.say(
        f"\nwritten to {out}: {after:,} parameters instead of {before:,}; "
        f"outputs differ by {result.max_error:.1e} (relative) at most"
    )


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
