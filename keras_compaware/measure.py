"""What a model costs: parameters, multiply-accumulates (MACs) and bytes.

A MAC is one multiplication with its addition; published "FLOPs" are sometimes MACs and sometimes
twice as many. Counted are the products of the layers' kernels with their inputs and those of two
activations with each other (attention). Biases, activations, normalisation, scales for every
channel, pooling, additions and table look-ups count 0, as in most published figures.
"""

import math
import os
import warnings
import zlib
from collections.abc import Callable

import keras

from keras_compaware import _graph

PathLike = str | os.PathLike[str]


def parameters(model: keras.Model | keras.layers.Layer) -> int:
    """Counts the scalars in the distinct weights of a model or layer.

    Trainable and non-trainable weights count (batch-norm statistics included), a shared weight
    once. The states of random seeds, metrics and the optimizer do not count. The result equals
    `model.count_params()`.

    Args:
        model: any built Keras model (subclassed ones too) or layer.

    Returns:
        The number of scalars.

    Raises:
        TypeError: `model` is neither a Keras model nor a layer.
        ValueError: `model` is not built, so its weights do not exist yet.

    Example:
    >>> import keras
    >>> parameters(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]))
    36
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"Expected a keras.Model or Layer, received {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f"{model.name!r} is not built, so its weights do not exist yet. Call it once on data, "
            "or begin it with keras.Input(shape)."
        )
    return sum(math.prod(v.shape) for v in {id(v): v for v in model.weights}.values())


def macs(model: keras.Model) -> int:
    """Counts the multiply-accumulates of one example passing through a model.

    The sum over `macs_by_layer`. A layer used twice counts twice.

    Args:
        model: a built Sequential or functional model with fully defined input shapes (the batch
            dimension aside). Nothing is computed and the model is not changed.

    Returns:
        The number of MACs of a batch of one.

    Warns:
        UserWarning: layers with weights of a kind that is not known. They are left out of the
            sum; the warning lists them.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has no static graph (subclassed, or not built), or its input shapes
            are not fully defined.

    Example:
    >>> import keras
    >>> macs(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.ReLU()]))
    32
    """
    counts = macs_by_layer(model)
    unknown = [path for path, count in counts.items() if count is None]
    if unknown:
        warnings.warn(
            f"The MACs of {model.name!r} leave out {len(unknown)} layer(s) of unknown kind: "
            f"{', '.join(unknown)}. The true number is higher.",
            stacklevel=2,
        )
    return sum(count for count in counts.values() if count is not None)


def macs_by_layer(model: keras.Model, parts: bool = False) -> dict[str, int | None]:
    """Counts the multiply-accumulates of one example, layer by layer.

    Known are the layers of Keras that multiply: dense, einsum, convolution (grouped, depthwise,
    separable, transposed), recurrent (convolutional ones as well), attention, `Dot`, the wrappers
    `Bidirectional` and `TimeDistributed`, subclasses of all these, TransformerEncoder and
    TransformerDecoder of KerasHub, and the raw operations `ops.matmul` and `ops.einsum`. Any other
    wrapper is taken to call its layer once on its own inputs.

    Args:
        model: a built Sequential or functional model with fully defined input shapes (the batch
            dimension aside). It is not changed.
        parts: whether the layers inside a block of KerasHub are told one by one. Default False.

    Returns:
        Layer path ("backbone/block1/conv") to MACs, in execution order, raw operations included.
        Several calls of one layer are summed. None means a layer with weights of a kind that is
        not known, such as a custom layer. The batch is one example; where the model fixes a batch
        size, the counts are divided by it.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model has no static graph (subclassed, or not built), or its input shapes
            are not fully defined.

    Example:
    >>> import keras
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((6, 6, 3)),
    ...         keras.layers.Conv2D(4, 3, name="conv"),
    ...         keras.layers.Flatten(name="flatten"),
    ...         keras.layers.Dense(2, name="dense"),
    ...     ]
    ... )
    >>> macs_by_layer(model)
    {'conv': 1728, 'flatten': 0, 'dense': 128}
    """
    graph = _graph.trace(model, batch_size=1)
    for declared, tensor in zip(model.inputs, graph.inputs, strict=True):
        if None in tensor.shape:
            raise ValueError(
                f"The input {declared.name!r} of {model.name!r} has the shape {declared.shape}, "
                "and the number of MACs depends on its undefined dimensions. Give it a full shape, "
                "for example keras.models.clone_model(model, input_tensors=keras.Input((224, 224, "
                "3))), and measure that copy."
            )
    batch = max((tensor.shape[0] for tensor in graph.inputs if tensor.shape), default=1)
    counts: dict[str, int | None] = {}
    calls = graph.calls if not parts else [part for call in graph.calls for part in parts_of(call)]
    for call in calls:
        count = layer_macs(call)
        before = counts.get(call.path, 0)
        counts[call.path] = None if count is None or before is None else before + count
    return {p: None if n is None else math.ceil(n / batch) for p, n in counts.items()}


def layer_macs(call: _graph.Call) -> int | None:
    """Counts the multiply-accumulates of one call of a layer or raw operation.

    Args:
        call: the call, its tensors with fully defined shapes (the batch dimension included).

    Returns:
        The number of MACs of the whole batch; 0 for operations that multiply by no kernel; None
        for a layer with weights of a kind that is not known.

    Raises:
        ValueError: a shape that matters is not fully defined.
    """
    operation, inner = call.operation, parts_of(call)
    if inner != [call]:
        return sum(layer_macs(part) for part in inner)
    for kinds, rule in _RULES:
        if isinstance(operation, kinds):
            try:
                return rule(call)
            except TypeError as error:
                if any(None in t.shape for t in (*call.inputs, *call.outputs)):
                    raise ValueError(
                        f"The MACs of {call.path!r} are unknown, because the shapes of its tensors "
                        f"are not fully defined: inputs {[t.shape for t in call.inputs]}, outputs "
                        f"{[t.shape for t in call.outputs]}."
                    ) from error
                raise
    if not isinstance(operation, keras.layers.Layer):
        return _raw_macs(call)
    return None if operation.weights and not _only_scales(operation) else 0


def parts_of(call: _graph.Call) -> list[_graph.Call]:
    """Returns the calls that multiply inside a block of KerasHub; of all else, the call itself."""
    block = call.operation
    name = keras.saving.get_registered_name(type(block))
    caches = [value for key, value in call.kwargs.items() if "cache" in key]
    if name not in _graph.HUB_BLOCKS or any(cache is not None for cache in caches):
        return [call]
    is_decoder = name == "keras_hub>TransformerDecoder"
    x = _argument(call, 0, "decoder_sequence" if is_decoder else "inputs")
    encoded = _argument(call, 1, "encoder_sequence") if is_decoder else None
    hidden = keras.KerasTensor((*x.shape[:-1], block.intermediate_dim), x.dtype)
    calls = [(block._self_attention_layer, x, x, (x, x))]
    if encoded is not None:
        calls.append((block._cross_attention_layer, x, x, (x, encoded)))
    calls.append((block._feedforward_intermediate_dense, x, hidden, (x,)))
    calls.append((block._feedforward_output_dense, hidden, x, (hidden,)))
    return [
        _graph.Call(layer, (read,), (written,), f"{call.path}/{layer.name}", arguments)
        for layer, read, written, arguments in calls
    ]


def file_bytes(path: PathLike) -> int:
    """Returns the size of a file in bytes.

    Args:
        path: the file.

    Returns:
        Its size.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: `path` is a folder.
    """
    return os.path.getsize(_checked_file(path))


def gzip_bytes(path: PathLike) -> int:
    """Returns the size in bytes that a file would have after `gzip -9`.

    This is what a download or an app bundle costs, and the size at which zeros and repeated
    values in a file begin to pay. The file is read in pieces and nothing is written.

    Args:
        path: the file.

    Returns:
        The size of the compressed stream, header and checksum included, without a file name.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: `path` is a folder.
    """
    compressor = zlib.compressobj(level=9, wbits=31)  # 31: a gzip stream
    size = 0
    with open(_checked_file(path), "rb") as file:
        while chunk := file.read(1 << 20):
            size += len(compressor.compress(chunk))
    return size + len(compressor.flush())


def _checked_file(path: PathLike) -> PathLike:
    if os.path.isdir(path):
        raise IsADirectoryError(f"Expected a file, received the folder {os.fspath(path)!r}.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    return path


# The rules. Shapes include the batch dimension.


def _size(tensor: keras.KerasTensor) -> int:
    return math.prod(tensor.shape)


def _channels(layer: keras.layers.Layer, tensor: keras.KerasTensor) -> int:
    return tensor.shape[1 if layer.data_format == "channels_first" else -1]


def _zero(call: _graph.Call) -> int:
    return 0


def _dense(call: _graph.Call) -> int:
    return _size(call.outputs[0]) * call.inputs[0].shape[-1]


def _einsum_dense(call: _graph.Call) -> int:
    left, output = call.operation.equation.replace(" ", "").split("->")
    _, kernel = left.split(",")
    sizes = zip(kernel, call.operation.kernel.shape, strict=True)
    return _size(call.outputs[0]) * math.prod(n for label, n in sizes if label not in output)


def _conv(call: _graph.Call) -> int:
    layer = call.operation
    per_output = math.prod(layer.kernel_size) * _channels(layer, call.inputs[0]) // layer.groups
    return _size(call.outputs[0]) * per_output


def _depthwise_conv(call: _graph.Call) -> int:
    return _size(call.outputs[0]) * math.prod(call.operation.kernel_size)


def _separable_conv(call: _graph.Call) -> int:
    layer = call.operation
    positions = _size(call.outputs[0]) // layer.filters
    channels = _channels(layer, call.inputs[0]) * layer.depth_multiplier
    return positions * channels * (math.prod(layer.kernel_size) + layer.filters)


def _conv_transpose(call: _graph.Call) -> int:
    # Every input value meets every weight of its channel once.
    layer = call.operation
    return _size(call.inputs[0]) * math.prod(layer.kernel_size) * layer.filters


def _reversible_embedding(call: _graph.Call) -> int:
    reverse = call.kwargs.get("reverse", call.args[1] if len(call.args) > 1 else False)
    return _size(call.outputs[0]) * call.inputs[0].shape[-1] if reverse else 0


def _cell_macs(cell: keras.layers.Layer, features: int) -> int | None:
    """MACs of one step of one example through a recurrent cell."""
    for kind, gates in (
        (keras.layers.LSTMCell, 4),
        (keras.layers.GRUCell, 3),
        (keras.layers.SimpleRNNCell, 1),
    ):
        if isinstance(cell, kind):
            recurrent = getattr(cell, "recurrent_macs", gates * cell.units * cell.units)
            return gates * cell.units * features + recurrent
    if isinstance(cell, keras.layers.StackedRNNCells):
        total = 0
        for inner in cell.cells:
            count = _cell_macs(inner, features)
            if count is None:
                return None
            total += count
            output = inner.output_size
            features = output if isinstance(output, int) else output[-1]
        return total
    return None


def _conv_lstm(call: _graph.Call) -> int:
    # In every step, both kernels are used at every position of the state.
    cell = call.operation.cell
    batch, steps, *rest = call.inputs[0].shape
    state, _ = cell.compute_output_shape((batch, *rest))
    entries = math.prod(cell.kernel.shape) + math.prod(cell.recurrent_kernel.shape)
    return steps * math.prod(state) // cell.filters * entries


def _recurrent(call: _graph.Call) -> int | None:
    batch, steps, *_, features = call.inputs[0].shape
    count = _cell_macs(call.operation.cell, features)
    return None if count is None else batch * steps * count


def _bidirectional(call: _graph.Call) -> int | None:
    counts = [
        layer_macs(_graph.Call(layer, call.inputs, call.outputs, call.path))
        for layer in (call.operation.forward_layer, call.operation.backward_layer)
    ]
    return None if None in counts else sum(counts)


def _time_distributed(call: _graph.Call) -> int | None:
    batch, steps, *rest = call.inputs[0].shape
    step = keras.KerasTensor((batch, *rest), call.inputs[0].dtype)
    count = _inner_macs(call.operation.layer, (step,), {}, call.path)
    return None if count is None else steps * count


def _wrapper(call: _graph.Call) -> int | None:
    return _inner_macs(call.operation.layer, call.args, call.kwargs, call.path)


def _inner_macs(layer: keras.layers.Layer, args: tuple, kwargs: dict, path: str) -> int | None:
    """MACs of a layer, or of a whole model, that is called inside another layer."""
    if _graph.has_graph(layer):
        shapes = [t.shape for t in _graph.flat_inputs(layer, args, kwargs)]
        counts = [layer_macs(c) for c in _graph.trace(layer, input_shapes=shapes).calls]
        return None if None in counts else sum(counts)
    outputs = keras.tree.flatten(_graph.output_spec(layer, *args, **kwargs))
    inputs = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
    return layer_macs(_graph.Call(layer, tuple(inputs), tuple(outputs), path, args, kwargs))


def _argument(call: _graph.Call, position: int, name: str) -> keras.KerasTensor | None:
    if len(call.args) > position:
        return call.args[position]
    return call.kwargs.get(name)


def _attention_heads(call: _graph.Call) -> tuple:
    query = _argument(call, 0, "query")
    value = _argument(call, 1, "value")
    key = _argument(call, 2, "key")
    return query, value, value if key is None else key


def _multi_head_attention(call: _graph.Call) -> int:
    layer = call.operation
    query, value, key = _attention_heads(call)
    key_width = layer.num_heads * layer.key_dim
    value_width = layer.num_heads * layer.value_dim
    projections = _size(query) * key_width + _size(key) * key_width + _size(value) * value_width
    attended = math.prod(value.shape[axis] for axis in layer.attention_axes)
    positions = _size(query) // query.shape[-1]
    products = positions * attended * (key_width + value_width)
    gate = _size(query) * value_width * layer.get_config().get("use_gate", False)
    return projections + gate + products + _size(call.outputs[0]) * value_width


def _grouped_query_attention(call: _graph.Call) -> int:
    layer = call.operation
    query, value, key = _attention_heads(call)
    query_width = layer.num_query_heads * layer.head_dim
    key_width = layer.num_key_value_heads * layer.head_dim
    projections = _size(query) * query_width + (_size(key) + _size(value)) * key_width
    products = query.shape[0] * query.shape[1] * value.shape[1] * 2 * query_width
    gate = _size(query) * query_width * layer.get_config().get("use_gate", False)
    return projections + gate + products + _size(call.outputs[0]) * query_width


def _attention(call: _graph.Call) -> int:
    query, value, *_ = _argument(call, 0, "inputs")
    return _size(query) * value.shape[-2] + _size(call.outputs[0]) * value.shape[-2]


def _dot(call: _graph.Call) -> int:
    axes = call.operation.axes
    axis = axes if isinstance(axes, int) else axes[0]
    left, right = call.inputs
    # The batch is shared, the contracted axis is summed, every other axis is an output's.
    return _size(left) * _size(right) // (left.shape[0] * left.shape[axis])


def _only_scales(layer: keras.layers.Layer) -> bool:
    """Whether it is the LayerScale of ConvNeXt, x * gamma, which Keras does not export."""
    kind = type(layer)
    return kind.__name__ == "LayerScale" and kind.__module__.split(".")[0] == "keras"


def _raw_macs(call: _graph.Call) -> int:
    """MACs of a raw operation; Keras exports no classes for these, hence the names."""
    operation = call.operation
    kind = type(operation).__name__
    if kind == "Matmul":
        return _size(call.outputs[0]) * call.inputs[0].shape[-1]
    if kind == "Einsum" and "..." not in operation.subscripts:
        operands = operation.subscripts.replace(" ", "").split("->")[0].split(",")
        if len(operands) > 1 and len(call.inputs) == len(operands):
            sizes: dict[str, int] = {}
            for labels, tensor in zip(operands, call.inputs, strict=True):
                sizes.update(zip(labels, tensor.shape, strict=True))
            return math.prod(sizes.values())
    return 0


def _kinds(*names: str) -> tuple[type, ...]:
    """Returns the layer classes of these names that the installed Keras has."""
    return tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))


# First match wins: subclasses stand before their bases.
_RULES: list[tuple[tuple[type, ...], Callable[[_graph.Call], int | None]]] = [
    (_kinds("EinsumDense"), _einsum_dense),
    (_kinds("Dense"), _dense),
    (_kinds("SeparableConv1D", "SeparableConv2D"), _separable_conv),
    (_kinds("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise_conv),
    (_kinds("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _conv_transpose),
    (_kinds("Conv1D", "Conv2D", "Conv3D"), _conv),
    (_kinds("ReversibleEmbedding"), _reversible_embedding),
    (_kinds("Embedding"), _zero),
    (_kinds("MultiHeadAttention"), _multi_head_attention),
    (_kinds("GroupQueryAttention"), _grouped_query_attention),
    (_kinds("Attention"), _attention),
    (_kinds("Dot"), _dot),
    (_kinds("Bidirectional"), _bidirectional),
    (_kinds("TimeDistributed"), _time_distributed),
    (_kinds("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), _conv_lstm),
    (_kinds("RNN"), _recurrent),
    (_kinds("Wrapper"), _wrapper),
    (
        _kinds(
            "BatchNormalization",
            "LayerNormalization",
            "GroupNormalization",
            "RMSNormalization",
            "PReLU",
            "Normalization",
        ),
        _zero,
    ),
]
