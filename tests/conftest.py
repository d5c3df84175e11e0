"""What all tests share: a backend, a seed, and the folder of optional data sets."""

import fnmatch
import gc
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Iterator

import pytest

# Keras reads these when it is first imported, which is after this file.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "KERAS_BACKEND" not in os.environ:
    os.environ["KERAS_BACKEND"] = next(
        (name for name in ("tensorflow", "jax", "torch") if importlib.util.find_spec(name)),
        "tensorflow",
    )

DATA_DIR_VARIABLE = "KERAS_COMPAWARE_DATA_DIR"

# Tests of what hardly touches the backend, below this folder; `make test` runs them on one.
ONCE = (
    *("architecture_test.py", "docs_test.py", "files_test.py", "benchmarks*_test.py"),
    *("data/*", "models/*", "reporting/*", "cli/*"),
    *("search/grid_test.py", "search/results_test.py", "search/summary_test.py"),
    *("reliability/data_files_test.py", "reliability/model_files_test.py"),
    *("reliability/faults_test.py", "reliability/interruption_test.py"),
)
NOT_ONCE = ("cli/distribution_test.py", "cli/resume_test.py", "cli/train_test.py")

_MANY_MAPPINGS, _LOOK_EVERY = 40_000, 10
_tests_done = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `once`; skips the tests marked `tensorflow` where Keras runs on another backend."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        path = item.path.relative_to(here).as_posix()
        if path not in NOT_ONCE and any(fnmatch.fnmatch(path, pattern) for pattern in ONCE):
            item.add_marker(pytest.mark.once)
    backend = os.environ["KERAS_BACKEND"]
    if backend == "tensorflow":
        return
    skip = pytest.mark.skip(reason=f"needs KERAS_BACKEND=tensorflow, which is {backend!r}")
    for item in items:
        if item.get_closest_marker("tensorflow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Gives every test the same random numbers, in whatever order the tests run."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _compiled_programs() -> Iterator[None]:
    """Forgets what JAX has compiled before Linux runs out of mappings for it and ends the process.

    A process may have 65,530 of them by default, and a test that trains leaves up to a thousand.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if os.environ["KERAS_BACKEND"] != "jax" or not maps.exists() or next(_tests_done) % _LOOK_EVERY:
        return
    if len(maps.read_bytes().splitlines()) > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of data sets that the tests must not download; skips where there is none."""
    value = os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        pytest.skip(f"{DATA_DIR_VARIABLE} is not set to a folder of data sets")
    path = pathlib.Path(value)
    if not path.is_dir():
        pytest.skip(f"{DATA_DIR_VARIABLE}={value} is not an existing folder")
    return path
