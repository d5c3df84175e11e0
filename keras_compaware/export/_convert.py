"""Keras model -> bytes of a .tflite file. Needs the TensorFlow backend of Keras."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware.export import _quantization
from keras_compaware.export._plan import ConversionError, Spec, call_model, shortened


def convert(
    model: keras.Model,
    structure: Any,
    inputs: list[Spec],
    outputs: list[str],
    *,
    allow_select_ops: bool,
    quantization: str | None = None,
    calibration: Sequence[Sequence[np.ndarray]] = (),
    sparse: bool = False,
) -> tuple[bytes, dict[str, str]]:
    """Converts a model to a LiteRT flatbuffer with the signature "serving_default".

    Args:
        model: a built model on the TensorFlow backend.
        structure: what the model is called with, as a nested structure of placeholders.
        inputs: one spec per leaf of `structure`, in order; their names become the signature's.
        outputs: names of the model's outputs, flattened; they become the signature's.
        allow_select_ops: allows operations that need the Flex delegate.
        quantization: as of `to_litert`.
        calibration: examples, each a batch of one for every input, in the order of `inputs`.
        sparse: as of `to_litert`.

    Returns:
        The content of the file, and what became of the kernels that lie on a grid.

    Raises:
        ConversionError: the converter refused.
    """
    import tensorflow as tf

    def serve(*flat: Any) -> dict[str, Any]:
        results = keras.tree.flatten(
            call_model(model, keras.tree.pack_sequence_as(structure, list(flat)))
        )
        named = zip(outputs, results, strict=True)
        return {name: tf.identity(keras.ops.convert_to_tensor(value)) for name, value in named}

    # The converter freezes the variables that the module tracks. It does not find those of a
    # Keras 3 model by itself: it would write a file that computes with uninitialised weights.
    module = tf.Module()
    module.model_variables = [variable.value for variable in model.variables]
    module.serve = tf.function(
        serve, input_signature=[tf.TensorSpec(i.shape, i.dtype, i.name) for i in inputs]
    )
    examples = [
        {spec.name: value for spec, value in zip(inputs, values, strict=True)}
        for values in calibration
    ]

    def converted(mode, sparse=False):
        function = module.serve.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
        if mode is not None:
            _quantization.configure(converter, mode, examples)
        if sparse:
            kinds = converter.optimizations
            converter.optimizations = [*kinds, tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        if allow_select_ops:
            kinds = converter.target_spec.supported_ops
            converter.target_spec.supported_ops = {*kinds, tf.lite.OpsSet.SELECT_TF_OPS}
        return converter.convert()

    try:
        if quantization is None:
            return converted(None, sparse), {}
        whole = converted(None)
        if quantization in _quantization.REWRITTEN:
            content = _quantization.rewritten(whole, quantization)
        else:
            content = converted(quantization)
        sparse_content = converted(quantization, sparse=True) if sparse else None
    except Exception as error:
        raise _explained(error) from error
    content, fates = _quantization.keep_grids(content, whole, _quantization.find_grids(model))
    return sparse_content or content, fates  # sparse is only float16, which keeps no grid's codes


def _explained(error: Exception) -> ConversionError:
    message = str(error)
    operations, places = [], []
    for item in getattr(error, "errors", []):  # of the converter's own errors
        operations.append(item.operator.name.removeprefix("tf."))
        places += re.findall(r'name: "([^"@]*/[^"@]*)/[^"@/]*@', str(item.location))[:1]
    if "TensorList" in message:
        reason = "batch"
    elif "ERROR_NEEDS_FLEX_OPS" in message:
        reason = "select"
    elif "ERROR_NEEDS_CUSTOM_OPS" in message:
        reason = "custom"
    else:
        reason = "other"
    found = re.findall(r"^(?:TF Select|Custom) ops: (.+)$", message, flags=re.MULTILINE)
    operations += [name for names in found for name in names.split(", ")]
    return ConversionError(
        reason,
        shortened(message),
        tuple(dict.fromkeys(filter(None, operations))),
        tuple(dict.fromkeys(places)),
    )
