"""The program `train`."""

from absl import flags

from keras_compaware.cli import config_flag, program
from keras_compaware.cli.config import resolve
from keras_compaware.cli.experiment import run as run_experiment
from keras_compaware.cli.report import print_states
from keras_compaware.reporting import results_table


def define_flags() -> None:
    """Defines the flags."""
    config_flag.define(
        "config",
        "Configuration, a Python file with get_config(); see configs/. Single values are "
        "overridden by --config.key=value, after --config.",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run: models, history, report. An interrupted run is resumed.",
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TensorFlow Datasets. Default: $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    flags.DEFINE_string(
        "init_from", None, "Trained weights to start from, a .keras or .weights.h5 file."
    )
    flags.DEFINE_bool("overwrite", False, "Start anew, removing the files of an earlier run.")


def main() -> None:
    """Trains, compacts, exports and reports."""
    values = flags.FLAGS
    if values.config is None:
        raise program.UserError("--config is missing. See --help and configs/.")
    workdir = program.required("workdir")
    config = resolve(values.config)
    if values.init_from:
        config["init_from"] = values.init_from
    report = run_experiment(config, workdir, data_dir=values.data_dir, overwrite=values.overwrite)
    files = "model.keras, compact.keras, model.tflite, codes.safetensors, report.json"
    program.say(f"\nwritten to {workdir}: {files}\n")
    program.console.print(results_table([report]), markup=False)
    print_states(report)


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
