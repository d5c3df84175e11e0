"""The folder of a run: what lies in it, how a run is resumed, what is never overwritten."""

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import keras
import numpy as np

from keras_compaware._files import write_json_atomic, write_text_atomic
from keras_compaware.base import Code, Compressor
from keras_compaware.cli.distribution import ONE_DEVICE, Devices
from keras_compaware.cli.files import first_line, save_model, writing
from keras_compaware.cli.program import UserError, say
from keras_compaware.training import CompressionCallback


class Workdir:
    """Paths of a run and what may happen to them.

    Args:
        path: The folder; created by `open`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.plan = self.path / "plan.txt"
        self.history = self.path / "history.csv"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.early = self.path / "early.keras"
        self.early_checkpoints = self.path / "early-checkpoints"
        self.model = self.path / "model.keras"
        self.compact = self.path / "compact.keras"
        self.litert = self.path / "model.tflite"
        self.codes = self.path / "codes.safetensors"
        self.report = self.path / "report.json"

    @contextlib.contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[None]:
        """Makes the folder and keeps other processes from working in it while the block runs.

        Args:
            wait: Whether to wait for another process to finish. Default: refuse.

        Raises:
            UserError: If another process works in the folder, or it is not writable.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self.path / ".lock", "w"))
            except OSError as error:
                raise self._not_writable(error) from error
            if not _lock(file):
                if not wait:
                    raise UserError(
                        f"another process is working in {self.path}. Wait until it has ended, or "
                        "choose another --workdir."
                    )
                say(f"waiting for another process to finish {self.path}")
                _lock(file, wait=True)
            yield

    def open(self, config: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Makes the folder ready for a run of this configuration: new, resumed or overwritten.

        Raises:
            UserError: If it holds a finished run, another configuration or files that are not of
                a run, or is not writable.
        """
        is_run = self.config.exists() or self.report.exists()
        if self.report.exists() and not overwrite:
            raise UserError(
                f"{self.path} holds a finished run. Choose another --workdir, look at it with "
                f"`python -m apps.report --workdir={self.path}`, or run again with --overwrite."
            )
        foreign = [] if is_run else [path.name for path in self._results() if path.exists()]
        if foreign:
            raise UserError(
                f"{self.path} holds {', '.join(foreign)}, but no config.json: that is not a run of "
                "this program, so it is left alone. Choose another --workdir."
            )
        try:
            if overwrite and is_run:
                self._clear()
            self._remove_leftovers()
            before = json.loads(self.config.read_text("utf-8")) if self.config.exists() else config
            # Written anew although it is the same: a folder that refuses is found out before an
            # epoch is trained.
            write_json_atomic(self.config, before)
        except OSError as error:
            raise self._not_writable(error) from error
        except ValueError as error:
            raise UserError(
                f"{self.config} is damaged ({error}). Run again with --overwrite, or remove the "
                "folder."
            ) from error
        different = _differences(before, json.loads(json.dumps(config)))
        if different:
            raise UserError(
                f"{self.path} holds an interrupted run of another configuration, which differs in "
                f"{', '.join(different)}. Choose another --workdir, or run with --overwrite."
            )

    def _results(self) -> tuple[pathlib.Path, ...]:
        return (
            *(self.litert, self.codes, self.compact, self.model, self.history, self.plan),
            *(self.checkpoints, self.early, self.early_checkpoints, self.tensorboard),
            *sorted(self.path.glob("cycle-[0-9]*")),
        )

    def _clear(self) -> None:
        """Removes the files of an earlier run, and nothing else."""
        self.report.unlink(missing_ok=True)
        for path in self._results():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.config.unlink(missing_ok=True)  # last: it tells that this is a run

    def _remove_leftovers(self) -> None:
        """Removes the temporary files of a process that was killed while it wrote."""
        for file in (self.config, self.report, *self._results()):
            for temporary in self.path.glob(f".tmp-????????-{file.name}"):
                temporary.unlink(missing_ok=True)

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(
            f"--workdir {self.path} cannot be written to: {error.strerror or error}. "
            "Choose a folder in which you may write."
        )


def _lock(file: IO[str], wait: bool = False) -> bool:
    """Locks an open file until it is closed; returns False if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _differences(before: Any, now: Any, name: str = "config") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        same_keys = set(before) == set(now)
        ordered = name in ("config.rules", "config.channels")
        reordered = ordered and same_keys and list(before) != list(now)
        found = [f"the order of {name}"] if reordered else []
        for key in dict.fromkeys([*before, *now]):
            found += _differences(before.get(key), now.get(key), f"{name}.{key}")
        return found
    return [] if before == now else [name]


class Checkpoint(keras.callbacks.Callback):
    """Saves all that a run needs to go on after each epoch: weights, optimizer, firings, history.

    An epoch's state is two files, the model and then a JSON file that makes it valid; both are
    written atomically, and older epochs are removed only afterwards. So at every moment the
    folder holds a complete checkpoint of the last finished epoch.

    Args:
        workdir: The run's folder.
        compression: The run's `CompressionCallback`, whose state is saved with the weights.
        seed: The run's seed.
        before: Of a model that was compacted early, the checkpoint of the training before, which
            this one goes on with in a folder of its own. Default None.
        devices: What the model is trained on; of several processes the first one writes.
    """

    def __init__(
        self,
        workdir: Workdir,
        compression: CompressionCallback | None,
        seed: int,
        before: "Checkpoint | None" = None,
        devices: Devices = ONE_DEVICE,
    ) -> None:
        super().__init__()
        self._seed = seed
        self._devices = devices
        self._workdir = workdir
        self._compression = compression
        self._folder = workdir.early_checkpoints if before else workdir.checkpoints
        self.history: list[dict[str, float]] = list(before.history) if before else []
        self.firings: list[dict[str, Any]] = before.all_firings() if before else []
        self.seconds = before.seconds if before else 0.0
        # Of the epochs of this training: seconds, and whether it was the first one of a process.
        self._epochs: list[tuple[float, bool]] = []
        self._is_first = True
        self._started = self._epoch_started = time.perf_counter()

    def restore(self, model: keras.Model) -> int:
        """Loads the last checkpoint into a compiled model; returns the number of epochs done.

        Raises:
            UserError: If the checkpoint is damaged or belongs to another model.
        """
        found = sorted(self._folder.glob("epoch-*.json"))
        if not found:
            return 0
        try:
            state = json.loads(found[-1].read_text())
            model.optimizer.build(model.trainable_variables)
            model.load_weights(found[-1].with_suffix(".keras"))
            for variable, value in zip(_random_states(model), state["random"], strict=True):
                variable.assign(np.array(value, variable.dtype))
            if self._compression is not None:
                self._compression.set_state(state["compression"])
            self.history, self.firings = state["history"], state["firings"]
            self.seconds, self._epochs = float(state["seconds"]), state["epochs"]
            epochs = int(state["epoch"])
        except Exception as error:
            raise UserError(
                f"the checkpoint {found[-1]} cannot be restored ({type(error).__name__}: "
                f"{first_line(error)}). Run again with --overwrite."
            ) from error
        if self._devices.leads:
            self._write_history()  # the run may have ended between the checkpoint and this file
        return epochs

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._is_first = True
        self._started = time.perf_counter()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Stops the clock."""
        self.seconds += time.perf_counter() - self._started

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Seeds what draws from global generators, so that an epoch is the same after a restart."""
        self._epoch_started = time.perf_counter()
        # Dropout on PyTorch does; elsewhere the layers have generators of their own.
        mixed = np.random.SeedSequence([self._seed, epoch]).generate_state(1)
        keras.utils.set_random_seed(int(mixed[0]))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes the checkpoint and the history."""
        self._epochs.append((time.perf_counter() - self._epoch_started, self._is_first))
        self._is_first = False
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        numbers = {key: _finite(value) for key, value in (logs or {}).items()}
        self.history.append({"epoch": epoch + 1, **numbers, "learning_rate": rate})
        if self._devices.leads:
            with writing(self._folder), self._devices.alone():
                self._save(epoch + 1)

    def _save(self, epochs: int) -> None:
        name = f"epoch-{epochs:05d}"
        folder = self._folder
        folder.mkdir(exist_ok=True)
        # Not a .weights.h5 file: on a full disk the HDF5 library crashes the process.
        save_model(self.model, folder / f"{name}.keras")
        state = {
            "epoch": epochs,
            "seconds": self.seconds + time.perf_counter() - self._started,
            "epochs": self._epochs,
            "random": [
                keras.ops.convert_to_numpy(variable).tolist()
                for variable in _random_states(self.model)
            ],
            "history": self.history,
            "firings": self.all_firings(),
            "compression": self._compression.get_state() if self._compression else None,
        }
        write_json_atomic(folder / f"{name}.json", state, indent=None)
        for file in sorted(folder.iterdir()):
            if not file.name.startswith(name):
                file.unlink()
        self._write_history()

    def _write_history(self) -> None:
        with writing(self._workdir.history):
            write_text_atomic(self._workdir.history, _as_csv(self.history))

    @property
    def seconds_per_epoch(self) -> float:
        """Mean over the epochs, validation included, without those in which Keras compiles."""
        seconds = [seconds for seconds, is_first in self._epochs if not is_first]
        return statistics.mean(seconds or [seconds for seconds, _ in self._epochs])

    @property
    def codes(self) -> dict[str, Code]:
        """Codes of kernels that several compressors made, for `compact`; known once trained."""
        return self._devices.collect(self._compression.codes) if self._compression else {}

    @property
    def compressors(self) -> dict[str, Compressor]:
        """What kernels are compressed by, by target name; known once trained."""
        return self._compression.compressors if self._compression else {}

    def all_firings(self) -> list[dict[str, Any]]:
        """Returns this run's firings, those before an interruption included, as JSON values."""
        new = self._compression.firings if self._compression else []
        return self.firings + [
            {
                "step": firing.step,
                "seconds": round(firing.seconds, 6),
                "distortion": firing.distortion,
                "final": firing.final,
            }
            for firing in new
        ]


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of random layers, such as Dropout, which Keras does not save with a model."""
    weights = {id(weight) for weight in model.weights}
    return [v for v in model.non_trainable_variables if id(v) not in weights]


def _finite(value: Any) -> float | None:
    """A JSON number; NaN and infinity, the traces of a diverged run, become null."""
    return float(value) if math.isfinite(value) else None


def _as_csv(rows: list[dict[str, float]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
