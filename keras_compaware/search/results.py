"""The file of results: one line of JSON for each trial that has ended."""

import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_compaware.search.grid import Trial

PathLike = str | os.PathLike[str]


class ResultsFile:
    """Records of trials, appended one by one.

    A record is on the disk when `append` returns. What a process that was killed has left of a
    line is removed by `load`, which is why only one process may work with the file.

    Args:
        path: The file; it need not exist yet, its folder must.

    Example:
    >>> import tempfile
    >>> file = ResultsFile(f"{tempfile.mkdtemp()}/results.jsonl")
    >>> file.append({"id": "a", "status": "done"})
    >>> file.load()
    [{'id': 'a', 'status': 'done'}]
    """

    def __init__(self, path: PathLike) -> None:
        self.path = pathlib.Path(path)

    def load(self, mend: bool = True) -> list[dict[str, Any]]:
        """Returns all records, in the order in which they were written.

        Args:
            mend: Whether a torn last line is removed from the file. Default True; otherwise it is
                only left out, as suits a process that does not own the file.

        Raises:
            ValueError: If another line than the last is damaged.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        records = [_record(self.path, n, line) for n, line in enumerate(whole.splitlines(), 1)]
        if mend and len(whole) < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record in one write, and returns when it is on the disk.

        Raises:
            ValueError: If it holds NaN or infinity.
            OSError: If it cannot be written.
        """
        line = f"{json.dumps(record, allow_nan=False)}\n".encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(f"{self.path}: the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _record(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["id"], str) and isinstance(record["status"], str):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path}, line {number}: expected a record of a trial, in JSON with 'id' and 'status'. "
        f"Received: {line[:60]!r}. Remove the line; its trial will run again."
    )


def latest(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the last record of every trial, by its id.

    Example:
    >>> latest([{"id": "a", "status": "failed"}, {"id": "a", "status": "done"}])
    {'a': {'id': 'a', 'status': 'done'}}
    """
    return {record["id"]: record for record in records}


def finished(record: Mapping[str, Any]) -> bool:
    """Whether a record is a result; a training that diverged is one, a failure is not."""
    return record["status"] in ("done", "diverged")


def estimate_seconds(
    trials: Sequence[Trial], records: Iterable[Mapping[str, Any]]
) -> list[float | None]:
    """Returns how long each trial will take, after what others took.

    Taken is the mean of the trials that are alike in most: in kind, family and period, else in kind
    and period, else in kind, else of all. None if there are no records.

    Example:
    >>> trials = [Trial("every", "rank", "1/8", 10, "cosine", seed) for seed in (0, 1)]
    >>> estimate_seconds(trials, [{**trials[0].to_json(), "status": "done", "seconds": 4.0}])
    [4.0, 4.0]
    """
    keys = (("kind", "family", "every"), ("kind", "every"), ("kind",), ())
    seconds: dict[tuple, list[float]] = {}
    for record in filter(finished, records):
        for names in keys:
            key = (names, *(record[name] for name in names))
            seconds.setdefault(key, []).append(record["seconds"])

    def estimate(trial: Trial) -> float | None:
        own = ((names, *(getattr(trial, name) for name in names)) for names in keys)
        return next((statistics.fmean(seconds[key]) for key in own if key in seconds), None)

    return [estimate(trial) for trial in trials]
