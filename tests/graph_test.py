"""Tests of the symbolic replay."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import _graph
from tests.marks import slow_on_jax


def paths(model):
    return [call.path for call in _graph.calls(model)]


def residual_model():
    inputs = keras.Input((8, 8, 3), name="image")
    stem = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(stem)
    x = layers.Conv2D(4, 3, padding="same", name="conv")(x)
    x = layers.Add(name="add")([stem, x])
    x = layers.Concatenate(name="join")([x, stem])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="logits")(x))


def nested_model():
    """outer(backbone(block(conv, relu), block again), head): nested twice, the block shared."""
    block = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(4, 3, padding="same", name="conv"), layers.ReLU()],
        name="block",
    )
    block.layers[-1].name = "relu"
    image = keras.Input((8, 8, 4), name="inner_image")
    backbone = keras.Model(image, block(block(image)), name="backbone")
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Flatten(name="flatten")(backbone(inputs))
    return keras.Model(inputs, layers.Dense(2, name="logits")(x))


def state(model):
    """Everything about a model that a replay could disturb."""
    found = []

    def visit(operation):
        found.append(
            (
                operation.name,
                len(operation._inbound_nodes),
                len(operation._outbound_nodes),
                [v.path for v in getattr(operation, "variables", [])],
                len(getattr(operation, "losses", [])),
            )
        )
        for inner in getattr(operation, "operations", getattr(operation, "layers", [])):
            visit(inner)

    visit(model)
    return found


class Mlp(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


class Tripled(layers.Layer):
    """No shape method, so that Keras runs `call` to find the shape."""

    def call(self, x, training=None, mask=None):
        return keras.ops.concatenate([x, x, x], axis=-1)


def test_sequential():
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(4, name="hidden"), layers.Dense(2, name="logits")]
    )
    first, second = _graph.calls(model)
    assert (first.path, second.path) == ("hidden", "logits")
    assert first.operation is model.layers[0]
    assert first.inputs[0].shape == (None, 8)
    assert first.outputs[0].shape == (None, 4)
    assert second.inputs[0] is first.outputs[0]
    assert second.outputs[0].shape == (None, 2)


def test_sequential_built_by_a_call():
    model = keras.Sequential([layers.Dense(4, name="a")])
    with pytest.raises(ValueError, match=r"keras\.Input"):
        _graph.calls(model)
    model(np.zeros((1, 3), "float32"))
    assert paths(model) == ["a"]


def test_residual_connections():
    graph = _graph.trace(residual_model())
    by_path = {call.path: call for call in graph.calls}
    assert list(by_path) == ["stem", "norm", "conv", "add", "join", "pool", "logits"]
    stem = by_path["stem"].outputs[0]
    assert by_path["stem"].inputs == (graph.inputs[0],)
    assert by_path["add"].inputs[0] is stem
    assert by_path["add"].inputs[1] is by_path["conv"].outputs[0]
    assert by_path["join"].inputs[1] is stem
    assert by_path["join"].outputs[0].shape == (None, 8, 8, 8)
    assert graph.outputs == by_path["logits"].outputs


def test_shared_layer_appears_once_per_call():
    shared = layers.Dense(3, name="shared")
    a, b = keras.Input((5,), name="a"), keras.Input((5,), name="b")
    model = keras.Model([a, b], layers.Subtract(name="minus")([shared(a), shared(b)]))
    graph = _graph.trace(model)
    assert [c.path for c in graph.calls] == ["shared", "shared", "minus"]
    first, second, minus = graph.calls
    assert first.operation is second.operation is shared
    assert {id(first.inputs[0]), id(second.inputs[0])} == {id(t) for t in graph.inputs}
    by_input = {id(c.inputs[0]): c.outputs[0] for c in (first, second)}
    assert minus.inputs == tuple(by_input[id(t)] for t in graph.inputs)


def test_nested_twice_is_one_connected_graph():
    model = nested_model()
    graph = _graph.trace(model)
    assert [c.path for c in graph.calls] == [
        "backbone/block/conv",
        "backbone/block/relu",
        "backbone/block/conv",
        "backbone/block/relu",
        "flatten",
        "logits",
    ]
    tensor = graph.inputs[0]
    for call in graph.calls:
        assert call.inputs == (tensor,)
        (tensor,) = call.outputs
    assert graph.outputs == (tensor,)


def test_nested_model_on_another_shape_than_its_own():
    inner_input = keras.Input((None, None, 3), name="any")
    inner = keras.Model(inner_input, layers.Conv2D(4, 3, name="conv")(inner_input), name="inner")
    image = keras.Input((10, 12, 3), name="image")
    (call,) = _graph.calls(keras.Model(image, inner(image)))
    assert call.outputs[0].shape == (None, 8, 10, 4)


def test_nested_model_that_passes_an_input_through_and_returns_a_tensor_twice():
    x = keras.Input((4,), name="x")
    y = layers.Dense(4, name="dense")(x)
    inner = keras.Model(x, [y, x, y], name="inner")
    outer = keras.Input((4,), name="outer")
    a, b, c = inner(outer)
    model = keras.Model(outer, layers.Concatenate(name="join")([a, b, c]))
    graph = _graph.trace(model)
    dense, join = graph.calls
    assert join.inputs == (dense.outputs[0], graph.inputs[0], dense.outputs[0])


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_nested_multiple_inputs_in_the_right_places(structure):
    a, b = keras.Input((2,), name="b_first"), keras.Input((3,), name="a_second")
    declared = [a, b] if structure == "list" else {"b_first": a, "a_second": b}
    inner = keras.Model(
        declared, [layers.Dense(1, name="da")(a), layers.Dense(1, name="db")(b)], name="inner"
    )
    p, q = keras.Input((2,), name="p"), keras.Input((3,), name="q")
    out = inner({"b_first": p, "a_second": q})
    graph = _graph.trace(keras.Model([p, q], out))
    by_path = {c.path: c for c in graph.calls}
    assert by_path["inner/da"].inputs == (graph.inputs[0],)
    assert by_path["inner/db"].inputs == (graph.inputs[1],)
    assert graph.outputs == (by_path["inner/da"].outputs[0], by_path["inner/db"].outputs[0])


def test_multiple_inputs_and_outputs():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate(name="join")([a, b])
    outputs = {"u": layers.Dense(1, name="one")(x), "v": layers.Dense(2, name="two")(x)}
    graph = _graph.trace(keras.Model({"a": a, "b": b}, outputs))
    assert [t.shape for t in graph.inputs] == [(None, 2), (None, 3)]
    assert [t.shape for t in graph.outputs] == [(None, 1), (None, 2)]


def test_raw_operations_and_keyword_arguments():
    x = keras.Input((4, 6), name="x")
    y = keras.ops.reshape(x, (-1, 24))
    y = keras.ops.relu(y * 2.0)
    graph = _graph.trace(keras.Model(x, keras.ops.softmax(y, axis=-1)))
    assert [type(c.operation).__name__ for c in graph.calls] == [
        "Reshape",
        "Multiply",
        "Relu",
        "Softmax",
    ]
    assert [c.outputs[0].shape for c in graph.calls] == [(None, 24)] * 4
    assert graph.calls[1].args == (graph.calls[0].outputs[0], 2.0)


def test_keyword_tensor_arguments():
    q, v, k = keras.Input((5, 8)), keras.Input((7, 8)), keras.Input((7, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    graph = _graph.trace(keras.Model([q, v, k], attention(q, v, key=k)))
    (call,) = graph.calls
    assert call.inputs == graph.inputs
    assert call.kwargs["key"] is graph.inputs[2]
    assert call.outputs[0].shape == (None, 5, 8)


def test_masks_are_keyword_tensors():
    tokens = keras.Input((9,), dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True, name="embedding")(tokens)
    outputs = layers.LSTM(3, return_state=True, name="lstm")(x)
    graph = _graph.trace(keras.Model(tokens, outputs))
    embedding, lstm = (c for c in graph.calls if isinstance(c.operation, layers.Layer))
    (mask,) = (c for c in graph.calls if not isinstance(c.operation, layers.Layer))
    assert embedding.inputs == mask.inputs == graph.inputs
    assert graph.inputs[0].dtype == "int32"
    assert lstm.args == embedding.outputs
    assert lstm.kwargs["mask"] is mask.outputs[0]
    assert [t.shape for t in lstm.outputs] == [(None, 3)] * 3


def test_heads_look_through_masked_activations():
    tokens = keras.Input((9,), dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True)(tokens)
    x = layers.Softmax()(layers.Dense(5, name="tags")(x))
    model = keras.Model(tokens, x)
    assert any("mask" in c.kwargs for c in _graph.calls(model))
    assert [layer.name for layer in _graph.head_layers(model)] == ["tags"]


def test_custom_layer_without_shape_method():
    x = keras.Input((4,))
    (call,) = _graph.calls(keras.Model(x, Tripled(name="tripled")(x)))
    assert call.outputs[0].shape == (None, 12)


def test_uninferable_shape_names_the_layer():
    class Moody(layers.Layer):
        broken = False

        def compute_output_spec(self, x):
            if Moody.broken:
                raise RuntimeError("not today")
            return keras.KerasTensor(x.shape)

        def call(self, x):
            return x

    x = keras.Input((4,))
    model = keras.Model(x, Moody(name="moody")(x))
    Moody.broken = True
    with pytest.raises(ValueError, match=r"'moody' \(Moody\).*not today"):
        _graph.calls(model)


def test_subclassed_models_have_no_graph():
    model = Mlp()
    model(np.zeros((1, 3), "float32"))
    with pytest.raises(ValueError, match=r"Mlp.*no static graph"):
        _graph.calls(model)
    assert _graph.head_layers(model) == set()

    class Twice(keras.Sequential):
        def call(self, x):
            return 2 * super().call(x)

    with pytest.raises(ValueError, match=r"Twice.*no static graph"):
        _graph.calls(Twice([keras.Input((3,)), layers.Dense(2)]))
    with pytest.raises(TypeError, match=r"keras\.Model"):
        _graph.calls(layers.Dense(2))


def test_functional_subclass_and_compiled_model():
    class Custom(keras.Model):
        def __init__(self, width):
            inputs = keras.Input((4,))
            super().__init__(inputs, layers.Dense(width, name="dense")(inputs))

    model = Custom(3)
    model.compile("adam", lambda y_true, y_pred: keras.ops.mean(y_pred))
    optimizer = model.optimizer
    assert paths(model) == ["dense"]
    assert model.optimizer is optimizer


def test_subclassed_model_inside_is_one_call():
    x = keras.Input((4,))
    mlp = Mlp()
    (call,) = _graph.calls(keras.Model(x, mlp(x)))
    assert call.operation is mlp
    assert call.outputs[0].shape == (None, 2)


def test_batch_size():
    graph = _graph.trace(residual_model(), batch_size=1)
    assert all(t.shape[0] == 1 for c in graph.calls for t in c.outputs)
    x = keras.Input((4,), batch_size=6)
    fixed = _graph.trace(keras.Model(x, layers.Dense(2)(x)), batch_size=1)
    assert fixed.outputs[0].shape == (6, 2)


@pytest.mark.parametrize("make", [residual_model, nested_model])
def test_the_model_is_not_touched(make):
    model = make()
    x = np.random.default_rng(0).normal(size=(2, *model.inputs[0].shape[1:])).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    before = state(model)
    _graph.calls(model)
    _graph.head_layers(model)
    assert state(model) == before
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x)), expected)
    assert layers.Dense(1).name != layers.Dense(1).name  # and the naming counters still count


def test_automatic_names_do_not_move():
    model = nested_model()
    _graph.calls(model)  # the first use may look up classes
    name = keras.Model(model.inputs, model.outputs).name
    _graph.calls(model)
    _graph.calls(model)
    after = keras.Model(model.inputs, model.outputs).name
    assert int(after.rsplit("_", 1)[1]) == int((name + "_0").split("_")[1]) + 1


@slow_on_jax
def test_mobilenet():
    model = keras.applications.MobileNetV2(weights=None, alpha=0.35)
    graph = _graph.trace(model)
    assert len(graph.calls) == len(model.layers) - 1  # all but the input layer
    produced = {id(t) for t in graph.inputs}
    for call in graph.calls:
        assert all(id(t) in produced for t in call.inputs)
        produced |= {id(t) for t in call.outputs}
        assert call.outputs[0].shape == call.operation.output.shape
    assert [layer.name for layer in _graph.head_layers(model)] == ["predictions"]


def test_heads_through_parameter_free_layers():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="features"),
            layers.ReLU(),
            layers.Conv2D(5, 1, name="classes"),
            layers.Dropout(0.1),
            layers.GlobalAveragePooling2D(),
            layers.Rescaling(0.5),
            layers.Softmax(),
        ]
    )
    assert {layer.name for layer in _graph.head_layers(model)} == {"classes"}


def test_heads_of_several_outputs_and_nested_models():
    x = keras.Input((4,), name="x")
    inner_x = keras.Input((6,), name="inner_x")
    head = keras.Model(inner_x, layers.Dense(2, name="inside")(inner_x), name="head")
    body = layers.Dense(6, name="body")(x)
    other = layers.Dense(3, name="other")(body)
    model = keras.Model(x, [head(body), keras.ops.softmax(other)])
    assert {layer.name for layer in _graph.head_layers(model)} == {"inside", "other"}


def test_no_heads_where_the_output_is_used_again_or_merged():
    x = keras.Input((4,), name="x")
    features = layers.Dense(4, name="features")(x)
    logits = layers.Dense(2, name="logits")(layers.ReLU()(features))
    model = keras.Model(x, [features, logits])
    assert {layer.name for layer in _graph.head_layers(model)} == {"logits"}

    summed = keras.Model(x, layers.Add()([x, layers.Dense(4, name="branch")(x)]))
    assert _graph.head_layers(summed) == set()

    shared = layers.Dense(4, name="shared")
    assert _graph.head_layers(keras.Model(x, shared(shared(x)))) == set()


def test_a_run_computes_what_the_model_computes_and_forgets_the_rest():
    model = residual_model()
    model.get_layer("norm").moving_mean.assign([1.0, -2.0, 0.5, 3.0])
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    graph = _graph.trace(model)
    run = _graph.Run(graph, [x])
    held = []
    while run.call is not None:
        assert run.call is graph.calls[run.place]
        run.step()
        held.append(len(run.values))
    # stem; with norm; with conv; stem and sum; join; pool; logits
    assert held == [1, 2, 2, 2, 1, 1, 1]
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(run.values[id(graph.outputs[0])], expected, rtol=1e-5)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(variable))
