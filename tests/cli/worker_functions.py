"""What worker processes do in tests."""

import os
import pathlib
import signal
import time

import keras

from keras_compaware import models


def make(number):
    """Returns a function of the tasks below that knows the number."""
    return lambda task: TASKS[task](number)


def _fail(number):
    raise ValueError(f"no such thing as {number}")


def _die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(number):
    time.sleep(60)


def _threads(number):
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NPROC", "XLA_FLAGS")}


TASKS = {
    "add": lambda number: number + 1,
    "print": lambda number: print("said by a worker", flush=True),
    "pid": lambda number: os.getpid(),
    "fail": _fail,
    "die": _die,
    "sleep": _sleep,
    "threads": _threads,
}


def make_nothing():
    """Fails before the process is ready."""
    raise OSError("not today")


def fragile(input_shape, num_classes, *, marker, how, units=(16, 8)):
    """A network that is not built in a worker where a file is found; the file is removed."""
    import multiprocessing

    file = pathlib.Path(marker)
    if multiprocessing.parent_process() is not None and file.exists():
        file.unlink()
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this network cannot be built today")
    model = models.build("lenet_300_100", input_shape, num_classes, units=units)
    assert isinstance(model, keras.Model)
    return model
