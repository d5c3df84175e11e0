"""Loading a data set by its name."""

from __future__ import annotations

import logging
import numbers
import operator
import os

from keras_compaware.data import digits, folders, tfds_source
from keras_compaware.data.dataset import Dataset
from keras_compaware.data.store import ArrayStore, Request, default_cache_dir

_logger = logging.getLogger(__name__)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: float = 0.1,
    cache_dir: str | os.PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Loads an image classification data set as arrays that every backend reads.

    The first time, the data set is prepared by TensorFlow Datasets (TFDS) if it is not yet, and
    decoded into `.npy` files. From then on these are mapped into memory, which takes milliseconds
    and needs neither TFDS nor TensorFlow. Where a prepared folder has changed since, it is decoded
    anew. `"digits"` needs no download at all, and no TensorFlow.

    The training split has one fixed random order, and the last `validation` of it is held out: a
    larger fraction holds out the same examples and more. The test split keeps its order; where a
    data set publishes none, its validation split takes that place and a warning says so.

    Args:
        name: a TFDS name, such as `"mnist"`, `"cifar10:3.0.2"` or `"name/config"`, or `"digits"`.
        data_dir: the folder of the prepared TFDS data sets, to which new ones are downloaded.
            None (default): `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        validation: fraction of the training split to hold out, in [0, 1); default 0.1.
        cache_dir: the folder of the arrays. None (default): `$KERAS_COMPAWARE_CACHE`, else
            `~/.keras/keras_compaware/arrays`.
        image_size: (height, width) in pixels to resize every image to (bilinear with antialiasing;
            the aspect ratio is not kept). None (default): images stay as they are.

    Returns:
        The data set, whose arrays are read-only memory maps.

    Raises:
        FileNotFoundError: the data set is unknown, or is not there and cannot be fetched.
        ImportError: it has to be decoded, and TensorFlow or TFDS is not installed.
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range, the images are of different sizes and
            `image_size` is None, or the cached arrays are damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load("digits", data_dir=folder, cache_dir=folder)
        Dataset(digits 1.0.0: 811 train, 90 validation, 896 test; image (8, 8, 1), 10 classes)
    """
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"`name` must be the name of a data set. Received: {name!r}")
    if not isinstance(validation, numbers.Real) or isinstance(validation, bool):
        raise TypeError(f"`validation` must be a number in [0, 1). Received: {validation!r}")
    if not 0 <= validation < 1:
        raise ValueError(
            "`validation` is the fraction of the training split to hold out, in [0, 1). "
            f"Received: {validation}"
        )
    request = Request(name.strip(), folders.resolve_data_dir(data_dir), _image_size(image_size))
    store = ArrayStore(default_cache_dir() if cache_dir is None else cache_dir)
    arrays = _find(store, request)
    if arrays is None:
        arrays = _decode(store, request, None if data_dir is None else request.data_dir)
    dataset = store.open(arrays, float(validation))
    if dataset.test_split != "test":
        _logger.warning(
            "%s has no test split: its %s split is used for testing.",
            dataset.name,
            dataset.test_split,
        )
    return dataset


def _find(store: ArrayStore, request: Request) -> str | None:
    """Returns the folder that answers a request, if it is there and still true to its source."""
    entry = store.find(request)
    if entry is None:
        return None
    arrays, source, signature = entry["arrays"], entry["source"], entry["signature"]
    now = folders.signature(source) if source else None
    if now in (None, signature):  # the same, or only the arrays were kept
        return arrays if store.has(arrays) else None
    # Touched, copied or replaced. The content decides; it can be compared without TensorFlow.
    fingerprint = folders.fingerprint(source)
    if fingerprint != entry["fingerprint"] or not store.has(arrays):
        return None
    store.remember(request, arrays, fingerprint, source)
    return arrays


def _decode(store: ArrayStore, request: Request, data_dir: str | None) -> str:
    is_digits = request.name in (digits.NAME, f"{digits.NAME}:{digits.VERSION}")
    if is_digits and request.image_size is None and not tfds_source.available():
        source = digits.source()
    else:
        try:
            source = tfds_source.source(request.name, data_dir, request.image_size)
        except ImportError as error:
            known = ", ".join(dict.fromkeys([digits.NAME, *store.requests()]))
            raise ImportError(
                f"The data set {request.name!r} of {request.data_dir} is not among the decoded "
                f"ones in {store.folder} (there, or without a download: {known}). {error}"
            ) from error
    arrays = store.write(source)
    store.remember(request, arrays, source.fingerprint, source.folder)
    return arrays


def _image_size(value: tuple[int, int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`image_size` must be two integers (height, width). Received: {value!r}"
        ) from error
    if height < 1 or width < 1:
        raise ValueError(f"`image_size` must be positive. Received: {value!r}")
    return height, width
