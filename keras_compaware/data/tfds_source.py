"""TensorFlow Datasets as a source of arrays. The only module that meets TensorFlow here."""

from __future__ import annotations

import concurrent.futures
import contextlib
import difflib
import functools
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_compaware.data import digits, folders
from keras_compaware.data.store import Chunk, Source, SplitSource

_CHUNK = 256  # examples
_PROBE_SECONDS = 10.0
_DOWNLOAD_RETRIES = 2
_SERVER_ERRORS = (500, 502, 503, 504)


def available() -> bool:
    """Says whether TensorFlow and TensorFlow Datasets can be imported."""
    try:
        _import()
    except ImportError:
        return False
    return True


def source(name: str, data_dir: str | None, image_size: tuple[int, int] | None) -> Source:
    """Prepares a data set if need be, and returns it for the array store.

    Args:
        name: a TFDS name, with config and version if wanted.
        data_dir: TFDS's data folder; None: its default.
        image_size: None, or (height, width) to resize every image to.

    Raises:
        FileNotFoundError: unknown, not prepared and not to be fetched.
        ImportError: TensorFlow or TensorFlow Datasets is missing.
        ValueError: not a set of images of one shape with one label each.
    """
    tensorflow, tfds = _import()
    digits.builder_class()
    builder = _builder(tfds, name, data_dir)
    image_key, label_key = _keys(tfds, name, builder.info)
    image, label = builder.info.features[image_key], builder.info.features[label_key]
    image_shape, resized = _image_shape(name, image, image_size)
    if not label.num_classes:
        raise ValueError(f"The feature {label_key!r} of {name!r} does not say how many classes.")
    if not _is_prepared(builder):
        _prepare(builder, name, data_dir)
        builder = _builder(tfds, name, data_dir)  # as the folder says, whoever has written it

    splits = builder.info.splits
    test_split = "test" if "test" in splits else "validation"
    missing = [split for split in ("train", test_split) if split not in splits]
    if missing:
        raise ValueError(
            f"The data set {name!r} needs the splits 'train' and 'test' (or 'validation'). "
            f"It has: {', '.join(sorted(splits)) or 'none'}."
        )
    read = functools.partial(
        _chunks, tensorflow, tfds, builder, image_key, label_key, image_shape if resized else None
    )
    folder = str(builder.data_path)
    config = builder.info.config_name
    return Source(
        name=f"{builder.name}/{config}" if config else builder.name,
        version=str(builder.version),
        fingerprint=folders.fingerprint(folder),
        num_classes=int(label.num_classes),
        label_names=tuple(label.names or map(str, range(label.num_classes))),
        image_shape=image_shape,
        train=SplitSource(splits["train"].num_examples, functools.partial(read, "train")),
        test=SplitSource(splits[test_split].num_examples, functools.partial(read, test_split)),
        test_split=test_split,
        resized=resized,
        folder=folder,
    )


def unreachable(urls: Iterable[str], seconds: float = _PROBE_SECONDS) -> dict[str, str]:
    """Asks each server once whether it answers.

    Args:
        urls: addresses; one of each server is tried, all at the same time. Only http and https.
        seconds: how long to wait, for all of them together.

    Returns:
        The servers that did not answer, with the reason.
    """
    representatives = {}
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https"):
            representatives.setdefault(parts.netloc, url)
    answers: dict[str, concurrent.futures.Future] = {}
    for host, url in representatives.items():
        # Threads that may be left behind: a name server that says nothing cannot be interrupted.
        answers[host] = concurrent.futures.Future()
        threading.Thread(target=_ask, args=(url, seconds, answers[host]), daemon=True).start()
    concurrent.futures.wait(answers.values(), timeout=seconds)
    failures = {}
    for host, answer in answers.items():
        reason = answer.result() if answer.done() else f"no answer within {seconds:g} s"
        if reason is not None:
            failures[host] = reason
    return failures


def _ask(url: str, seconds: float, answer: concurrent.futures.Future) -> None:
    """Resolves `answer` to None if the server answers, else to the reason."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds):
            answer.set_result(None)
    except urllib.error.HTTPError as error:  # an answer all the same, unless the server is ill
        failed = error.code in _SERVER_ERRORS
        answer.set_result(f"HTTP status {error.code}" if failed else None)
    except Exception as error:
        answer.set_result(str(getattr(error, "reason", error)) or type(error).__name__)


def _import() -> tuple[Any, Any]:
    try:
        import tensorflow
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "Decoding a data set for the first time needs TensorFlow and TensorFlow Datasets "
            f"({error}): pip install tensorflow tensorflow-datasets importlib_resources"
        ) from error
    if keras.backend.backend() != "tensorflow":
        # Decoding needs no accelerator, and TensorFlow would take all of its memory from the
        # backend that trains. Refused once TensorFlow has begun: then its user has decided.
        with contextlib.suppress(RuntimeError):
            tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow, tfds


def _builder(tfds: Any, name: str, data_dir: str | None) -> Any:
    place = folders.resolve_data_dir(data_dir)
    if re.match(r"\w+:[A-Za-z_]", name):
        raise FileNotFoundError(
            f"{name!r} names a data set of another collection, which would have to be fetched by "
            "its own library. Prepare it as a TFDS folder and pass its plain name and `data_dir`."
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise FileNotFoundError(unknown_message(name, place, tfds.list_builders())) from None
    except ImportError as error:
        raise ImportError(
            f"The builder of the data set {name!r} needs a package that is missing here: {error}"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        versions = folders.prepared_versions(place, name)
        found = f" In {place} lie the versions: {', '.join(versions)}." if versions else ""
        raise FileNotFoundError(
            f"TensorFlow Datasets cannot make the data set {name!r}: {_first_line(error)}{found}"
        ) from error


def unknown_message(name: str, place: str, known: Iterable[str]) -> str:
    """Returns what to say when there is no data set of that name."""
    local = folders.prepared_names(place)
    matches = difflib.get_close_matches(name.partition(":")[0], {*known, *local}, n=3)
    hint = f" Did you mean: {', '.join(matches)}?" if matches else ""
    here = f"it holds {', '.join(local)}" if local else "nothing is prepared there"
    return (
        f"There is no data set {name!r}: neither a TFDS builder of that name, nor a prepared "
        f"folder in {place} ({here}).{hint} A set of your own is found when it was prepared by "
        "TFDS under the given `data_dir`, or when the module of its builder was imported."
    )


def _keys(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    supervised = info.supervised_keys if len(info.supervised_keys or ()) == 2 else (None, None)
    kinds = (("image", tfds.features.Image), ("label", tfds.features.ClassLabel))
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    chosen = []
    for preferred, (kind, feature_class) in zip(supervised, kinds, strict=True):
        fitting = [key for key, value in features.items() if isinstance(value, feature_class)]
        if preferred in fitting:
            chosen.append(preferred)
        elif len(fitting) == 1:
            chosen.append(fitting[0])
        else:
            raise ValueError(
                f"The data set {name!r} is not one for image classification: it needs one image "
                f"and one class label an example, and has {len(fitting)} features of the kind "
                f"{kind!r}. Its features: {', '.join(features) or info.features}."
            )
    return chosen[0], chosen[1]


def _image_shape(
    name: str, feature: Any, image_size: tuple[int, int] | None
) -> tuple[tuple[int, int, int], bool]:
    shape = tuple(feature.shape)
    if np.dtype(feature.np_dtype) != np.uint8 or len(shape) != 3 or shape[2] is None:
        raise ValueError(
            f"The images of {name!r} must be uint8 of the shape (height, width, channels) with a "
            f"fixed number of channels. They are {np.dtype(feature.np_dtype)} {shape}."
        )
    if image_size is None:
        if None in shape:
            raise ValueError(
                f"The images of {name!r} differ in size (their shape is {shape}). Pass "
                "image_size=(height, width) to resize all of them to one."
            )
        return shape, False
    return (*image_size, shape[2]), shape[:2] != tuple(image_size)


def _prepare(builder: Any, name: str, data_dir: str | None) -> None:
    """Downloads and prepares a data set, or says within seconds why that cannot be."""
    place = folders.resolve_data_dir(data_dir)
    urls = builder.url_infos or {}
    verb = "fetched" if urls else "made"
    failure = f"The data set {name!r} is not prepared in {place} and cannot be {verb}: "
    versions = [v for v in folders.prepared_versions(place, name) if v != str(builder.version)]
    if versions:
        base = name.partition(":")[0]
        remedy = f" Other versions are there: pass {base + ':' + versions[-1]!r} for one of them."
    elif builder.name == digits.NAME:
        remedy = " Name another folder by `data_dir`, one that can be written."
    else:
        remedy = (
            " Name the folder that holds it by `data_dir` (or $TFDS_DATA_DIR), or run this once "
            "with a network connection. The data set 'digits' needs neither."
        )
    wanted = _not_downloaded(urls, Path(place, "downloads"))
    failures = unreachable(wanted)
    hosts = {urllib.parse.urlsplit(url).netloc for url in wanted}
    if failures and hosts <= failures.keys():
        reasons = ", ".join(f"{host} ({reason})" for host, reason in failures.items())
        raise FileNotFoundError(f"{failure}no server answers: {reasons}.{remedy}")
    try:
        # What TFDS prints about it is no result of the program that asks.
        with _few_retries(), contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except ImportError as error:
        raise ImportError(
            f"Preparing the data set {name!r} needs a package that is missing here: {error}"
        ) from error
    except Exception as error:
        if _is_prepared(builder):  # another process was faster
            return
        raise FileNotFoundError(f"{failure}{_first_line(error)}{remedy}") from error


def _is_prepared(builder: Any) -> bool:
    return Path(builder.data_path).is_dir() and builder.is_prepared()


def _not_downloaded(url_infos: dict[str, Any], downloads: Path) -> list[str]:
    from tensorflow_datasets.core.download import resource

    return [
        url
        for url, info in url_infos.items()
        if not any(
            any(downloads.rglob(resource.get_dl_fname(url, checksum)))
            for checksum in (info.checksum, None)
        )
    ]


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Keeps TFDS from trying a failing server ten times, for minutes."""
    from tensorflow_datasets.core.download import downloader

    usual = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = min(usual, _DOWNLOAD_RETRIES)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = usual


def _chunks(
    tensorflow: Any,
    tfds: Any,
    builder: Any,
    image_key: str,
    label_key: str,
    resize_to: tuple[int, int, int] | None,
    split: str,
) -> Iterator[Chunk]:
    """Reads a split in the order of its files."""

    def pair(example: dict[str, Any]) -> tuple[Any, Any]:
        image = example[image_key]
        if resize_to is not None:
            image = tensorflow.image.resize(image, resize_to[:2], antialias=True)
            image = tensorflow.clip_by_value(tensorflow.round(image), 0, 255)
            image = tensorflow.cast(tensorflow.ensure_shape(image, resize_to), tensorflow.uint8)
        return image, example[label_key]

    skipped = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image) and key != image_key
    }
    try:
        examples = builder.as_dataset(
            split=split,
            shuffle_files=False,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            decoders=skipped or None,
        )
        examples = examples.map(pair, num_parallel_calls=tensorflow.data.AUTOTUNE)
        yield from examples.batch(_CHUNK).prefetch(2).as_numpy_iterator()
    except (tensorflow.errors.OpError, AssertionError) as error:
        raise OSError(
            f"The records of the split {split!r} in {builder.data_path} cannot be read: "
            f"{_first_line(error)} Delete that folder and prepare the data set again."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
