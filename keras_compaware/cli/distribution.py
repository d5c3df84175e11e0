"""Data-parallel training: the devices that share every batch of a run, in one process or several.

    batch of the configuration  ->  equal parts, one for each device  ->  one update of all copies

Only training is distributed. A model is built on one device, copied to all of them for `fit`, and
brought back to one, where it is compacted, exported and measured. Of several processes the first
one does that, and it alone writes files.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_compaware import data
from keras_compaware.base import Code
from keras_compaware.cli.program import UserError
from keras_compaware.compaction.rebuild import clone, copy_variable, made_anew

KINDS = ("none", "data")
"""What `--distribute` may be: one device, or a copy of the model on each."""

_HOST_DEVICES = "xla_force_host_platform_device_count"
_A_DAY = 86_400  # seconds; so long the other processes wait while the first one exports


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a run trains on; by default one, and nothing is distributed.

    Args:
        strategy: A `tf.distribute.Strategy` or `keras.distribution.Distribution`, or None.
        number: Devices of all processes together.
        process: Which of the processes this one is, from 0.
        processes: Number of processes.

    Example:
    >>> devices = Devices()
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> with devices.scope():
    ...     devices.copy(model) is model
    True
    """

    strategy: Any = None
    number: int = 1
    process: int = 0
    processes: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.process == 0

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which models are copied to all devices and trained."""
        return contextlib.nullcontext() if self.strategy is None else self.strategy.scope()

    def copy(self, model: keras.Model) -> keras.Model:
        """Returns a copy of a model that is compiled: on all devices in `scope`, else on one.

        Where nothing is distributed it is the model itself.

        Raises:
            ValueError: If the model is subclassed.
        """
        if self.strategy is None:
            return model
        copy = clone(model, _anew)
        if model.optimizer.built:
            copy.optimizer.build(copy.trainable_variables)
            variables = zip(model.optimizer.variables, copy.optimizer.variables, strict=True)
            for source, destination in variables:
                copy_variable(source, destination)
        return copy

    def collect(self, codes: Mapping[str, Code]) -> dict[str, Code]:
        """Returns codes that training has left, with their arrays on one device."""
        if self.strategy is None:
            return dict(codes)

        def fetch(array: Any) -> Any:
            return keras.ops.convert_to_tensor(keras.ops.convert_to_numpy(array))

        return {
            name: code.with_arrays(keras.tree.map_structure(fetch, code.arrays()))
            for name, code in codes.items()
        }

    def share(self, batches: data.Batches) -> keras.utils.PyDataset:
        """Returns what this process gives to `fit` of some batches, see `Shares`."""
        if self.strategy is None:
            return batches
        return Shares(batches, self.number, self.process, self.processes)

    def usable(self, examples: int) -> int:
        """Returns how many of an epoch's examples are trained on: a multiple of the devices."""
        return examples - examples % self.number

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Takes the first process out of the distribution while the block runs, to write files.

        Keras makes variables when it saves a model, on whose values all processes would have to
        agree.
        """
        if self.processes == 1:
            yield
            return
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(self.strategy)

    def agree(self, value: bool) -> bool:
        """Returns what the first process says; the others wait for it."""
        if self.processes == 1:
            return value
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(np.array(value)))

    def leave(self) -> None:
        """Ends the common work after an error, so that no process waits for this one at its end."""
        if self.processes > 1:
            import jax

            atexit.unregister(jax.distributed.shutdown)


ONE_DEVICE = Devices()


class Shares(keras.utils.PyDataset):
    """The part of every batch that one process reads.

    A batch that is no multiple of the number of devices, the last one of an epoch, is cut to one;
    a last batch of fewer examples than devices is left out.

    Args:
        batches: The whole batches; their size is a multiple of the number of devices.
        devices: Devices of all processes together.
        process: Which process this is, from 0.
        processes: Number of processes.

    Example:
    >>> split = data.Split(np.zeros((7, 8, 8, 1), "uint8"), np.arange(7))
    >>> shares = Shares(data.batches(split, 4), devices=2, process=1, processes=2)
    >>> [shares[i][1].tolist() for i in range(len(shares))]
    [[2, 3], [5]]
    """

    def __init__(self, batches: data.Batches, devices: int, process: int, processes: int) -> None:
        super().__init__()
        self._batches, self._devices = batches, devices
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        examples = len(self._batches.split)
        return -(-(examples - examples % self._devices) // self._batches.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        batch = self._batches[index]
        whole = len(batch[0])
        own = (whole - whole % self._devices) // self._processes
        return tuple(part[self._process * own : (self._process + 1) * own] for part in batch)

    def on_epoch_begin(self) -> None:
        """Passed on to the batches."""
        self._batches.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Passed on to the batches."""
        self._batches.on_epoch_end()


def start(
    config: dict[str, Any],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Devices:
    """Makes the devices of a run ready, before the backend has computed anything.

    Args:
        config: Resolved configuration. With `distribute="data"`, its `num_devices` becomes the
            number of all devices, which decides about rounding errors and so belongs to the run;
            "none" becomes None.
        coordinator: Of several processes: "HOST:PORT" of the first one; the same everywhere.
        num_processes: Number of processes.
        process_id: Which of them this one is, from 0.

    Raises:
        UserError: If the backend, the machine or the configuration does not allow it.
    """
    kind, number = config["distribute"], config["num_devices"]
    if kind not in (None, *KINDS):
        raise UserError(f"config.distribute must be one of {', '.join(KINDS)}. Received: {kind!r}")
    if number is not None and (not isinstance(number, int) or number is True or number < 1):
        raise UserError(
            "config.num_devices must be an integer of at least 1, or None: all devices. "
            f"Received: {number!r}"
        )
    given = {
        "--num_devices": number,
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if kind != "data":
        without = [name for name, value in given.items() if value is not None]
        if without:
            raise UserError(f"{', '.join(without)}: only with --distribute=data")
        config["distribute"] = None
        return ONE_DEVICE
    _check_processes(coordinator, num_processes, process_id)
    if coordinator is not None:
        _check_shared(config)
    devices = _START[_backend(coordinator)](number, coordinator, num_processes, process_id)
    size = config["batch_size"]
    if size % devices.number:
        near = max(devices.number, size - size % devices.number)
        raise UserError(
            "config.batch_size is the size of a batch over all devices, so it must be a multiple "
            f"of their number, {devices.number}, for example {near}. Received: {size}"
        )
    config["num_devices"] = devices.number
    return devices


def _backend(coordinator: str | None) -> str:
    backend = keras.backend.backend()
    if backend not in _START:
        raise UserError(
            "--distribute=data: Keras trains on one device only with PyTorch. Set "
            f"KERAS_BACKEND=jax or tensorflow. Received: {backend}"
        )
    if coordinator is not None and backend != "jax":
        raise UserError(
            "--coordinator: only on JAX can several processes train together; see "
            f"docs/distribution.md. Set KERAS_BACKEND=jax. Received: {backend}"
        )
    return backend


def _check_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return
    if None in given:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all of them, or "
            "none for a single process."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            "--coordinator must be HOST:PORT of the first process, such as 10.0.0.1:1234. "
            f"Received: {coordinator}"
        )
    if num_processes < 2:
        raise UserError(f"--num_processes must be at least 2. Received: {num_processes}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must be from 0 to {num_processes - 1}. Received: {process_id}"
        )


def _check_shared(config: Mapping[str, Any]) -> None:
    """Refuses what several processes cannot do together."""
    for key, default in (("shrink", {}), ("compact_at_epoch", None)):
        if config[key] != default:
            raise UserError(
                f"config.{key} trains a smaller network further, which only a single process can. "
                "Leave --coordinator out, or this key."
            )


def _on_tensorflow(number: int | None, *_: None) -> Devices:
    import tensorflow as tf

    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    workers = len([*cluster.get("worker", ()), *cluster.get("chief", ())])
    if workers > 1:
        raise UserError(
            f"TF_CONFIG names {workers} workers, and `fit` of Keras fails under TensorFlow's "
            "MultiWorkerMirroredStrategy; see docs/distribution.md. Unset TF_CONFIG, or train on "
            "JAX: KERAS_BACKEND=jax with --coordinator."
        )
    accelerators = tf.config.list_physical_devices("GPU")
    if not accelerators and (number or 1) > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * number
        with contextlib.suppress(RuntimeError):  # they exist already
            tf.config.set_logical_device_configuration(cpu, parts)
    kind = "GPU" if accelerators else "CPU"
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    chosen = _chosen(names, number)
    return Devices(tf.distribute.MirroredStrategy(chosen), len(chosen))


def _on_jax(
    number: int | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> Devices:
    import jax

    if number is not None and _HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # they exist already
            jax.config.update("jax_num_cpu_devices", number)
    if coordinator is not None:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, shutdown_timeout_seconds=_A_DAY
        )
    found = collections.defaultdict(list)
    for device in jax.devices():
        found[device.process_index].append(f"{device.platform}:{device.id}")
    chosen = [_chosen(found[process], number) for process in sorted(found)]
    sizes = {len(names) for names in chosen}
    if len(sizes) > 1:
        raise UserError(
            "every process must have the same number of devices: give --num_devices. "
            f"Received: {', '.join(str(len(names)) for names in chosen)}"
        )
    names = [name for own in chosen for name in own]
    strategy = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    return Devices(strategy, len(names), jax.process_index(), jax.process_count())


_START = {"tensorflow": _on_tensorflow, "jax": _on_jax}


def _chosen(names: list[str], number: int | None) -> list[str]:
    if number is not None and number > len(names):
        raise UserError(
            f"--num_devices={number}: there are only {len(names)}, {', '.join(names)}. The CPU is "
            "divided into several only where there is no accelerator."
        )
    return names[:number]


def _anew(layer: keras.Layer) -> tuple[keras.Layer, keras.Layer]:
    new = made_anew(layer, layer.get_config())
    return new, new
