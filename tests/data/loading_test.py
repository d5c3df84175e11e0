"""`load` from end to end, on small TFDS sets that the tests prepare themselves."""

import contextlib
import http.server
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from keras_compaware.data import digits, load, tfds_source

pytestmark = pytest.mark.tensorflow  # no backend of Keras takes part

ROOT = pathlib.Path(__file__).resolve().parents[2]

# These few need neither TensorFlow nor TensorFlow Datasets.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"name": 3}, TypeError, "`name`"),
        ({"name": " "}, TypeError, "`name`"),
        ({"validation": 1}, ValueError, r"\[0, 1\)"),
        ({"validation": -0.1}, ValueError, r"\[0, 1\)"),
        ({"validation": float("nan")}, ValueError, r"\[0, 1\)"),
        ({"validation": "0.1"}, TypeError, "`validation`"),
        ({"image_size": 8}, TypeError, "height, width"),
        ({"image_size": (8, 8, 1)}, TypeError, "height, width"),
        ({"image_size": (8, 0)}, ValueError, "positive"),
        ({"data_dir": 3}, TypeError, "`data_dir`"),
        ({"data_dir": "gs://bucket/data"}, ValueError, "folder of this machine"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        load(**{"name": "digits", "cache_dir": tmp_path, **kwargs})
    assert list(tmp_path.iterdir()) == []


def without_tensorflow(program, *arguments):
    """Runs a program where TensorFlow and TFDS cannot be imported, on another backend."""
    backend = next((name for name in ("jax", "torch") if importlib.util.find_spec(name)), None)
    if backend is None:
        pytest.skip("needs a backend besides TensorFlow")
    header = "import sys\nfor name in ('tensorflow', 'tensorflow_datasets'):\n"
    header += "    sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", header + program, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_digits_need_no_tensorflow_and_are_the_same(tmp_path):
    pytest.importorskip("sklearn")
    program = """
from keras_compaware.data import load
print(load("digits", data_dir=sys.argv[1] + "/data", cache_dir=sys.argv[1] + "/free"))
"""
    result = without_tensorflow(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Dataset(digits 1.0.0: 811 train, 90 validation, 896 test;")
    assert not (tmp_path / "data").exists()

    pytest.importorskip("tensorflow_datasets")
    prepared = load("digits", data_dir=tmp_path / "data", cache_dir=tmp_path / "prepared")
    assert (tmp_path / "data" / "digits" / "1.0.0" / "dataset_info.json").is_file()
    # Served from the arrays that the program above has left: nothing else is in that store.
    free = load("digits", data_dir=tmp_path / "data", cache_dir=tmp_path / "free")
    for part in ("train", "validation", "test"):
        for name in ("images", "labels"):
            arrays = [getattr(getattr(dataset, part), name) for dataset in (prepared, free)]
            np.testing.assert_array_equal(*arrays)
    assert repr(prepared) == repr(free)
    assert prepared.label_names == free.label_names


def test_without_tensorflow_other_sets_say_what_is_missing(tmp_path):
    program = """
from keras_compaware.data import load
try:
    load("mnist", data_dir=sys.argv[1], cache_dir=sys.argv[1])
except ImportError as error:
    print(error)
"""
    result = without_tensorflow(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pip install tensorflow tensorflow-datasets" in result.stdout
    assert "'mnist'" in result.stdout
    assert str(tmp_path) in result.stdout


# What asks the servers.


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("_no_proxy")
def test_a_server_that_answers_is_reachable_unless_it_is_ill():
    with server() as address:
        for status in (200, 403, 404, 405):
            assert tfds_source.unreachable([f"http://{address}/{status}"]) == {}
        for status in (500, 503):
            failures = tfds_source.unreachable([f"http://{address}/{status}"])
            assert failures == {address: f"HTTP status {status}"}


@pytest.mark.usefixtures("_no_proxy")
def test_a_server_that_is_silent_or_absent_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent, server() as address:
        port = silent.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as closed:
            closed_port = closed.getsockname()[1]
        begin = time.monotonic()
        failures = tfds_source.unreachable(
            [
                f"http://127.0.0.1:{port}/a",
                f"http://127.0.0.1:{port}/b",
                f"http://127.0.0.1:{closed_port}/",
                f"http://{address}/200",
                "ftp://127.0.0.1:1/not-asked",
            ],
            seconds=0.5,
        )
        assert time.monotonic() - begin < 5
    assert failures.keys() == {f"127.0.0.1:{port}", f"127.0.0.1:{closed_port}"}
    assert "refused" in failures[f"127.0.0.1:{closed_port}"]


# The rest prepares small data sets with TensorFlow Datasets.


@pytest.fixture(scope="session")
def tfds():
    pytest.importorskip("tensorflow")
    return pytest.importorskip("tensorflow_datasets")


def prepare(
    tfds,
    folder,
    *,
    shape=(4, 5, 1),
    value=7,
    counts=None,
    label=None,
    features=None,
    supervised_keys=("image", "label"),
    class_name="Toy",
):
    """Prepares a set under `folder`: its images hold `value`, its labels count 0, 1, 2, 0, ..."""
    counts = counts or {"train": 12, "test": 6}
    image_shape = tuple(4 + index if side is None else side for index, side in enumerate(shape))

    def info(self):
        default = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="A toy.",
            features=tfds.features.FeaturesDict(features or default),
            supervised_keys=supervised_keys,
        )

    def examples(self, count):
        for number in range(count):
            image = np.full(image_shape, value, np.uint8)
            image[0, 0] = number
            example = {"image": image, "label": number % 3 if label is None else label}
            for key in features or ():
                example.setdefault(key, image)
            yield number, {key: example[key] for key in features or ("image", "label")}

    with tfds.core.registered.skip_registration():
        builder_class = type(
            class_name,
            (tfds.core.GeneratorBasedBuilder,),
            {
                "VERSION": tfds.core.Version("1.0.0"),
                "__module__": __name__,
                "_info": info,
                "_split_generators": lambda self, manager: {
                    split: self._generate_examples(count) for split, count in counts.items()
                },
                "_generate_examples": examples,
            },
        )
        builder_class(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def places(tmp_path):
    return {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}


def test_a_prepared_folder_becomes_arrays(tfds, places):
    prepare(tfds, places["data_dir"])
    dataset = load("toy", **places, validation=0.25)
    assert (dataset.name, dataset.version, dataset.num_classes) == ("toy", "1.0.0", 3)
    assert dataset.image_shape == (4, 5, 1)
    assert dataset.label_names == ("x", "y", "z")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [9, 3, 6]
    numbers = np.concatenate(
        [part.images[:, 0, 0, 0] for part in (dataset.train, dataset.validation)]
    )
    assert sorted(numbers) == list(range(12))
    for part in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_array_equal(part.labels, part.images[:, 0, 0, 0] % 3)
        assert (part.images[:, 1:] == 7).all()
    assert sorted(dataset.test.images[:, 0, 0, 0]) == list(range(6))


def test_the_second_load_needs_neither_tensorflow_nor_tfds(tfds, places):
    prepare(tfds, places["data_dir"])
    first = load("toy", **places)
    program = """
from keras_compaware.data import load
dataset = load("toy", data_dir=sys.argv[1], cache_dir=sys.argv[2])
print(dataset, dataset.train.images.sum(), dataset.train.labels.tolist())
"""
    result = without_tensorflow(program, *places.values())
    assert result.returncode == 0, result.stderr
    expected = f"{first} {first.train.images.sum()} {first.train.labels.tolist()}"
    assert result.stdout.strip() == expected
    # Nor the records, once the arrays are there.
    shutil.rmtree(places["data_dir"])
    result = without_tensorflow(program, *places.values())
    assert result.stdout.strip() == expected


def test_sets_of_one_name_in_two_folders_do_not_mix(tfds, tmp_path):
    cache = tmp_path / "cache"
    for value in (1, 2):
        prepare(tfds, tmp_path / str(value), value=value)
    for _ in range(2):
        for value in (1, 2):
            dataset = load("toy", data_dir=tmp_path / str(value), cache_dir=cache)
            assert (dataset.test.images[:, 1:] == value).all()


def test_the_same_set_in_two_folders_is_kept_once(tfds, tmp_path):
    cache = tmp_path / "cache"
    prepare(tfds, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        load("toy", data_dir=tmp_path / name, cache_dir=cache)
    assert len(list(cache.glob("toy-*"))) == 1
    assert len(list(cache.glob("index/*.json"))) == 2


def test_a_folder_that_was_replaced_is_decoded_anew(tfds, places):
    prepare(tfds, places["data_dir"], value=1)
    load("toy", **places)
    shutil.rmtree(places["data_dir"])
    prepare(tfds, places["data_dir"], value=2)
    assert (load("toy", **places).test.images[:, 1:] == 2).all()


def test_a_folder_that_was_only_touched_is_not(tfds, places, monkeypatch):
    prepare(tfds, places["data_dir"])
    load("toy", **places)
    for path in (places["data_dir"] / "toy" / "1.0.0").iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr(tfds_source, "source", None)  # decoding would fail
    monkeypatch.setattr(tfds_source, "available", None)
    assert len(load("toy", **places).test) == 6
    assert len(load("toy", **places).test) == 6


def test_arrays_that_were_deleted_are_decoded_again(tfds, places):
    prepare(tfds, places["data_dir"])
    load("toy", **places)
    (folder,) = places["cache_dir"].glob("toy-*")
    shutil.rmtree(folder)
    assert len(load("toy", **places).test) == 6
    assert folder.is_dir()


def test_damaged_arrays_are_reported(tfds, places):
    prepare(tfds, places["data_dir"])
    load("toy", **places)
    (path,) = places["cache_dir"].glob("toy-*/test_images.npy")
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="Delete this folder") as caught:
        load("toy", **places)
    assert str(path.parent) in str(caught.value)
    shutil.rmtree(path.parent)  # as the message says
    assert len(load("toy", **places).test) == 6


def test_images_of_different_sizes_need_an_image_size(tfds, places):
    prepare(tfds, places["data_dir"], shape=(None, None, 3))
    with pytest.raises(ValueError, match=r"differ in size.*image_size"):
        load("toy", **places)
    dataset = load("toy", **places, image_size=(2, 6))
    assert dataset.image_shape == (2, 6, 3)
    assert dataset.train.images.shape == (11, 2, 6, 3)
    assert load("toy", **places, image_size=(3, 3)).image_shape == (3, 3, 3)


def test_resizing_keeps_a_constant_image_and_averages_when_shrinking(tfds, places):
    prepare(tfds, places["data_dir"], shape=(4, 4, 1), value=200, counts={"train": 2, "test": 1})
    grown = load("toy", **places, image_size=(8, 8), validation=0)
    assert (grown.test.images[0, 4:, :, 0] == 200).all()
    # Row 0 is 0 in the one test image only in its first pixel; all others are 200.
    one = load("toy", **places, image_size=(1, 1), validation=0).test.images
    assert one.shape == (1, 1, 1, 1)
    assert 180 < one.item() < 200


def test_the_size_they_have_is_no_resizing(tfds, places):
    prepare(tfds, places["data_dir"])
    plain, same = load("toy", **places), load("toy", **places, image_size=(4, 5))
    np.testing.assert_array_equal(plain.train.images, same.train.images)
    assert len(list(places["cache_dir"].glob("toy-*"))) == 1


def test_without_a_test_split_validation_takes_its_place_and_it_is_said(tfds, places, caplog):
    prepare(tfds, places["data_dir"], counts={"train": 10, "validation": 4})
    with caplog.at_level(logging.WARNING):
        dataset = load("toy", **places)
    assert len(dataset.test) == 4
    assert dataset.test_split == "validation"
    assert "toy has no test split: its validation split" in caplog.text


@pytest.mark.parametrize("counts", [{"train": 4}, {"test": 4}])
def test_a_missing_split_is_an_error(tfds, places, counts):
    prepare(tfds, places["data_dir"], counts=counts)
    with pytest.raises(ValueError, match=f"It has: {next(iter(counts))}"):
        load("toy", **places)


def test_unlabelled_examples_are_an_error(tfds, places):
    prepare(tfds, places["data_dir"], label=-1)
    with pytest.raises(ValueError, match="unlabelled examples -1"):
        load("toy", **places)


def test_features_are_chosen_by_kind_and_by_supervised_keys(tfds, places):
    def features():
        return {
            "mask": tfds.features.Image(shape=(4, 5, 1)),
            "image": tfds.features.Image(shape=(4, 5, 1)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }

    prepare(tfds, places["data_dir"], features=features())
    dataset = load("toy", **places)
    assert dataset.label_names == ("0", "1", "2")
    assert (dataset.test.images[:, 1:] == 7).all()
    prepare(tfds, places["data_dir"], features=features(), supervised_keys=None, class_name="Two")
    with pytest.raises(ValueError, match="2 features of the kind 'image'"):
        load("two", **places)


def test_a_set_without_labels_is_refused(tfds, places):
    features = {"image": tfds.features.Image(shape=(4, 5, 1))}
    prepare(tfds, places["data_dir"], features=features, supervised_keys=None)
    with pytest.raises(ValueError, match=r"0 features of the kind 'label'.*Its features: image"):
        load("toy", **places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4, 5, 1), "dtype": np.uint16}, r"must be uint8.*uint16 \(4, 5, 1\)"),
        ({"shape": (4, 5, None)}, "fixed number of channels"),
    ],
)
def test_images_of_another_kind_are_refused(tfds, arguments, message):
    feature = tfds.features.Image(**arguments)
    with pytest.raises(ValueError, match=message):
        tfds_source._image_shape("toy", feature, (4, 4))


def host(url):
    return url.split("/")[2]


@pytest.fixture
def _offline(monkeypatch):
    """No test here may download: every server is said to be silent."""
    monkeypatch.setattr(
        tfds_source, "unreachable", lambda urls: {host(url): "dead" for url in urls}
    )


def test_an_unknown_name_says_where_it_looked_and_what_is_close(tfds, places):
    prepare(tfds, places["data_dir"], class_name="MyLetters")
    with pytest.raises(FileNotFoundError, match=r"Did you mean: mnist") as caught:
        load("mnits", **places)
    assert str(places["data_dir"]) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="Did you mean: my_letters"):
        load("my_leters", **places)
    with pytest.raises(FileNotFoundError, match="another collection"):
        load("huggingface:mnist", **places)
    with pytest.raises(FileNotFoundError, match="cannot make the data set"):
        load("no name", **places)


@pytest.mark.usefixtures("_offline")
def test_a_version_that_is_not_there_names_those_that_are(tfds, places):
    prepare(tfds, places["data_dir"], class_name="Mnist")
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched.*pass 'mnist:1.0.0'"):
        load("mnist", **places)
    assert load("mnist:1.0.0", **places).image_shape == (4, 5, 1)


@pytest.mark.usefixtures("_offline")
def test_what_cannot_be_fetched_is_said_at_once(tfds, places):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"no server answers: .*dead.*data_dir") as caught:
        load("fashion_mnist", **places)
    assert time.monotonic() - begin < 10
    assert "'fashion_mnist'" in str(caught.value)
    assert str(places["data_dir"]) in str(caught.value)
    assert not places["cache_dir"].exists()


@pytest.mark.usefixtures("_offline")
def test_a_set_that_cannot_be_used_is_refused_before_it_is_fetched(tfds, places):
    with pytest.raises(ValueError, match="image_size"):
        load("cats_vs_dogs", **places)


def test_a_failing_download_is_tried_a_few_times_only_and_then_said(tfds, places, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    usual = downloader.MAX_RETRIES
    seen = []

    def fail(self, **kwargs):
        seen.append(downloader.MAX_RETRIES)
        print("noise on the standard output")
        raise ConnectionError("broken pipe\nsecond line")

    builder_class = type(tfds.builder("fashion_mnist", data_dir=places["data_dir"]))
    monkeypatch.setattr(builder_class, "download_and_prepare", fail)
    monkeypatch.setattr(tfds_source, "unreachable", lambda urls: {})
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched: broken pipe\. Name"):
        load("fashion_mnist", **places)
    assert seen == [2]
    assert usual == downloader.MAX_RETRIES


def test_files_that_were_downloaded_before_need_no_server(tfds, tmp_path):
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path)
    from tensorflow_datasets.core.download import resource

    wanted = tfds_source._not_downloaded(builder.url_infos, tmp_path)
    assert sorted(wanted) == sorted(builder.url_infos)
    url, info = next(iter(builder.url_infos.items()))
    (tmp_path / "fashion_mnist").mkdir()
    (tmp_path / "fashion_mnist" / resource.get_dl_fname(url, info.checksum)).touch()
    wanted = tfds_source._not_downloaded(builder.url_infos, tmp_path)
    assert sorted(wanted) == sorted(set(builder.url_infos) - {url})


def test_damaged_records_are_reported(tfds, places):
    prepare(tfds, places["data_dir"])
    (path,) = places["data_dir"].glob("toy/1.0.0/toy-train*")
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"split 'train'.*cannot be read") as caught:
        load("toy", **places)
    assert str(path.parent) in str(caught.value)
    assert not list(places["cache_dir"].glob("*"))


def test_digits_in_a_folder_that_cannot_be_made(tfds, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"cannot be made.*one that can be written"):
        load("digits", data_dir=tmp_path / "file", cache_dir=tmp_path / "cache")


@pytest.mark.slow  # 20 seconds
def test_processes_that_load_the_digits_at_once_all_end_well(tfds, places):
    program = "import sys\nfrom keras_compaware.data import load\n"
    program += 'print(load("digits", data_dir=sys.argv[1], cache_dir=sys.argv[2]))'
    command = [sys.executable, "-c", program, *map(str, places.values())]
    loaders = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for loader in loaders:
        output, errors = loader.communicate(timeout=120)
        assert loader.returncode == 0, errors
        assert output.startswith("Dataset(digits 1.0.0: 811 train")
    assert len(list(places["cache_dir"].glob("digits-*"))) == 1
    assert not list(places["cache_dir"].glob(".*"))


def test_the_index_is_json_that_says_what_was_asked(tfds, places):
    prepare(tfds, places["data_dir"])
    load("toy", **places)
    (path,) = places["cache_dir"].glob("index/*.json")
    entry = json.loads(path.read_text())
    assert entry["name"] == "toy"
    assert entry["data_dir"] == str(places["data_dir"])
    assert entry["source"] == str(places["data_dir"] / "toy" / "1.0.0")


def test_the_default_data_folder(monkeypatch, tmp_path):
    from keras_compaware.data import folders

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert folders.resolve_data_dir(None) == str(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert folders.resolve_data_dir(None) == os.path.expanduser("~/tensorflow_datasets")
    assert folders.resolve_data_dir("~/a") == os.path.expanduser("~/a")
    assert digits.NAME not in folders.prepared_names(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_data(tfds, data_dir, tmp_path, name):
    if not (data_dir / name).is_dir():
        pytest.skip(f"{name} is not in {data_dir}")
    dataset = load(name, data_dir=data_dir, cache_dir=tmp_path)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (54000, 6000, 10000)
    train = np.concatenate([dataset.train.labels, dataset.validation.labels])
    expected = {
        "mnist": [
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        ],
        "fashion_mnist": [[6000] * 10, [1000] * 10],
    }[name]
    assert np.bincount(train).tolist() == expected[0]
    assert np.bincount(dataset.test.labels).tolist() == expected[1]
    images = np.concatenate([dataset.train.images, dataset.validation.images])
    mean, deviation = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}[name]
    assert images.mean(dtype="float64") / 255 == pytest.approx(mean, abs=1e-4)
    assert images.std(dtype="float64") / 255 == pytest.approx(deviation, abs=1e-4)
    begin = time.monotonic()
    load(name, data_dir=data_dir, cache_dir=tmp_path)
    assert time.monotonic() - begin < 1
