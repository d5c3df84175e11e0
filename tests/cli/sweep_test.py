"""The program `sweep`: trials, results, resuming, failures, and a whole sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest

from keras_compaware import data
from keras_compaware.base import Every
from keras_compaware.cli import config_flag, sweep, trials
from keras_compaware.cli.program import UserError
from keras_compaware.cli.sweep import SweepFolder, run_trials
from keras_compaware.cli.sweep_config import resolve
from keras_compaware.cli.workers import Ended
from keras_compaware.compressors import LowRank, MagnitudePruning
from keras_compaware.data import Split
from keras_compaware.recipe import Recipe
from keras_compaware.rules import Rule
from keras_compaware.search import expand, latest
from tests.cli.conftest import ROOT, SWEEP


@pytest.fixture(scope="module")
def file(write_config):
    return write_config(content=SWEEP)


@pytest.fixture(scope="module")
def config(file):
    return resolve(config_flag.load(str(file)))


@pytest.fixture
def folder(tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    folder.dense.mkdir(parents=True)
    return folder


IDENTITY = {"backend": "b", "data": "d"}


def changed(config, **values):
    return {**config, "sweep": {**config["sweep"], **values}}


class Pool:
    """Stands in for `Workers`: tasks end at once, in reverse order."""

    outcomes: ClassVar[dict] = {}
    log: ClassVar[list] = []

    def __init__(self, number, make, arguments, log):
        self.number, self.folder, self.tasks = number, arguments[0], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def idle(self):
        return self.number - len(self.tasks)

    @property
    def running(self):
        return [(task, 1.0) for task in self.tasks]

    def start(self, task):
        self.log.append(task.id)
        self.tasks.append(task)

    def wait(self, timeout):
        assert self.tasks, "nothing runs, so nothing will ever end"
        tasks, self.tasks = self.tasks[::-1], []
        return [self.end(task) for task in tasks]

    def end(self, task):
        waiting = self.outcomes.get(task.id, [])
        if waiting and (error := waiting.pop(0)):
            return Ended(task, error=error)
        if task.kind == "dense":
            trials.dense_path(self.folder, task).write_bytes(b"")
        result = {"status": "done", "validation": 0.5, "test": 0.5, "seconds": 1.0}
        return Ended(task, result)


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(Pool, "outcomes", {})
    monkeypatch.setattr(Pool, "log", [])
    monkeypatch.setattr(sweep, "Workers", Pool)
    return Pool


def test_every_trial_is_a_line_and_a_finished_sweep_has_nothing_to_do(config, folder, pool, capsys):
    grid = expand(config)
    run_trials(grid, folder, 2)
    assert len(grid) == 1 + 3 + 2 + 2 + 2
    assert pool.log[0] == "dense:constant:0"
    assert sorted(pool.log) == sorted(trial.id for trial in grid)
    records = folder.results.load()
    assert {record["id"] for record in records} == {trial.id for trial in grid}
    assert {record["attempt"] for record in records} == {1}
    assert "[10/10] " in capsys.readouterr().out
    pool.log.clear()
    run_trials(grid, folder, 2)
    assert pool.log == []


def test_a_torn_line_is_run_again(config, folder, pool):
    grid = expand(config)
    run_trials(grid, folder, 1)
    content = folder.results.path.read_bytes()
    folder.results.path.write_bytes(content[:-20])
    torn = json.loads(content.splitlines()[-1])["id"]
    pool.log.clear()
    run_trials(grid, folder, 2)
    assert pool.log == [torn]
    assert folder.results.path.read_bytes() == content


def test_added_trials_are_run_and_no_others(config, folder, pool):
    run_trials(expand(config), folder, 2)
    pool.log.clear()
    run_trials(expand(changed(config, every=[1, 5, 10])), folder, 2)
    assert pool.log == ["pruning:50 %:every-5:constant:0", "rank:rank 2:every-5:constant:0"]


def test_a_trial_that_fails_is_tried_again_at_the_end(config, folder, pool, capsys):
    name = "pruning:50 %:every-1:constant:0"
    pool.outcomes[name] = ["Traceback\nValueError: no"]
    run_trials(expand(config), folder, 1)
    assert pool.log.count(name) == 2
    assert pool.log[-1] == name
    found = [record for record in folder.results.load() if record["id"] == name]
    assert [(r["status"], r["attempt"]) for r in found] == [("failed", 1), ("done", 2)]
    assert found[0]["error"] == "Traceback\nValueError: no"
    assert f"{name}  failed, will be tried again: ValueError: no" in capsys.readouterr().out


def test_a_trial_that_fails_twice_is_given_up(config, folder, pool, capsys):
    name = "pruning:50 %:every-1:constant:0"
    pool.outcomes[name] = ["one", "two"]
    grid = expand(config)
    run_trials(grid, folder, 1)
    assert latest(folder.results.load())[name]["error"] == "two"
    pool.log.clear()
    run_trials(grid, folder, 1)
    assert pool.log == []
    run_trials(grid, folder, 1, retry_failed=True)
    assert pool.log == [name]
    assert latest(folder.results.load())[name]["status"] == "done"


def test_a_failure_before_an_interruption_counts(config, folder, pool):
    grid = expand(config)
    failed = {**grid[1].to_json(), "attempt": 1, "status": "failed", "error": "one"}
    folder.results.append(failed)
    pool.outcomes[grid[1].id] = ["two"]
    run_trials(grid, folder, 1)
    assert pool.log.count(grid[1].id) == 1
    assert latest(folder.results.load())[grid[1].id]["attempt"] == 2


def test_nothing_starts_before_its_dense_network(config, folder, pool):
    grid = expand(changed(config, seeds=[0, 1]))
    pool.outcomes["dense:constant:0"] = ["no"]
    run_trials(grid, folder, 3)
    log = pool.log
    again = len(log) - 1 - log[::-1].index("dense:constant:0")
    assert log[:2] == ["dense:constant:0", "dense:constant:1"]
    seeds = [int(name[-1]) for name in log]
    assert all(seed == 1 for seed in seeds[2:again])
    assert seeds[again + 1 :].count(0) == (len(grid) - 2) // 2


def test_a_dense_network_whose_file_is_lost_is_trained_again(config, folder, pool):
    grid = expand(config)
    run_trials(grid, folder, 2)
    trials.dense_path(folder.dense, grid[0]).unlink()
    pool.log.clear()
    run_trials(grid, folder, 2)
    assert pool.log == ["dense:constant:0"]


def test_what_may_be_done_in_a_folder_that_is_there(config, tmp_path):
    folder = SweepFolder(tmp_path)
    folder.open(config, IDENTITY)
    folder.open(config, IDENTITY)
    more = changed(config, every=[1, 2, 10], seeds=[0, 1])
    folder.open(more, IDENTITY)
    assert folder.read()["config"] == more
    with pytest.raises(UserError, match=r"has no trial dense:constant:1 and 13 more\. Trials"):
        folder.open(config, IDENTITY)
    for other, what in (
        (changed(more, steps=50), "differs in rule.end, steps"),
        ({**more, "batch_size": 32}, "differs in config.batch_size"),
    ):
        with pytest.raises(UserError, match=what):
            folder.open(other, IDENTITY)
    with pytest.raises(UserError, match="a sweep whose backend is 'b', and now it is 'c'"):
        folder.open(more, {**IDENTITY, "backend": "c"})
    assert folder.read() == {"config": more, "identity": IDENTITY}


@pytest.mark.parametrize("name", ["config.json", "report.json", "results.jsonl"])
def test_other_folders_are_left_alone(config, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds {name}, but no sweep.json"):
        SweepFolder(tmp_path).open(config, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--config=FILE",), "--workdir is missing"),
        (("--config=FILE", "--config.sweep.evry=(1,)"), "unknown key 'config.sweep.evry'"),
        (("--config=FILE", "--config.seed=1"), "unknown key 'config.seed'"),
        (("--config=FILE", "--config.sweep.every=(1,'a')"), "must be an integer of at least 1"),
        (
            ("--config=FILE", "--workdir=NEW", "--config.sweep.families.rank.rule.where=conv"),
            "config.sweep.families.rank, rank 2: ",
        ),
        (("--config=FILE", "--workdir=NEW", "--report"), "no sweep is there"),
    ],
)
def test_mistakes(programs, file, tmp_path, arguments, message):
    new = tmp_path / "new"
    arguments = [a.replace("FILE", str(file)).replace("NEW", str(new)) for a in arguments]
    assert message in programs.fails("sweep", *arguments)
    assert not new.exists()


# ---- trials -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(programs, tmp_path_factory):
    """Runs trials of a configuration in this process: (config, *ids) -> their records."""
    folder = tmp_path_factory.mktemp("dense")
    arguments = {"folder": folder, "data_dir": programs.environment["TFDS_DATA_DIR"]}

    def run(config, *names):
        grid = {trial.id: trial for trial in expand(config)}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in programs.environment.items():
                patch.setenv(key, value)
            return [trials.run_trial(grid[name], **arguments) for name in names]

    return run


def test_what_a_trial_tells(run, config):
    dense, pruning, rank, after = run(
        config,
        "dense:constant:0",
        "pruning:50 %:every-1:constant:0",
        "rank:rank 2:every-10:constant:0",
        "pruning:50 %:post_training:constant:0",
    )
    assert dense["test"] > 0.5
    assert (pruning["status"], pruning["steps"], pruning["firings"]) == ("done", 40, 40)
    assert pruning["distortions"] == []  # inside the training step
    kernel = pruning["kernels"]["dense1/kernel"]
    entries = 64 * 16
    assert (kernel["sparsity"], kernel["bits"]) == (0.5, entries + 32 * entries // 2)
    assert set(pruning["kernels"]) == {"dense1/kernel", "dense2/kernel"}
    assert 0.2 < pruning["norm_ratio"] < 1.5
    whole = 64 * 16 + 16 + 16 * 8 + 8 + 8 * 10 + 10
    kernels = 64 * 16 + 16 * 8
    bits = kernels + 16 * kernels
    assert pruning["kernel_ratio"] == pytest.approx(bits / (32 * kernels))
    assert pruning["model_ratio"] == pytest.approx((bits + 32 * (whole - kernels)) / (32 * whole))
    assert [step for step, _ in rank["distortions"]] == [10, 20, 30, 40]
    assert rank["firings"] == 4
    assert rank["distortion"] == rank["distortions"][-1][1] > 0
    assert rank["kernels"]["dense1/kernel"]["rank"] == rank["rank"] == 2
    assert (after["steps"], after["firings"], after["sparsity"]) == (0, 0, 0.5)
    assert after["norm_ratio"] < 1
    json.dumps([dense, pruning, rank, after], allow_nan=False)


def test_a_trial_that_diverges_is_a_result(run, config):
    config = changed(config, schedules={"wild": {"schedule": "constant", "learning_rate": 1e30}})
    for record in run(config, "dense:wild:0", "rank:rank 2:every-10:wild:0"):
        assert record["status"] == "diverged"
        assert "NaN or infinity" in record["error"]
        assert "test" not in record


def test_a_trial_whose_dense_network_is_missing(run, config):
    with pytest.raises(RuntimeError, match=r"the dense network constant-5\.npz is missing"):
        run(changed(config, seeds=[5]), "pruning:50 %:post_training:constant:5")


def test_a_trial_starts_from_the_trained_network(run, config):
    further = changed(config, init="pretrained", pretrain_steps=100, seeds=[3], steps=10)
    standstill = {"constant": {"schedule": "constant", "learning_rate": 1e-9}}
    (trained,) = run(further, "dense:constant:3")
    (longer,) = run(changed(further, schedules=standstill), "dense_longer:constant:3")
    assert (trained["steps"], longer["steps"]) == (100, 10)
    assert longer["test"] == trained["test"] > 0.8


def test_steps_go_on_over_epochs_in_full_batches():
    split = Split(np.arange(10, dtype="uint8").reshape(10, 1, 1, 1), np.arange(10))
    steps = trials.Steps(data.batches(split, 4, seed=0), 5)
    assert len(steps) == 5
    labels = [steps[index][1].tolist() for index in range(5)]
    assert [len(batch) for batch in labels] == [4] * 5
    assert len({*labels[0], *labels[1]}) == 8
    again = trials.Steps(data.batches(split, 4, seed=0), 5)
    assert [again[index][1].tolist() for index in (4, 0, 2)] == [labels[n] for n in (4, 0, 2)]


@pytest.mark.parametrize(
    ("action", "steps", "number"),
    [
        (None, 40, 10),
        (None, 42, 7),
        (Every(1, MagnitudePruning(0.5)), 40, 10),
        (Every(1, LowRank(rank=2)), 40, 1),
        (Every(4, LowRank(rank=2)), 40, 4),
        (Every(100, LowRank(rank=2)), 1000, 10),
    ],
)
def test_steps_that_run_at_once_end_at_every_firing(monkeypatch, action, steps, number):
    monkeypatch.setattr(trials.keras.backend, "backend", lambda: "jax")
    recipe = None if action is None else Recipe([Rule(None, action)])
    assert trials._steps_per_execution(10, steps, recipe) == number
    monkeypatch.setattr(trials.keras.backend, "backend", lambda: "torch")
    assert trials._steps_per_execution(10, steps, recipe) == 1


# ---- whole sweeps -------------------------------------------------------------------------------


def results(path):
    """What trials found, by id, without what is measured with a clock or counts attempts."""
    records = latest(json.loads(line) for line in (path / "results.jsonl").read_text().splitlines())
    own = ("seconds", "ms_per_step", "attempt")
    return {
        name: {key: value for key, value in record.items() if key not in own}
        for name, record in records.items()
    }


@pytest.fixture(scope="module")
def swept(programs, file):
    """A finished sweep by two workers, and what was printed."""
    path = programs.folder / "swept"
    out = programs.succeeds("sweep", f"--config={file}", f"--workdir={path}", "--workers=2")
    return path, out


def test_a_whole_sweep(programs, file, swept):
    path, out = swept
    assert "warning: every 10 steps fires only 4 times in 40 steps" in out
    assert "[10/10] " in out
    assert "| rank | rank 2 | constant |" in out
    assert out.rstrip().endswith(", plots/")
    assert {record["status"] for record in results(path).values()} == {"done"}
    assert (path / "summary.md").read_text() in out
    assert len((path / "results.csv").read_text().splitlines()) == 11
    assert len((path / "summary.csv").read_text().splitlines()) == 11
    summary = json.loads((path / "summary.json").read_text())
    assert [row["family"] for row in summary["best"]] == ["pruning", "rank"]
    plots = {"accuracy-pruning", "accuracy-rank", "distortion-pruning", "distortion-rank"}
    assert {plot.stem for plot in (path / "plots").iterdir()} == plots | {"heatmap"}

    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    arguments = (f"--config={file}", f"--workdir={path}")
    assert "10 of 10 trials are done already" in programs.succeeds("sweep", *arguments)
    assert "| rank | rank 2 |" in programs.succeeds("sweep", *arguments, "--report")
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == before
    assert "differs in steps" in programs.fails("sweep", *arguments, "--config.sweep.steps=41")
    out = programs.succeeds("sweep", *arguments, "--config.sweep.every=(1,10,20)", "--dry_run")
    assert "2 trials to run, 10 done. After those that are done: about 0:00:" in out
    assert "rank:rank 2:every-20:constant:0\n" in out


@pytest.mark.slow
def test_the_number_of_workers_makes_no_difference(programs, file, swept, tmp_path):
    programs.succeeds("sweep", f"--config={file}", f"--workdir={tmp_path / 'a'}", "--workers=1")
    assert results(tmp_path / "a") == results(swept[0])


@pytest.mark.slow
def test_a_dry_run_estimates_from_a_few_steps(programs, file, tmp_path):
    new = tmp_path / "new"
    out = programs.succeeds("sweep", f"--config={file}", f"--workdir={new}", "--dry_run")
    assert "10 trials to run, 0 done. After a few steps of every family: about 0:" in out
    assert not new.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_killed_goes_on(programs, file, swept, tmp_path, number, status):
    path = tmp_path / "sweep"
    arguments = (f"--config={file}", f"--workdir={path}", "--workers=2")
    with subprocess.Popen(
        [sys.executable, "-m", "apps.sweep", *arguments],
        cwd=ROOT,
        env={**os.environ, **programs.environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("[3/10]"):
                process.send_signal(number)
                break
        out = process.stdout.read()
    assert process.returncode == status
    assert ("stopped; the same command goes on" in out) == (number == signal.SIGTERM)
    done = len((path / "results.jsonl").read_text().splitlines())
    assert 3 <= done < 10
    with open(path / "results.jsonl", "a") as torn:
        torn.write('{"id": "half a li')
    out = programs.succeeds("sweep", *arguments)
    assert f"{done} of 10 trials are done already" in out
    assert results(path) == results(swept[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raise", "ValueError: this network cannot be built today"),
        ("die", "the worker process ended by signal 9; see workers.log"),
    ],
)
def test_a_trial_that_fails_in_its_worker(programs, write_config, swept, tmp_path, how, error):
    marker = tmp_path / "marker"
    marker.touch()
    file = write_config(
        f"""
        config.model = "tests.cli.worker_functions:fragile"
        config.model_args = {{"marker": "{marker}", "how": "{how}"}}
        """,
        content=SWEEP,
    )
    path = tmp_path / "sweep"
    started = time.monotonic()
    out = programs.succeeds("sweep", f"--config={file}", f"--workdir={path}", "--workers=2")
    assert time.monotonic() - started < 600
    assert "failed, will be tried again" in out
    lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert failed["error"].rstrip().endswith(error)
    (again,) = [r for r in lines if r["id"] == failed["id"] and r["status"] == "done"]
    assert again["attempt"] == 2
    assert len(lines) == 11
    assert results(path) == results(swept[0])
