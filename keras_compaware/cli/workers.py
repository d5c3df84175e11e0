"""Processes that work side by side, each on one task at a time and on one thread."""

import contextlib
import dataclasses
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "NPROC": "1",  # JAX's thread pool
    # Several processes may share one accelerator.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_XLA_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_TOLD = 1500  # characters of a traceback that a record keeps


@dataclasses.dataclass
class Ended:
    """A task that has ended.

    Args:
        task: What was given to `Workers.start`.
        result: What the work returned, or None.
        error: Why there is no result, or None.
    """

    task: Any
    result: Any = None
    error: str | None = None


class Workers:
    """Worker processes, which live for many tasks; a context manager.

    Every process is spawned, prepares itself once by calling a function, and then works on the
    tasks that it is given. A task that raises ends with an error; so does the task of a process
    that dies, and another process takes its place. When the block is left, and when this process
    dies in whatever way, the workers are ended.

    Args:
        number: Number of processes, at least 1.
        make: "module:function", called once in every process as `function(*arguments)`; it returns
            the function that is called with every task.
        arguments: Its arguments, which can be pickled.
        log: File that gets all that the processes print.
    """

    def __init__(
        self, number: int, make: str, arguments: Sequence[Any], log: str | os.PathLike
    ) -> None:
        self._number, self._make, self._arguments = number, make, tuple(arguments)
        self._log = pathlib.Path(log)
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        try:
            self._fill()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    @property
    def idle(self) -> int:
        """The number of processes without a task."""
        return sum(worker.task is None for worker in self._workers)

    @property
    def running(self) -> list[tuple[Any, float]]:
        """The tasks under way, each with the seconds since it was started."""
        now = time.monotonic()
        return [(w.task, now - w.since) for w in self._workers if w.task is not None]

    def start(self, task: Any) -> None:
        """Gives a task, not None, to a process that has none."""
        worker = next(worker for worker in self._workers if worker.task is None)
        worker.task, worker.since = task, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: `wait` finds that out
            worker.connection.send(task)

    def wait(self, timeout: float) -> list[Ended]:
        """Waits for tasks to end, for so many seconds at most, and returns them.

        Raises:
            RuntimeError: If a process dies before it is ready for a task.
        """
        sources: list[Any] = []
        for worker in self._workers:
            sources += [worker.connection, worker.process.sentinel]
        ready = multiprocessing.connection.wait(sources, timeout)
        ended = []
        for worker in list(self._workers):
            if worker.connection in ready or worker.process.sentinel in ready:
                ended += self._hear(worker)
        self._fill()
        return ended

    def _hear(self, worker: "_Worker") -> list[Ended]:
        try:
            if not worker.connection.poll():
                raise EOFError
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if kind == "ready":
            worker.ready = True
            return []
        task, worker.task = worker.task, None
        return [Ended(task, **{kind: value})]

    def _bury(self, worker: "_Worker") -> list[Ended]:
        worker.process.join()
        status = worker.process.exitcode
        self._workers.remove(worker)
        worker.connection.close()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        if not worker.ready:
            raise RuntimeError(f"a worker process ended {how} while it started; see {self._log}")
        if worker.task is None:
            return []
        return [Ended(worker.task, error=f"the worker process ended {how}; see {self._log.name}")]

    def _fill(self) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < self._number:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._make, self._arguments), daemon=True
            )
            with _environment(), _printing_to(self._log):
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


@dataclasses.dataclass
class _Worker:
    process: Any
    connection: Any
    ready: bool = False
    task: Any = None
    since: float = 0.0


def _work(connection: Any, make: str, arguments: tuple) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, name = make.partition(":")
    work = getattr(importlib.import_module(module), name)(*arguments)
    connection.send(("ready", None))
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("result", work(task))
        except Exception:
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            answer = ("error", text[-_TOLD:])
        connection.send(answer)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets what a process reads when it starts, for the processes started in the block."""
    xla = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_ONE_THREAD}".strip()
    wanted = {**_ONE_THREAD, "XLA_FLAGS": xla}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _printing_to(path: pathlib.Path) -> Iterator[None]:
    """Processes started in the block print to a file, from their first line on."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(file.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
