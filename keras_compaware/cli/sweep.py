"""The program `sweep`."""

import collections
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import rich.live
import rich.table
from absl import flags

from keras_compaware._files import write_json_atomic, write_text_atomic
from keras_compaware.cli import config_flag, program
from keras_compaware.cli.config import source_of
from keras_compaware.cli.experiment import Experiment
from keras_compaware.cli.files import first_line, writing
from keras_compaware.cli.sweep_config import check, recipe_config, resolve
from keras_compaware.cli.trials import dense_path
from keras_compaware.cli.workdir import Workdir
from keras_compaware.cli.workers import Ended, Workers
from keras_compaware.reporting import plots
from keras_compaware.search import (
    BASELINES,
    ResultsFile,
    Trial,
    aggregate,
    best_periods,
    csv_text,
    distortions,
    estimate_seconds,
    expand,
    finished,
    in_order,
    latest,
    markdown,
)

ATTEMPTS = 2
"""How often a trial is tried that fails."""

FEW_FIRINGS = 20
"""A period that fires less often in a trial is warned of."""

_WORKER = "keras_compaware.cli.trials:worker"
_PROBE_EXECUTIONS = 10  # of steps_per_execution steps each, by which a dry run estimates


def define_flags() -> None:
    """Defines the flags."""
    config_flag.define(
        "config",
        "Configuration, a Python file with get_config(); see configs/sweeps/. Single values are "
        "overridden by --config.key=value, after --config.",
        resolve,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the sweep: results, summary, plots. A sweep is resumed in it."
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TensorFlow Datasets. Default: $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    flags.DEFINE_integer(
        "workers",
        None,
        "Processes, each on one thread. Default: one for each core.",
        lower_bound=1,
    )
    flags.DEFINE_bool("dry_run", False, "List the trials, estimate how long they take, and end.")
    flags.DEFINE_bool("report", False, "Run nothing; summarise the trials that have ended so far.")
    flags.DEFINE_bool("retry_failed", False, "Try trials again that have failed twice.")


def main() -> None:
    """Runs all trials that have no result yet, and summarises."""
    values = flags.FLAGS
    if values.config is None:
        raise program.UserError("--config is missing. See --help and configs/sweeps/.")
    config = resolve(values.config)
    workers = values.workers or _cores()
    if values.dry_run:
        return _dry_run(config, values.workdir, values.data_dir, workers)
    folder = SweepFolder(program.required("workdir"))
    if values.report:
        folder.read()
        return report(folder, config)
    trials, identity = _checked(config, values.data_dir)
    _warn(config)
    with folder.workdir.locked():
        folder.open(config, identity)
        with _terminating():
            run_trials(
                trials, folder, workers, data_dir=values.data_dir, retry_failed=values.retry_failed
            )
        report(folder, config)
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: The folder; created when its lock is taken.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.workdir = Workdir(path)
        self.path = self.workdir.path
        self.sweep = self.path / "sweep.json"
        self.results = ResultsFile(self.path / "results.jsonl")
        self.dense = self.path / "dense"
        self.log = self.path / "workers.log"
        self.plots = self.path / "plots"

    def open(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        """Makes the folder ready for a sweep: new, or one with trials of the same settings.

        Args:
            config: Resolved configuration.
            identity: What else decides about results, such as the backend.

        Raises:
            UserError: If the folder holds something else, or a sweep with a trial that this one
                lacks or does otherwise.
        """
        run = [p for p in (self.workdir.config, self.workdir.report) if p.exists()]
        if run or (self.results.path.exists() and not self.sweep.exists()):
            raise program.UserError(
                f"{self.path} holds {(run or [self.results.path])[0].name}, but no sweep.json: "
                "that is not a sweep, so it is left alone. Choose another --workdir."
            )
        now = {"config": config, "identity": identity}
        if self.sweep.exists():
            self._refuse_other(self.read(), now)
        with writing(self.sweep):
            self.dense.mkdir(exist_ok=True)
            write_json_atomic(self.sweep, now)

    def read(self) -> dict[str, Any]:
        """Returns what `open` has written.

        Raises:
            UserError: If there is no sweep, or the file is damaged.
        """
        try:
            found = json.loads(self.sweep.read_text("utf-8"))
            found["identity"].items()
            expand(found["config"])
            return found
        except FileNotFoundError:
            raise program.UserError(f"there is no {self.sweep}; no sweep is there") from None
        except Exception as error:  # it may hold anything
            what = f"{type(error).__name__}: {first_line(error)}"
            raise program.UserError(f"{self.sweep} is damaged ({what}).") from error

    def _refuse_other(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key, value in now["identity"].items():
            if before["identity"].get(key) != value:
                raise program.UserError(
                    f"{self.path} holds a sweep whose {key} is {before['identity'].get(key)!r}, "
                    f"and now it is {value!r}. Choose another --workdir."
                )
        old, new = ({t.id: t.settings for t in expand(way["config"])} for way in (before, now))
        missing = [name for name in old if name not in new]
        different = sorted(
            {key for name in old if name in new for key in _differences(old[name], new[name])}
        )
        if missing or different:
            what = [f"differs in {', '.join(different)}"] if different else []
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            what += [f"has no trial {missing[0]}{more}"] if missing else []
            raise program.UserError(
                f"{self.path} holds a sweep of another configuration: the one given "
                f"{' and '.join(what)}. Trials may be added to a sweep, not changed or left out. "
                "Choose another --workdir."
            )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name


def _checked(config: Mapping[str, Any], data_dir: str | None) -> tuple[list[Trial], dict[str, str]]:
    """Returns all trials, after finding out what cannot work, and the identity of the sweep."""
    first = expand(config)[0]
    experiment = Experiment(recipe_config(first), data_dir)
    dataset = experiment.dataset
    if not dataset.validation:
        raise program.UserError(
            f"config.data.validation={config['data']['validation']} holds out no example of "
            f"{dataset.name}, and the best period is chosen on the validation split"
        )
    trials = check(config, experiment.build_model())
    return trials, {
        "backend": keras.backend.backend(),
        "data": f"{dataset.name} {dataset.version}, {len(dataset.train)} training images",
        "source of the model": source_of(config["model"]),
        "source of init_from": source_of(config["init_from"]),
    }


def _warn(config: Mapping[str, Any]) -> None:
    steps, rarest = config["sweep"]["steps"], max(config["sweep"]["every"])
    if steps // rarest < FEW_FIRINGS:
        program.say(
            f"warning: every {rarest} steps fires only {steps // rarest} times in {steps} steps; "
            f"curves compare periods fairly from {FEW_FIRINGS} firings on: more "
            "--config.sweep.steps, or no such period\n"
        )


def run_trials(
    trials: Sequence[Trial],
    folder: SweepFolder,
    workers: int,
    *,
    data_dir: str | None = None,
    retry_failed: bool = False,
) -> None:
    """Runs the trials that have no result yet, in worker processes.

    Every trial that ends is a line in the file of results. One that fails is tried once more, after
    all others; dense networks come first, and what fails there before anything that is compared
    with it.
    """
    queue = _Queue(trials, folder, retry_failed)
    if queue.given_up:
        program.say(f"failed twice, not tried again (--retry_failed): {', '.join(queue.given_up)}")
    done = len(trials) - queue.left - len(queue.given_up)
    if done:
        program.say(f"{done} of {len(trials)} trials are done already")
    if not queue.left:
        return
    with (
        _progress(queue, len(trials)) as progress,
        Workers(
            min(workers, queue.left), _WORKER, (str(folder.dense), data_dir), folder.log
        ) as pool,
    ):
        while queue.left:
            while pool.idle and (trial := queue.next()) is not None:
                pool.start(trial)
            for ended in pool.wait(timeout=0.5):
                record = queue.record(ended)
                with writing(folder.results.path):
                    folder.results.append(record)
                progress.ended(record)
            progress.running(pool.running)


class _Queue:
    """Which trials are still to be run, and in which order."""

    def __init__(self, trials: Sequence[Trial], folder: SweepFolder, retry_failed: bool) -> None:
        records = folder.results.load()
        last = latest(records)
        self.records = list(last.values())
        self._attempts: dict[str, int] = {}
        self._first: collections.deque[Trial] = collections.deque()
        self._again: collections.deque[Trial] = collections.deque()
        self._running: dict[str, Trial] = {}
        given_up = []
        for trial in trials:
            record = last.get(trial.id)
            if record is not None and finished(record):
                lost = trial.kind == "dense" and record["status"] == "done"
                if not lost or dense_path(folder.dense, trial).exists():
                    continue
                record = None
            attempts = 0 if record is None or retry_failed else record.get("attempt") or 1
            self._attempts[trial.id] = attempts
            if attempts < ATTEMPTS:
                (self._again if attempts else self._first).append(trial)
            else:
                given_up.append(trial.id)
        self.given_up = given_up

    @property
    def left(self) -> int:
        """Number of trials without a result, those under way included."""
        return len(self._first) + len(self._again) + len(self._running)

    @property
    def waiting(self) -> list[Trial]:
        """The trials that are not under way."""
        return [*self._first, *self._again]

    def next(self) -> Trial | None:
        """Returns the next trial that can be run now, or None."""
        dense = {
            (t.schedule, t.seed)
            for t in (*self._first, *self._again, *self._running.values())
            if t.kind == "dense"
        }
        for queue in (self._first, self._again):
            for trial in queue:
                if trial.kind == "dense" or (trial.schedule, trial.seed) not in dense:
                    queue.remove(trial)
                    self._running[trial.id] = trial
                    return trial
        return None

    def record(self, ended: Ended) -> dict[str, Any]:
        """Returns the record of a trial that has ended; one that has failed is tried again."""
        trial = self._running.pop(ended.task.id)
        self._attempts[trial.id] += 1
        result = ended.result or {"status": "failed", "error": ended.error}
        record = {**trial.to_json(), "attempt": self._attempts[trial.id], **result}
        if not finished(record) and self._attempts[trial.id] < ATTEMPTS:
            self._again.append(trial)
        self.records.append(record)
        return record


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does; either way the sweep can be resumed."""

    def end(number, frame):
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        program.say("\nstopped; the same command goes on with the trials that have no result yet")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- progress -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(queue: _Queue, total: int) -> Iterator["_Lines"]:
    if not sys.stdout.isatty():
        yield _Lines(queue, total)
        return
    with rich.live.Live(console=program.console, refresh_per_second=2) as live:
        yield _Live(queue, total, live)


class _Lines:
    """Tells of each trial that has ended in a line."""

    def __init__(self, queue: _Queue, total: int) -> None:
        self._queue, self._total = queue, total

    def ended(self, record: Mapping[str, Any]) -> None:
        """Tells of a trial that has ended."""
        program.say(f"[{self._total - self._queue.left}/{self._total}] {_line(record)}")
        sys.stdout.flush()

    def running(self, tasks: Sequence[tuple[Trial, float]]) -> None:
        """Tells of the trials that are under way."""


class _Live(_Lines):
    """Shows the trials that are under way and those that ended last in a table that is redrawn."""

    def __init__(self, queue: _Queue, total: int, live: rich.live.Live) -> None:
        super().__init__(queue, total)
        self._live = live
        self._started = time.monotonic()
        self._last: collections.deque[str] = collections.deque(maxlen=8)

    def ended(self, record: Mapping[str, Any]) -> None:
        self._last.append(_line(record))

    def running(self, tasks: Sequence[tuple[Trial, float]]) -> None:
        queue = self._queue
        table = rich.table.Table(box=None, pad_edge=False, show_header=False)
        for line in self._last:
            table.add_row(line)
        for (trial, seconds), whole in zip(
            tasks, estimate_seconds([trial for trial, _ in tasks], queue.records), strict=True
        ):
            share = "" if not whole else f" ({min(99, int(100 * seconds / whole))} %)"
            table.add_row(f"▶ {trial.id}  {seconds:.0f} s{share}")
        failed = sum(not finished(record) for record in latest(queue.records).values())
        left = _left(queue.waiting, tasks, queue.records)
        table.add_row(
            f"{self._total - queue.left} of {self._total} trials, {failed} failed; "
            f"{_duration(time.monotonic() - self._started)} so far, {left} left"
        )
        self._live.update(table)


def _left(
    waiting: Sequence[Trial],
    tasks: Sequence[tuple[Trial, float]],
    records: Sequence[Mapping[str, Any]],
) -> str:
    seconds = estimate_seconds([*waiting, *(trial for trial, _ in tasks)], records)
    if None in seconds or not seconds:
        return "unknown"
    rest = max(0.0, sum(seconds) - sum(since for _, since in tasks))
    return f"about {_duration(rest / max(1, len(tasks)))}"


def _line(record: Mapping[str, Any]) -> str:
    if record["status"] == "failed":
        told = [line for line in record["error"].splitlines() if line.strip()] or [""]
        again = ", will be tried again" if record["attempt"] < ATTEMPTS else ""
        return f"{record['id']}  failed{again}: {told[-1]}"
    if record["status"] == "diverged":
        return f"{record['id']}  diverged, {record['seconds']:.1f} s"
    accuracies = (f"{name} {100 * record[name]:.2f} %" for name in ("validation", "test"))
    return f"{record['id']}  {', '.join(accuracies)}, {record['seconds']:.1f} s"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


# ---- dry run ------------------------------------------------------------------------------------


def _dry_run(
    config: Mapping[str, Any], workdir: str | None, data_dir: str | None, workers: int
) -> None:
    trials, _ = _checked(config, data_dir)
    results = SweepFolder(workdir).results.load(mend=False) if workdir else []
    done = {name for name, record in latest(results).items() if finished(record)}
    left = [trial for trial in trials if trial.id not in done]
    for trial in left:
        program.say(trial.id)
    _warn(config)
    if done:
        seconds, basis = estimate_seconds(left, results), "those that are done"
    else:
        seconds, basis = _probed(left, data_dir, workers), "a few steps of every family"
    total = sum(second or 0.0 for second in seconds)
    program.say(
        f"\n{len(left)} trials to run, {len(trials) - len(left)} done. After {basis}: about "
        f"{_duration(total / workers)} with {workers} worker{'s' * (workers > 1)}"
    )


def _probed(trials: Sequence[Trial], data_dir: str | None, workers: int) -> list[float]:
    """Estimates the seconds of trials from a few steps of the dense net and of every family.

    What a family adds to a step of its shortest period is taken to be the cost of a firing.
    """
    import tempfile

    chosen: dict[tuple[str, str], Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.every or 0):
        if trial.kind in ("dense", "every"):
            chosen.setdefault((trial.kind, trial.family), trial)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "workers.log"
        with (
            program.console.status("timing a few steps of every family"),
            Workers(min(workers, len(chosen)), _WORKER, (folder, data_dir), log) as pool,
        ):
            waiting = [_shortened(trial) for trial in chosen.values()]
            left = len(waiting)
            while left:
                while pool.idle and waiting:
                    pool.start(waiting.pop())
                for ended in pool.wait(timeout=0.5):
                    left -= 1
                    if ended.error is not None:
                        raise program.UserError(f"{ended.task.id} failed:\n{ended.error}")
                    found[ended.task.kind, ended.task.family] = ended.result
    dense = found["dense", ""]["ms_per_step"]
    shortest = {trial.family: trial.every for trial in chosen.values()}

    def seconds(trial: Trial) -> float:
        record = found.get(("every", trial.family), found["dense", ""])
        fixed = record["seconds"] - record["ms_per_step"] * record["steps"] / 1000
        if trial.kind == "post_training":
            return fixed
        firing = max(0.0, record["ms_per_step"] - dense) * (shortest[trial.family] or 1)
        period = {"straight_through": 1, "held_pruning": 100}.get(trial.kind, trial.every or 1)
        return fixed + trial.settings["steps"] * (dense + firing / period) / 1000

    return [seconds(trial) for trial in trials]


def _shortened(trial: Trial) -> Trial:
    execution = trial.settings["steps_per_execution"]
    every = trial.every or 1
    steps = max(_PROBE_EXECUTIONS * execution, 2 * every)
    return dataclasses.replace(
        trial, settings={**trial.settings, "steps": steps, "pretrain_steps": None}
    )


# ---- report -------------------------------------------------------------------------------------


def report(folder: SweepFolder, config: Mapping[str, Any]) -> None:
    """Writes the summary, tables and plots of what has ended so far, and prints the summary."""
    trials = expand(config)
    records = in_order(trials, folder.results.load(mend=False))
    rows = aggregate(records)
    labels = {name: family["label"] for name, family in config["sweep"]["families"].items()}
    text = markdown(rows, labels)
    best = best_periods(rows)
    with writing(folder.path):
        write_text_atomic(folder.path / "results.csv", csv_text(records))
        write_text_atomic(folder.path / "summary.csv", csv_text(rows))
        write_json_atomic(folder.path / "summary.json", {"best": best, "rows": rows})
        write_text_atomic(folder.path / "summary.md", text)
        folder.plots.mkdir(exist_ok=True)
        drawn = plots.can_plot() and _plot(folder, rows, records, labels)
    program.say(f"\n{text}")
    lost = [record["id"] for record in records if record["status"] == "failed"]
    if lost:
        program.say(f"failed: {', '.join(lost)}; see results.jsonl and {folder.log}")
    if len(records) < len(trials):
        program.say(f"{len(trials) - len(records)} of {len(trials)} trials have not run yet")
    files = "results.jsonl, results.csv, summary.md, summary.csv, summary.json"
    program.say(f"written to {folder.path}: {files}" + (", plots/" if drawn else ""))
    if not drawn:
        program.say("no plots: they need Matplotlib, `pip install matplotlib`")


def _plot(
    folder: SweepFolder,
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
) -> bool:
    plots.plot_periods(rows, folder.plots, labels, BASELINES)
    plots.plot_heatmap(rows, folder.plots, labels)
    plots.plot_distortions(distortions(records), folder.plots, labels)
    return True


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
