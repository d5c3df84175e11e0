"""What goes with a rebuilt model: initializers, and state that is no variable."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import compact, shrink
from tests.coupling.helpers import randomise

WORDS = np.array(["ant", "bee", "cow", "ant", "bee", "ant"])
SENTENCES = np.array(["ant bee", "cow bee ant", "ant ant"])


def string_lookup():
    lookup = layers.StringLookup(output_mode="int", name="lookup")
    lookup.adapt(WORDS)
    return keras.Sequential(
        [
            keras.Input((2,), dtype="string"),
            lookup,
            layers.Embedding(4, 6, name="embedding"),
            layers.Dense(2, name="head"),
        ]
    )


def integer_lookup():
    lookup = layers.IntegerLookup(name="lookup")
    lookup.adapt(np.array([7, 7, 5, 9]))
    return keras.Sequential(
        [
            keras.Input((2,), dtype="int64"),
            lookup,
            layers.Embedding(4, 6, name="embedding"),
            layers.Dense(2, name="head"),
        ]
    )


def text_vectorization():
    lookup = layers.TextVectorization(output_sequence_length=3, name="lookup")
    lookup.adapt(SENTENCES)
    return keras.Sequential(
        [
            keras.Input((), dtype="string"),
            lookup,
            layers.Embedding(5, 6, name="embedding"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )


MODELS = {
    "StringLookup": (string_lookup, [["ant", "cow"], ["bee", "dog"]]),
    "IntegerLookup": (integer_lookup, [[7, 9], [5, 4]]),
    "TextVectorization": (text_vectorization, ["bee ant", "dog cow"]),
}


REBUILDS = {
    "shrink": lambda model: shrink(model, {}),
    "compact": lambda model: compact(model).model,
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
@pytest.mark.parametrize(("make", "examples"), MODELS.values(), ids=MODELS)
def test_what_adapt_has_learnt(make, examples, rebuild, tmp_path):
    import tensorflow as tf

    model = make()
    examples = tf.constant(examples)
    if examples.dtype != tf.string:
        examples = tf.cast(examples, "int64")
    expected = keras.ops.convert_to_numpy(model(examples))
    small = rebuild(model)
    assert small.get_layer("lookup") is not model.get_layer("lookup")
    assert small.get_layer("lookup").get_vocabulary() == model.get_layer("lookup").get_vocabulary()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(small(examples)), expected)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(examples)), expected)


@keras.saving.register_keras_serializable("rebuild_test")
class Counted(keras.initializers.Initializer):
    """Ones, and how often they were asked for."""

    calls = 0

    def __call__(self, shape, dtype=None):
        Counted.calls += 1
        return keras.ops.ones(shape, dtype)

    def get_config(self):
        return {}


def counted():
    return keras.Sequential(
        [
            keras.Input((4, 5)),
            layers.Dense(6, kernel_initializer=Counted(), name="first"),
            keras.Sequential(
                [layers.LSTM(3, recurrent_initializer=Counted(), name="recurrent")], name="inner"
            ),
            layers.Dense(2, kernel_initializer=Counted(), name="head"),
        ]
    )


@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
def test_initial_values_that_are_overwritten_are_not_drawn(rebuild):
    model = randomise(counted())
    before = Counted.calls
    small = rebuild(model)
    assert before >= 3
    assert Counted.calls == before
    for a, b in zip(model.get_weights(), small.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    first, head = small.get_layer("first"), small.get_layer("head")
    recurrent = small.get_layer("inner").get_layer("recurrent")
    assert isinstance(recurrent.recurrent_initializer, Counted)
    assert isinstance(recurrent.kernel_initializer, keras.initializers.GlorotUniform)
    for layer in (first, head):
        assert layer.get_config()["kernel_initializer"]["registered_name"] == "rebuild_test>Counted"
        assert isinstance(layer.bias_initializer, keras.initializers.Zeros)
