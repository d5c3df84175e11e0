"""The file of results: one line of JSON for each trial that has ended."""

import errno
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
            ValueError: If another line than the last is damaged, or a record has a part of another
                kind than it should.
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
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _record(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    wrong = "in JSON with 'id' and 'status'"
    try:
        record = json.loads(line, parse_constant=_refuse)
        if isinstance(record["id"], str) and isinstance(record["status"], str):
            found = [name for name, is_right in _PARTS.items() if not is_right(record.get(name))]
            if not found:
                return record
            wrong = f"whose part {found[0]!r} is no {record[found[0]]!r}"
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{path}, line {number}: expected a record of a trial, {wrong}. "
        f"Received: {line[:60]!r}. Remove the line; its trial will run again."
    )


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def _is_number(value):
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    )


def _is_count(value):
    return value is None or (_is_number(value) and isinstance(value, int) and value >= 0)


def _is_text(value):
    return value is None or isinstance(value, str)


def _is_curve(value):
    return value is None or (
        isinstance(value, list)
        and all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in value)
    )


# What a record may have, and what is said of it where others rely on it.
_PARTS = {
    **dict.fromkeys(("kind", "family", "budget", "schedule", "error"), _is_text),
    **dict.fromkeys(("every", "seed", "attempt"), _is_count),
    **dict.fromkeys(("validation", "test", "kernel_ratio", "model_ratio", "sparsity"), _is_number),
    **dict.fromkeys(("rank", "norm_ratio", "distortion", "seconds"), _is_number),
    "distortions": _is_curve,
}


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
        if record.get("seconds") is None:
            continue
        for names in keys:
            key = (names, *(record.get(name) for name in names))
            seconds.setdefault(key, []).append(record["seconds"])

    def estimate(trial: Trial) -> float | None:
        own = ((names, *(getattr(trial, name) for name in names)) for names in keys)
        return next((statistics.fmean(seconds[key]) for key in own if key in seconds), None)

    return [estimate(trial) for trial in trials]
