import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_compaware.data import store as store_module
from keras_compaware.data.store import ArrayStore, Request, Source, SplitSource, folder_name

pytestmark = pytest.mark.tensorflow  # no backend of Keras takes part

NUM_TRAIN, NUM_TEST = 20, 6


def chunks(count, offset=0):
    """Images (2, 3, 1) filled with their number, in chunks of 7; the label is the number mod 4."""
    numbers = np.arange(count) + offset
    images = np.broadcast_to(numbers[:, None, None, None], (count, 2, 3, 1)).astype(np.uint8)
    for begin in range(0, count, 7):
        part = slice(begin, begin + 7)
        yield images[part], numbers[part] % 4


def source(**changes):
    values = {
        "name": "toy/small",
        "version": "1.0.0",
        "fingerprint": "0123456789abcdef" * 4,
        "num_classes": 4,
        "label_names": ("a", "b", "c", "d"),
        "image_shape": (2, 3, 1),
        "train": SplitSource(NUM_TRAIN, lambda: chunks(NUM_TRAIN)),
        "test": SplitSource(NUM_TEST, lambda: chunks(NUM_TEST, offset=100)),
        "test_split": "test",
    }
    return Source(**{**values, **changes})


@pytest.fixture
def store(tmp_path):
    return ArrayStore(tmp_path / "arrays")


def files_of(store, arrays):
    return sorted(path.name for path in (store.folder / arrays).iterdir())


def test_what_is_written_is_read(store):
    arrays = store.write(source())
    assert arrays == "toy-small-1.0.0-0123456789abcdef"
    assert files_of(store, arrays) == [
        "dataset.json",
        "test_images.npy",
        "test_labels.npy",
        "train_images.npy",
        "train_labels.npy",
    ]
    dataset = store.open(arrays, validation=0.0)
    assert (dataset.name, dataset.version, dataset.num_classes) == ("toy/small", "1.0.0", 4)
    assert dataset.image_shape == (2, 3, 1)
    assert dataset.label_names == ("a", "b", "c", "d")
    # The test split in its order; the training split in another, every image with its label.
    assert dataset.test.images[:, 0, 0, 0].tolist() == [100, 101, 102, 103, 104, 105]
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 0, 1]
    numbers = dataset.train.images[:, 0, 0, 0]
    assert sorted(numbers) == list(range(NUM_TRAIN))
    assert numbers.tolist() != list(range(NUM_TRAIN))
    np.testing.assert_array_equal(dataset.train.labels, numbers % 4)
    assert (dataset.train.images == numbers[:, None, None, None]).all()
    assert len(dataset.validation) == 0


def test_arrays_are_read_only_maps(store):
    dataset = store.open(store.write(source()), validation=0.25)
    for split in (dataset.train, dataset.validation, dataset.test):
        for array in (split.images, split.labels):
            assert isinstance(array, np.memmap)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_held_out_parts_are_disjoint_nested_and_repeatable(store):
    arrays = store.write(source())
    quarter, half = store.open(arrays, 0.25), store.open(arrays, 0.5)

    def numbers(split):
        return set(split.images[:, 0, 0, 0].tolist())

    assert (len(quarter.train), len(quarter.validation)) == (15, 5)
    assert numbers(quarter.train) | numbers(quarter.validation) == set(range(NUM_TRAIN))
    assert numbers(quarter.validation) < numbers(half.validation)
    assert numbers(store.open(arrays, 0.25).validation) == numbers(quarter.validation)
    assert numbers(quarter.test) == set(range(100, 106))


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_fractions_that_leave_a_part_empty_are_refused(store, fraction):
    with pytest.raises(ValueError, match="20 training examples"):
        store.open(store.write(source()), fraction)


def test_a_second_write_reads_nothing(store):
    arrays = store.write(source())

    def fail():
        raise AssertionError("read again")

    assert store.write(source(train=SplitSource(NUM_TRAIN, fail))) == arrays


def test_other_content_and_other_sizes_have_other_folders(store):
    names = {
        store.write(source()),
        store.write(source(fingerprint="f" * 64)),
        store.write(source(resized=True)),
        store.write(source(version="1.0.1")),
    }
    assert len(names) == 4
    assert folder_name("a", "1", "b" * 64, (2, 3)).endswith("-2x3")


@pytest.mark.parametrize(
    ("count", "message"), [(19, "should hold 19.*more"), (21, "should hold 21.*holds 20")]
)
def test_a_source_that_breaks_its_promise_leaves_nothing(store, count, message):
    with pytest.raises(ValueError, match=message):
        store.write(source(train=SplitSource(count, lambda: chunks(NUM_TRAIN))))
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(store, label):
    def unlabelled():
        yield np.zeros((NUM_TEST, 2, 3, 1), np.uint8), np.full(NUM_TEST, label)

    with pytest.raises(ValueError, match=r"test split of 'toy/small'.*between 0 and 3"):
        store.write(source(test=SplitSource(NUM_TEST, unlabelled)))
    assert list(store.folder.iterdir()) == []


def test_a_disk_too_small_is_found_out_before_writing(store, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MiB left"):
        store.write(source())


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def spoil_header(path):
    data = bytearray(path.read_bytes())
    data[:6] = b"xxxxxx"
    path.write_bytes(bytes(data))


def transpose(path):
    array = np.load(path)
    np.save(path, np.ascontiguousarray(array.reshape(array.shape[::-1])))


def spoil_labels(path):
    np.save(path, np.full_like(np.load(path), 77))


def drop_key(path):
    description = json.loads(path.read_text())
    del description["num_classes"]
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("train_images.npy", truncate, "train_images.npy has .* bytes instead of"),
        ("train_images.npy", spoil_header, ""),
        ("train_images.npy", transpose, r"\(1, 3, 2, 20\) instead of"),
        ("test_labels.npy", spoil_labels, "between 77 and 77"),
        ("test_labels.npy", os.remove, "No such file"),
        ("dataset.json", truncate, ""),
        ("dataset.json", lambda path: path.write_text("[]"), ""),
        ("dataset.json", drop_key, "'num_classes' is missing"),
        ("dataset.json", os.remove, "No such file"),
    ],
)
def test_damage_is_detected_and_the_folder_to_delete_is_named(store, file, damage, reason):
    arrays = store.write(source())
    folder = store.folder / arrays
    damage(folder / file)
    with pytest.raises(ValueError, match=f"damaged: .*{reason}.*Delete this folder") as caught:
        store.open(arrays, 0.0)
    assert str(folder) in str(caught.value)


def test_the_index_remembers_requests(store):
    request = Request("toy", "/data", None)
    assert store.find(request) is None
    store.remember(request, "folder", "abc", None)
    entry = store.find(request)
    assert entry["arrays"] == "folder"
    assert entry["source"] is None
    for other in (
        Request("toy", "/elsewhere", None),
        Request("toy", "/data", (8, 8)),
        Request("toy2", "/data", None),
    ):
        assert store.find(other) is None
    assert store.requests() == ["toy"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"format": 1}'])
def test_a_damaged_index_entry_is_reported(store, text):
    request = Request("toy", "/data", None)
    store.remember(request, "folder", "abc", None)
    path = store.folder / "index" / request.file_name
    path.write_text(text)
    with pytest.raises(ValueError, match="Delete it") as caught:
        store.find(request)
    assert str(path) in str(caught.value)


def test_what_a_killed_writer_left_is_cleared_away(store):
    old, new = (store.folder / f".toy-small-1.0.0-0123456789abcdef-{x}.tmp" for x in "ab")
    for folder in (old, new):
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    store.write(source())
    assert not old.exists()
    assert new.exists()  # perhaps of a writer that is still at work


def test_of_two_writers_the_first_to_finish_wins(store):
    def overtaken():
        store.write(source())  # another writer, from beginning to end
        yield from chunks(NUM_TRAIN)

    arrays = store.write(source(train=SplitSource(NUM_TRAIN, overtaken)))
    assert len(store.open(arrays, 0.0).train) == NUM_TRAIN
    assert [path.name for path in store.folder.iterdir()] == [arrays]


def test_processes_that_race_all_end_well(store, tmp_path):
    program = """
import sys, time, pathlib
import numpy as np
from keras_compaware.data.store import ArrayStore, Source, SplitSource
folder, gate = map(pathlib.Path, sys.argv[1:])
def chunks(count):
    while not gate.exists():
        time.sleep(0.001)
    for number in range(count):
        yield np.full((1, 2, 3, 1), number, np.uint8), np.array([number % 4])
splits = [SplitSource(count, lambda count=count: chunks(count)) for count in (20, 6)]
store = ArrayStore(folder)
arrays = store.write(
    Source("toy", "1.0.0", "ab" * 32, 4, tuple("abcd"), (2, 3, 1), *splits, "test")
)
print(store.open(arrays, 0.0).train.images.sum())
"""
    gate = tmp_path / "gate"
    command = [sys.executable, "-c", program, str(store.folder), str(gate)]
    writers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    deadline = time.monotonic() + 60
    while len(list(store.folder.glob(".toy*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.touch()
    for writer in writers:
        output, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
        assert int(output) == 6 * sum(range(20))
    assert [path.name for path in store.folder.iterdir()] == ["toy-1.0.0-abababababababab"]


def test_the_progress_bar_waits_a_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    with store_module._Progress("Decoding toy", 10) as progress:
        progress.advance(5)
        assert progress._bar is None
        now[0] = 1.5
        progress.advance(2)
        assert progress._bar.tasks[0].completed == 7
        assert progress._bar.tasks[0].total == 10
    assert not progress._bar.live.is_started
    assert capsys.readouterr().out == ""


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("KERAS_COMPAWARE_CACHE", raising=False)
    default = store_module.default_cache_dir()
    assert default.parts[-3:] == (".keras", "keras_compaware", "arrays")
    assert default.is_absolute()
    monkeypatch.setenv("KERAS_COMPAWARE_CACHE", "/somewhere")
    assert str(store_module.default_cache_dir()) == "/somewhere"
