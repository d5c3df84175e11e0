"""The program `train`."""

from absl import flags

from keras_compaware.cli import config_flag, distribution, program
from keras_compaware.cli.config import resolve
from keras_compaware.cli.distribution import KINDS
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
    flags.DEFINE_enum(
        "distribute",
        None,
        KINDS,
        "none: one device. data: every batch is shared by all devices of this machine, or of all "
        "processes; config.batch_size is that of all together. Default: config.distribute.",
    )
    flags.DEFINE_integer(
        "num_devices",
        None,
        "So many devices instead of all. Where there is no accelerator, the CPU is divided into "
        "so many, which serves for trying out.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Several processes, on JAX: HOST:PORT of the first one. Each is started with the same "
        "flags but --process_id, and sees the same folders.",
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=2)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
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
    for key in ("distribute", "num_devices"):
        if values[key].value is not None:
            config[key] = values[key].value
    devices = distribution.start(
        config, values.coordinator, values.num_processes, values.process_id
    )
    program.console.quiet = not devices.leads
    try:
        report = run_experiment(
            config,
            workdir,
            data_dir=values.data_dir,
            overwrite=values.overwrite,
            devices=devices,
        )
    except BaseException:
        devices.leave()
        raise
    if report is None:
        return
    files = "model.keras, compact.keras, model.tflite, codes.safetensors, report.json"
    program.say(f"\nwritten to {workdir}: {files}\n")
    program.console.print(results_table([report]), markup=False)
    print_states(report)


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
