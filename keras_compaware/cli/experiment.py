"""One experiment: train, compact, export, measure, beside the dense twin."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import keras
import numpy as np

from keras_compaware import data, export, measure, models
from keras_compaware._files import write_json_atomic, write_text_atomic
from keras_compaware.base import Chain, Code, Compressor, KernelAxes
from keras_compaware.cli.config import (
    dense_config,
    fingerprint,
    learning_rate_of,
    optimizer_of,
    recipe_of,
    source_of,
    steps_per_epoch,
)
from keras_compaware.cli.details import layers_of, spectra_of
from keras_compaware.cli.distribution import ONE_DEVICE, Devices
from keras_compaware.cli.early import check as check_early
from keras_compaware.cli.early import epoch_of, is_smaller
from keras_compaware.cli.files import first_line, load_model, read_model, save_model, writing
from keras_compaware.cli.program import UserError, console, say
from keras_compaware.cli.shrinking import check as check_shrink
from keras_compaware.cli.shrinking import cycles, settings_of
from keras_compaware.cli.workdir import Checkpoint, Workdir
from keras_compaware.compaction import CompactResult, compact, recalibrate_batch_norm
from keras_compaware.compressors import MagnitudePruning
from keras_compaware.data.store import CACHE_VARIABLE, default_cache_dir
from keras_compaware.kernels import find_targets
from keras_compaware.recipe import Recipe
from keras_compaware.reporting import REPORT_FORMAT


@dataclasses.dataclass
class Experiment:
    """A resolved configuration with its data.

    Args:
        config: Resolved configuration.
        data_dir: Folder of TFDS data sets, or None.
        devices: What is trained on.
    """

    config: Mapping[str, Any]
    data_dir: str | None = None
    devices: Devices = ONE_DEVICE

    def __post_init__(self) -> None:
        settings = self.config["data"]
        with _naming("config.data"):
            self.dataset = data.load(
                settings["name"],
                data_dir=self.data_dir,
                validation=settings["validation"],
                image_size=settings["image_size"],
            )
        examples = self.devices.usable(len(self.dataset.train))
        self.steps_per_epoch = steps_per_epoch(examples, self.config["batch_size"])
        self.total_steps = self.steps_per_epoch * self.config["epochs"]

    def recipe(self) -> Recipe | None:
        """Returns the recipe of the configuration's rules for kernels and channels, or None."""
        return recipe_of(self.config, self.steps_per_epoch, self.total_steps)

    def plan(self) -> list[dict[str, Any]]:
        """Returns what the recipe does with every kernel and channel space, as JSON values."""
        recipe = self.recipe()
        return [] if recipe is None else recipe.plan(self.build_model()).to_json()

    def build_model(self) -> keras.Model:
        """Builds the uncompiled model, with the weights that training starts from."""
        keras.utils.set_random_seed(self.config["seed"])
        with _naming("config.model, config.model_args"):
            model = models.build(
                self.config["model"],
                self.dataset.image_shape,
                self.dataset.num_classes,
                **self.config["model_args"],
            )
        if self.config["init_from"]:
            load_weights(model, self.config["init_from"])
        return model

    def compile(self, model: keras.Model, recipe: Recipe | None = None) -> None:
        """Compiles a model as the configuration says, with what a recipe does in every step."""
        optimizer = optimizer_of(self.config, self.total_steps)
        self._compile(model, optimizer if recipe is None else recipe.optimizer(optimizer))

    def _compile(self, model, optimizer):
        model.compile(
            optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"]
        )

    def train(self, workdir: Workdir) -> tuple[keras.Model, Checkpoint]:
        """Trains in a folder, going on from its last checkpoint; returns the trained model.

        Training ends exactly compressed and with batch-normalisation statistics that fit the
        weights: after all epochs, or after `config.compact_at_epoch`.
        """
        model = self.build_model()
        recipe = self.recipe()
        if recipe is not None:
            plan = recipe.plan(model)
            if self.devices.leads:
                with writing(workdir.plan):
                    write_text_atomic(workdir.plan, f"{plan}\n")
            say(plan)
            model = recipe.wrap(model)
        self.compile(model, recipe)
        epochs = epoch_of(self.config) or self.config["epochs"]
        return self._fit(model, workdir, epochs, recipe)

    def compact_and_train(
        self, model: keras.Model, before: Checkpoint, workdir: Workdir
    ) -> tuple[keras.Model, Checkpoint, dict[str, Any]]:
        """Compacts what `train` has trained by `config.compact_at_epoch`, and trains to the end.

        Returns:
            `(the trained small model, its checkpoint, what the report tells of the compaction)`.
        """
        epoch = epoch_of(self.config)
        with console.status("compacting"):
            compacted = compact(model, before.codes)
        say(f"after epoch {epoch}:\n{compacted}")
        if not is_smaller(compacted):
            say(
                "nothing got smaller by then, so the network is trained further as it is, without "
                "rules. Compact at a later epoch, or strengthen the rules."
            )
        small = compacted.model
        save_model(small, workdir.early)
        first_step = self.steps_per_epoch * epoch
        self._compile(small, optimizer_of(self.config, self.total_steps, first_step))
        small, checkpoint = self._fit(
            small, workdir, self.config["epochs"], before=before, first_epoch=epoch
        )
        # From here on the optimizer is that of a run that was not compacted early.
        schedule = learning_rate_of(self.config, self.total_steps)
        if not isinstance(schedule, float):
            small.optimizer.learning_rate = schedule
        small.optimizer.iterations.assign(self.total_steps)
        early = {
            "epoch": epoch,
            "parameters": measure.parameters(compacted.model),
            "macs": measure.macs(compacted.model),
            "seconds_per_epoch": {
                "before": before.seconds_per_epoch,
                "after": checkpoint.seconds_per_epoch,
            },
            **_as_json(compacted),
        }
        return small, checkpoint, early

    def train_further(
        self, model: keras.Model, workdir: Workdir, epochs: int, rate: float
    ) -> float:
        """Trains a model that was cut, without rules; returns the seconds."""
        steps = self.steps_per_epoch * epochs
        settings = {**self.config["optimizer"], "learning_rate": rate}
        self._compile(model, optimizer_of({**self.config, "optimizer": settings}, steps))
        trained, checkpoint = self._fit(model, workdir, epochs)
        if trained is not model:
            model.set_weights(trained.get_weights())
        return checkpoint.seconds

    def _fit(self, model, workdir, epochs, recipe=None, before=None, first_epoch=0):
        """Trains a compiled model, on all devices; returns it on one, and its checkpoint."""
        with self.devices.scope():
            model = self.devices.copy(model)
            compression = [] if recipe is None else recipe.callbacks(model)
            checkpoint = Checkpoint(
                workdir, next(iter(compression), None), self.config["seed"], before, self.devices
            )
            done = checkpoint.restore(model)
            if done:
                say(f"resuming after epoch {done} of {epochs}")
            batches = self.batches("train")
            validation = self.batches("validation") if self.dataset.validation else None
            model.fit(
                self.devices.share(batches),
                epochs=epochs,
                initial_epoch=done or first_epoch,
                shuffle=False,  # the batches shuffle themselves, the same way after a restart
                validation_data=None if validation is None else self.devices.share(validation),
                callbacks=[
                    data.FollowEpoch(batches),
                    *compression,
                    *_tensorboard(workdir),
                    checkpoint,
                ],
                verbose=1 if sys.stdout.isatty() else 2 if self.devices.leads else 0,
            )
        model = self.devices.copy(model)
        if self.config["recalibrate_steps"]:
            recalibrate_batch_norm(model, self.batches("train"), self.config["recalibrate_steps"])
        return model, checkpoint

    def batches(self, split: str) -> data.Batches:
        """Returns a split in batches; the training split reshuffled and augmented each epoch."""
        arguments = {}
        if split == "train":
            name = self.config["data"]["augment"]
            arguments["seed"] = self.config["seed"]
            arguments["augment"] = data.AUGMENTATIONS[name] if name else None
        return data.batches(getattr(self.dataset, split), self.config["batch_size"], **arguments)

    def test_accuracy(self, model: keras.Model) -> tuple[float, np.ndarray]:
        """Returns Keras's accuracy on the test split in [0, 1] and the predicted classes."""
        scores = model.predict(self.batches("test"), verbose=0)
        predicted = np.argmax(scores, axis=-1)
        return float(np.mean(predicted == self.dataset.test.labels)), predicted

    def dense_twin(self) -> Workdir:
        """Returns the folder of the dense twin: the same run without rules, trained once.

        It is kept in the cache under a hash of its configuration and of the versions of what
        trains it.
        """
        config = dense_config(self.config)
        key = fingerprint(
            config,
            {
                "data": f"{self.dataset.name} {self.dataset.version} {len(self.dataset.train)}",
                "model": source_of(self.config["model"]),
                "init_from": source_of(self.config["init_from"]),
                "backend": keras.backend.backend(),
                "versions": versions(),
                "data_dir": os.path.abspath(self.data_dir) if self.data_dir else None,
            },
        )
        workdir = Workdir(_twins_dir() / key)
        with self._leading(workdir):  # several runs may need it at the same time
            if self.devices.leads:
                found = all(p.exists() for p in (workdir.report, workdir.litert, workdir.codes))
                if not found:
                    workdir.open(config, overwrite=workdir.report.exists())
            if self.devices.agree(self.devices.leads and found):
                say(f"dense twin: found in {workdir.path}")
                return workdir
            say(f"dense twin: training the same network without compression, {workdir.path}")
            twin = Experiment(config, self.data_dir, self.devices)
            model, checkpoint = twin.train(workdir)
            if not self.devices.leads:
                return workdir
            save_model(model, workdir.model)
            report = twin.measure(model, model, workdir, {}, {})
            report |= {"seconds": checkpoint.seconds, "history": checkpoint.history}
            with writing(workdir.report):
                write_json_atomic(workdir.report, report)
        return workdir

    def _leading(self, workdir):
        """The lock on a folder, for which the first of several processes waits."""
        return workdir.locked(wait=True) if self.devices.leads else contextlib.nullcontext()

    def dense_model(self, twin: Workdir) -> keras.Model:
        """Returns the trained model of the dense twin's folder."""
        model = self.build_model()
        model.load_weights(twin.model)
        return model

    def check(self) -> None:
        """Finds out what cannot work before anything is trained or overwritten.

        Raises:
            ValueError: If the recipe does not fit the model.
            UserError: If nothing would be compressed, or the result could not be exported.
        """
        recipe, settings = self.recipe(), settings_of(self.config)
        early = epoch_of(self.config)
        if recipe is None and settings is None:
            raise UserError("the configuration has no rules, so there is nothing to compress")
        model = self.build_model()
        if settings is not None:
            check_shrink(model, settings)
        if recipe is not None:
            plan = recipe.plan(model)
            if not plan.assignments:
                raise UserError(f"nothing would be compressed:\n{plan}")
            kernels = recipe.final_compressors(model)
            if settings is not None and kernels:
                raise UserError(
                    "config.shrink trains further without rules, so these kernels would not stay "
                    f"compressed: {', '.join(kernels)}. Rules that only prepare, by a regularizer "
                    "or for channels, may stand beside it."
                )
            if early is not None:
                check_early(model, recipe)
            model = recipe.wrap(model)
            self.compile(model, recipe)
            recipe.callbacks(model)
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                "the result is exported to LiteRT by TensorFlow's converter, and TensorFlow is not "
                "installed (pip install tensorflow). The Keras backend may stay as it is."
            )

    def shrink(
        self, model: keras.Model, workdir: Workdir, settings: Mapping[str, Any]
    ) -> tuple[keras.Model, list[dict[str, Any]]]:
        """Cuts channels of a trained model and trains further, in cycles; see `cycles`."""

        def train(number: int, cut: keras.Model) -> float:
            folder = Workdir(workdir.path / f"cycle-{number}")
            folder.path.mkdir(exist_ok=True)
            rate = settings["learning_rate"]
            seconds = self.train_further(cut, folder, settings["epochs"], rate)
            save_model(cut, folder.model)
            return seconds

        return cycles(
            model,
            settings,
            accuracy=lambda model: self.test_accuracy(model)[0],
            batches=lambda: self.batches("train"),
            recalibrate_steps=self.config["recalibrate_steps"],
            train=train,
        )

    def measure(
        self,
        model: keras.Model,
        small: keras.Model,
        workdir: Workdir,
        compressors: Mapping[str, Compressor],
        codes: Mapping[str, Code],
    ) -> dict[str, Any]:
        """Exports the small model and measures it; returns plain JSON values.

        Args:
            model: The trained model.
            small: Its compacted form, which is exported.
            workdir: Where the LiteRT file and the archive of codes go.
            compressors: By target name, what training has left the kernels compressed by.
            codes: By target name, codes that training has left.
        """
        with console.status("exporting to LiteRT and comparing"), writing(workdir.litert):
            examples = self.dataset.test.images[:64] * np.float32(1 / 255)
            result = export.to_litert(small, workdir.litert, inputs=examples)
        with writing(workdir.codes):
            encoded = export.save_codes(model, compressors, workdir.codes, codes)
        accuracy, predicted = self.test_accuracy(small)
        images = self.dataset.test.images * np.float32(1 / 255)
        scores = export.predict(
            workdir.litert, images, batch_size=256, progress=sys.stdout.isatty()
        )
        classes = np.argmax(scores, axis=-1)
        return {
            "accuracy": float(np.mean(classes == self.dataset.test.labels)),
            "keras_accuracy": accuracy,
            "agreement": float(np.mean(classes == predicted)),
            "export_error": float(result.max_error),
            "parameters": measure.parameters(small),
            "macs": measure.macs(small),
            "encoded_bytes": encoded.bytes,
            "litert_bytes": measure.file_bytes(workdir.litert),
            "gzip_bytes": measure.gzip_bytes(workdir.litert),
        }


@contextlib.contextmanager
def _naming(keys: str) -> Iterator[None]:
    """Turns what is wrong with a value into a message that names its key."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{keys}: {first_line(error)}") from error


def load_weights(model: keras.Model, path: str) -> None:
    """Copies trained weights from a `.keras` or `.weights.h5` file into a model.

    Raises:
        UserError: If the file is missing or does not fit.
    """
    path = os.path.expanduser(path)
    if not pathlib.Path(path).is_file():
        raise UserError(f"--init_from: there is no file {path}")
    if not path.endswith((".keras", ".weights.h5")):
        raise UserError(f"--init_from must be a .keras or .weights.h5 file. Received: {path}")
    try:
        if path.endswith(".keras"):
            trained = read_model(path, compile=False)
            model.set_weights(trained.get_weights())
        else:
            model.load_weights(path)
    except Exception as error:
        raise UserError(
            f"--init_from: the weights of {path} cannot be loaded into the model '{model.name}': "
            f"{first_line(error)}"
        ) from error


def run(
    config: Mapping[str, Any],
    path: str,
    *,
    data_dir: str | None,
    overwrite: bool,
    devices: Devices = ONE_DEVICE,
) -> dict | None:
    """Runs a whole experiment in a folder; returns its report, of several processes in the first.

    Args:
        config: Resolved configuration.
        path: The folder: new, of an interrupted run of the same configuration, or of any run if
            `overwrite`. All processes have to see it.
        data_dir: Folder of TFDS data sets, or None.
        overwrite: Whether to remove the files of an earlier run first.
        devices: What is trained on.

    Raises:
        UserError: If the folder or the configuration does not allow it.
    """
    workdir = Workdir(path)
    experiment = Experiment(config, data_dir, devices)
    experiment.check()
    if not devices.leads:
        experiment.dense_twin()
        experiment.train(workdir)
        return None
    with workdir.locked():
        workdir.open(config, overwrite=overwrite)
        return _run_in(workdir, experiment)


def _trained(workdir: Workdir, experiment: Experiment, twin: Workdir) -> tuple:
    """Returns `(model, what the report tells of its training, compressors, codes)`."""
    settings = settings_of(experiment.config)
    compressors, codes = {}, {}
    if experiment.recipe() is None:  # the training before the first cut is that of the dense twin
        model = load_model(str(twin.model))
        experiment.compile(model)
        dense = json.loads(twin.report.read_text("utf-8"))
        training = {"seconds": dense["seconds"], "history": dense["history"], "firings": []}
    else:
        model, checkpoint = experiment.train(workdir)
        training = {}
        if epoch_of(experiment.config) is not None:
            model, checkpoint, training["early"] = experiment.compact_and_train(
                model, checkpoint, workdir
            )
        training |= {
            "seconds": checkpoint.seconds,
            "history": checkpoint.history,
            "firings": checkpoint.all_firings(),
        }
        compressors, codes = checkpoint.compressors, checkpoint.codes
    if settings is not None:
        model, training["shrink"] = experiment.shrink(model, workdir, settings)
        compressors, codes = {}, {}
    return model, training, compressors, codes


def _run_in(workdir: Workdir, experiment: Experiment) -> dict[str, Any]:
    config = experiment.config
    twin = experiment.dense_twin()
    model, training, compressors, codes = _trained(workdir, experiment, twin)
    save_model(model, workdir.model)
    with console.status("compacting"):
        compacted = compact(model, codes)
    say(compacted)
    save_model(compacted.model, workdir.compact)
    small = experiment.measure(
        compacted.whole,
        compacted.model,
        workdir,
        compressors_that_hold(compacted, compressors),
        compacted.codes,
    )
    dense = json.loads(twin.report.read_text("utf-8"))
    with console.status("measuring latency"):
        latency = export.latency([twin.litert, workdir.litert], num_threads=1)
    for row, file in ((dense, twin.litert), (small, workdir.litert)):
        row["latency_ms"] = latency[file].median_ms
    whole = experiment.dense_model(twin)
    report = {
        "format": REPORT_FORMAT,
        "name": f"{experiment.dataset.name}, {config['model']}",
        "dense": dense,
        "compact": {
            **small,
            **training,
            **_as_json(compacted),
        },
        "plan": experiment.plan(),
        "layers": layers_of(whole, compacted.model),
        "spectra": spectra_of(whole, compacted.whole),
        "config": config,
        "steps_per_epoch": experiment.steps_per_epoch,
        "data": {"name": experiment.dataset.name, "version": experiment.dataset.version},
        "backend": keras.backend.backend(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "command": f"python -m apps.train {shlex.join(sys.argv[1:])}",
    }
    with writing(workdir.report):
        write_json_atomic(workdir.report, report)
    return report


def _as_json(compacted: CompactResult) -> dict[str, Any]:
    return {
        "compact_error": compacted.max_error,
        "layers": [dataclasses.asdict(row) for row in compacted.rows],
        "channels": [dataclasses.asdict(row) for row in compacted.channels],
    }


def compressors_that_hold(
    compacted: CompactResult, compressors: Mapping[str, Compressor]
) -> dict[str, Compressor]:
    """Returns the compressors of the kernels that are still compressed by them.

    A kernel that has lost channels has other shares of zeros and of ranks than before: its zeros
    are those of a pruning to their present share, and it is only encoded if that restores it.
    """
    held = {}
    # Kernels of frozen layers inside wrappers are compressed, but are no targets.
    for target in find_targets(compacted.whole)[0]:
        compressor = compressors.get(target.name)
        if compressor is None:
            continue
        if compacted.channels and target.name not in compacted.codes:
            kernel = keras.ops.convert_to_numpy(target.read())
            candidates = (compressor, *_prunings_to_present_zeros(compressor, kernel))
            compressor = next((c for c in candidates if _restores(c, kernel, target.axes)), None)
            if compressor is None:
                continue
        held[target.name] = compressor
    return held


def _prunings_to_present_zeros(compressor: Compressor, kernel: np.ndarray) -> tuple:
    """What stands in for a compressor that sets entries to zero, or for a chain that begins so."""
    first, *rest = compressor.compressors if isinstance(compressor, Chain) else (compressor,)
    zeros = 1.0 - np.count_nonzero(kernel) / kernel.size
    if not first.selects or not 0.0 < zeros < 1.0:
        return ()
    pruning = MagnitudePruning(zeros)
    return (Chain([pruning, *rest]), pruning) if rest else (pruning,)


def _restores(compressor: Compressor, kernel: np.ndarray, axes: KernelAxes) -> bool:
    w = keras.ops.convert_to_tensor(kernel)
    restored = compressor.decode(compressor.encode(w, axes=axes))
    return np.allclose(kernel, keras.ops.convert_to_numpy(restored), atol=1e-6)


def versions() -> dict[str, str]:
    """Returns the versions of what decides about a result."""
    found = {"python": platform.python_version()}
    for name in ("keras-compaware", "keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _twins_dir() -> pathlib.Path:
    """The folder of dense twins, beside the arrays of data sets or where the user wants both."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (default_cache_dir() if chosen else default_cache_dir().parent) / "dense_twins"


def _tensorboard(workdir: Workdir) -> list[keras.callbacks.Callback]:
    """TensorBoard's callback where TensorFlow runs anyway; elsewhere it would take the GPU."""
    if keras.backend.backend() == "tensorflow" and importlib.util.find_spec("tensorboard"):
        return [keras.callbacks.TensorBoard(str(workdir.tensorboard))]
    return []
