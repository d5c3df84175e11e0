"""Data that a function of a model looks at: batches, whatever they come from."""

from collections.abc import Iterable, Mapping

import keras

from keras_compaware._graph import flat_inputs


def batches(owner, data):
    """Iterates over batches, as structures of NumPy arrays.

    Args:
        owner: Name of what looks at the data, for messages.
        data: Iterable of batches.

    Raises:
        TypeError: If `data` is one batch, or cannot be iterated over.
    """
    if isinstance(data, keras.utils.PyDataset):
        data = map(data.__getitem__, range(len(data)))
    if hasattr(data, "shape") or isinstance(data, (tuple, Mapping, str)):
        raise TypeError(
            f"{owner}: `data` must be an iterable of batches. Received: a {type(data).__name__}. "
            "A single batch goes into a list: [x] or [(x, y)]."
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{owner}: `data` must be an iterable of batches, such as a list, a tf.data.Dataset, a "
            f"DataLoader or a keras.utils.PyDataset. Received: a {type(data).__name__}."
        )
    for batch in data:
        yield keras.tree.map_structure(_as_array, batch)


def inputs_of(owner, model, batch):
    """Lists what a batch holds for each of a model's inputs: of x, or of the x in (x, y, ...).

    Raises:
        ValueError: If these are not as many as the model has, or their shapes are others.
    """
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    inputs = flat_inputs(model, (x,), {})
    if len(inputs) != len(model.inputs):
        raise ValueError(
            f"{owner}: a batch of `data` holds {len(inputs)} inputs, and the model '{model.name}' "
            f"takes {len(model.inputs)}. Yield x or (x, y), with x as it is given to the model."
        )
    for value, declared in zip(inputs, model.inputs, strict=True):
        if value is not None and not _fits(value.shape, declared.shape):
            raise ValueError(
                f"{owner}: a batch of `data` has the shape {value.shape}, where the model "
                f"'{model.name}' takes {declared.shape}."
            )
    return inputs


def _fits(shape, declared):
    if len(shape) != len(declared):
        return False
    pairs = zip(shape[1:], declared[1:], strict=True)
    return all(expected in (None, size) for size, expected in pairs)


def _as_array(leaf):
    return None if leaf is None else keras.ops.convert_to_numpy(leaf)
