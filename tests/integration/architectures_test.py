"""Training with a recipe, in the step and around it, on the layers of transformers and RNNs."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware import (
    Every,
    GroupLasso,
    MagnitudePruning,
    Proximal,
    Recipe,
    Rule,
    UniformQuantization,
    find_targets,
)


def language_model():
    """Attention of both kinds, with one embedding at both ends."""
    tokens = keras.Input((6,), dtype="int32")
    embedding = layers.ReversibleEmbedding(11, 8, name="tokens")
    x = embedding(tokens)
    x = layers.MultiHeadAttention(2, 4, name="all")(x, x, use_causal_mask=True)
    x = layers.GroupQueryAttention(4, 4, 2, name="grouped")(x, x)
    x = layers.TimeDistributed(layers.Dense(8), name="steps")(x)
    return keras.Model(tokens, embedding(x, reverse=True)), 11


def recurrent_model():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 4, name="tokens")(tokens)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(x)
    x = layers.GRU(4, return_sequences=True, name="gru")(x)
    x = layers.SimpleRNN(4, return_sequences=True, name="simple")(x)
    return keras.Model(tokens, layers.Dense(11, name="scores")(x)), 11


class Subclassed(keras.Model):
    """A functional model inside a layer inside a subclassed model."""

    def __init__(self):
        super().__init__()
        inner = keras.Sequential([keras.Input((6, 4)), layers.Dense(8, name="deep")], name="inner")
        self.embedding = layers.Embedding(11, 4, name="tokens")
        self.block = layers.TimeDistributed(layers.Dense(4, name="dense"), name="steps")
        self.inner = inner
        self.scores = layers.Dense(11, name="scores")

    def call(self, tokens):
        return self.scores(self.inner(self.block(self.embedding(tokens))))


def subclassed_model():
    model = Subclassed()
    model(np.zeros((1, 6), "int32"))
    return model, 11


class Zeros(keras.callbacks.Callback):
    """Notes the fraction of zeros after each step."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.seen = targets, []

    def on_train_batch_end(self, batch, logs=None):
        self.model  # noqa: B018 - on JAX this moves the state into the variables
        kernels = [keras.ops.convert_to_numpy(target.read()) for target in self.targets]
        self.seen.append([float(np.mean(kernel == 0)) for kernel in kernels])


@pytest.mark.parametrize(
    ("make", "number"), [(language_model, 10), (recurrent_model, 10), (subclassed_model, 4)]
)
def test_training(make, number):
    model, classes = make()
    targets, skipped = find_targets(model)
    assert skipped == []
    assert len(targets) == number
    names = [target.name for target in targets]
    recipe = Recipe(
        [
            Rule(f"^{names[0]}$", Proximal(GroupLasso(0.02, axis="outputs"))),
            Rule(f"^{names[-1]}$", Every(1, UniformQuantization(4))),
            Rule(".*", Every(2, MagnitudePruning(0.5), hold=True)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(recipe.optimizer(keras.optimizers.Adam(0.01)), loss)
    tokens = np.random.default_rng(0).integers(classes, size=(20, 6))
    zeros = Zeros(targets[1:-1])
    callbacks = recipe.callbacks(model)
    history = model.fit(tokens, tokens, batch_size=4, epochs=2, verbose=0,
                        callbacks=[zeros, *callbacks]).history  # fmt: skip
    assert history["loss"][1] < history["loss"][0]
    assert all(sparsity == 0.0 for step in zeros.seen[:2] for sparsity in step)
    assert all(sparsity == 0.5 for step in zeros.seen[2:] for sparsity in step)
    last = keras.ops.convert_to_numpy(targets[-1].read())
    assert len(np.unique(last)) <= 15
    for target in targets[1:-1]:
        assert np.mean(keras.ops.convert_to_numpy(target.read()) == 0) == 0.5
