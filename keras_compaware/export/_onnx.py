"""Keras model -> bytes of an .onnx file. Needs the TensorFlow or the torch backend of Keras."""

import functools
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_compaware import _graph
from keras_compaware.export._plan import ConversionError, Spec, shortened

_BATCH = "batch"  # the symbol of an open batch dimension


def convert(
    model: keras.Model, structure: Any, inputs: list[Spec], outputs: list[str]
) -> tuple[bytes, dict[str, str]]:
    """Converts a model to an ONNX file by Keras' own `model.export`.

    Args:
        model: a built model on the TensorFlow or the torch backend.
        structure: what the model is called with, as a nested structure of placeholders.
        inputs: one spec per leaf of `structure`, in order; their names become the graph's.
        outputs: names of the model's outputs, flattened; they become the graph's.

    Returns:
        The content of the file, and no notes.

    Raises:
        ConversionError: the converter refused.
    """
    import onnx

    if keras.backend.backend() == "tensorflow":
        _teach_erfc()
    keys = [f"model_input_{i}" for i in range(len(inputs))]
    specs = [
        keras.InputSpec(shape=spec.shape, dtype=spec.dtype, name=key)
        for spec, key in zip(inputs, keys, strict=True)
    ]
    if _graph.has_graph(model):
        # Over the same layers, with flat lists of inputs and outputs, whose order is then known.
        flat = list(model.inputs)
        model = keras.Model(flat if len(flat) > 1 else flat[0], list(model.outputs))
        signature = [specs if len(specs) > 1 else specs[0]]
    else:
        signature = [keras.tree.pack_sequence_as(structure, specs)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters about themselves
        path = pathlib.Path(folder) / "model.onnx"
        try:
            model.export(path, format="onnx", verbose=False, input_signature=signature)
            graph = onnx.load(path)
        except Exception as error:
            raise ConversionError("other", shortened(str(error))) from error
    _refuse_unknown(graph.graph)
    if len(graph.graph.output) != len(outputs):
        raise ConversionError(
            "other",
            f"the graph has {len(graph.graph.output)} outputs, the model {len(outputs)}",
        )
    old = [value.name for value in graph.graph.output]
    names = dict(zip(keys, (spec.name for spec in inputs), strict=True))
    names.update(zip(old, outputs, strict=True))
    _rename(graph.graph, names)
    if all(spec.shape and spec.shape[0] is None for spec in inputs):
        for value in (*graph.graph.input, *graph.graph.output):
            first = value.type.tensor_type.shape.dim[:1]
            if first and not first[0].HasField("dim_value"):
                first[0].dim_param = _BATCH
    return graph.SerializeToString(), {}


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and those inside its nodes: bodies of loops, branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def operators(graph: Any) -> list[str]:
    """Returns the operator of every node of an ONNX graph, inner graphs included."""
    return [node.op_type for inner in _graphs(graph) for node in inner.node]


def _refuse_unknown(graph: Any) -> None:
    """The converter from TensorFlow leaves operations in the file that it does not know."""
    import onnx

    unknown = [
        node
        for inner in _graphs(graph)
        for node in inner.node
        if not onnx.defs.has(node.op_type, node.domain)
    ]
    if unknown:
        raise ConversionError(
            "custom",
            "these operations are not supported",
            tuple(dict.fromkeys(node.op_type for node in unknown)),
            tuple(dict.fromkeys(node.name for node in unknown if node.name)),
        )


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Gives tensors new names everywhere; what has one of these already gets out of the way."""
    used = set()
    for inner in _graphs(graph):
        used.update(value.name for value in (*inner.input, *inner.initializer))
        used.update(name for node in inner.node for name in (*node.input, *node.output))
    moved = {new: f"inner/{new}" for new in names.values() if new in used and names.get(new) != new}
    names = {**moved, **names}
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info, *inner.initializer):
            value.name = names.get(value.name, value.name)
        for node in inner.node:
            for tensors in (node.input, node.output):
                tensors[:] = [names.get(name, name) for name in tensors]


@functools.cache
def _teach_erfc() -> None:
    """Teaches the converter from TensorFlow the operation of the exact GELU: 1 + erf(-x)."""
    import onnx
    from tf2onnx.handler import tf_op

    if any("Erfc" in known for opsets in tf_op.get_opsets().values() for known in opsets):
        return

    @tf_op("Erfc")
    class Erfc:
        @classmethod
        def version_9(cls, ctx: Any, node: Any, **_: Any) -> None:
            code, shape = ctx.get_dtype(node.output[0]), ctx.get_shape(node.output[0])
            ctx.insert_new_node_on_input(node, "Neg", node.input[0])
            node.type = "Erf"
            one = np.ones((), onnx.helper.tensor_dtype_to_np_dtype(code))
            terms = [ctx.make_const(f"{node.name}_one", one).output[0], node.output[0]]
            added = ctx.insert_new_node_on_output("Add", node.output[0], inputs=terms)
            ctx.set_dtype(added.output[0], code)
            ctx.set_shape(added.output[0], shape)
