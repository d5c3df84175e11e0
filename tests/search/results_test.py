"""The file of results, whatever has happened to it, and estimates from it."""

import json

import pytest

from keras_compaware.search import ResultsFile, Trial, estimate_seconds, finished, latest
from tests.search.helpers import record


@pytest.fixture
def file(tmp_path):
    return ResultsFile(tmp_path / "results.jsonl")


def test_records_come_back_in_order(file):
    assert file.load() == []
    records = [record(1), record(10), record(10, seed=1)]
    for one in records:
        file.append(one)
    assert file.load() == records
    assert len(file.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_torn_last_line_is_dropped(file, keep):
    file.append(record(1))
    whole = file.path.read_bytes()
    torn = f"{json.dumps(record(10))}\n".encode()[:keep]
    file.path.write_bytes(whole + torn)
    assert file.load(mend=False) == [record(1)]
    assert file.path.read_bytes() == whole + torn
    assert file.load() == [record(1)]
    assert file.path.read_bytes() == whole
    file.append(record(10))
    assert file.load() == [record(1), record(10)]


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"id": 1, "status": "done"}', ""])
def test_a_damaged_line_before_is_an_error(file, line):
    file.path.write_text(f"{line}\n{json.dumps(record(1))}\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: expected a record of a trial"):
        file.load()


def test_nan_is_refused_and_nothing_written(file):
    with pytest.raises(ValueError, match="JSON"):
        file.append(record(1, test=float("nan")))
    assert not file.path.exists()


def test_the_last_record_of_a_trial_counts():
    failed, done = record(1, status="failed"), record(1)
    other = record(10, status="diverged")
    found = latest([failed, other, done])
    assert found == {done["id"]: done, other["id"]: other}
    assert [finished(one) for one in (failed, done, other)] == [False, True, True]


def test_estimates_are_those_of_the_trials_that_are_most_alike():
    def trial(family, every, kind="every"):
        return Trial(kind, family, "b", every, "cosine", 5)

    records = [
        record(1, seconds=10.0),
        record(1, seconds=20.0, seed=1),
        record(100, seconds=3.0),
        record(100, seconds=500.0, status="failed"),
        record(kind="dense", seconds=2.0),
    ]
    wanted = {
        trial("low_rank", 1): 15.0,
        trial("low_rank", 100): 3.0,
        trial("pruning", 100): 3.0,
        trial("pruning", 7): 11.0,
        trial("", None, "dense"): 2.0,
        trial("pruning", None, "held_pruning"): 8.75,
    }
    assert estimate_seconds(list(wanted), records) == list(wanted.values())
    assert estimate_seconds([trial("a", 1)], []) == [None]
