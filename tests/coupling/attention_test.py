"""Heads of attention as channels: what is cut together, what is frozen and why."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_compaware import GroupLasso, Proximal, Recipe, Rule
from keras_compaware.coupling import channel_spaces, coupled_targets
from tests.coupling import networks
from tests.coupling.helpers import array
from tests.marks import needs_gates

# The analysis computes nothing; on JAX the time goes into making the layers.
pytestmark = [pytest.mark.slow] if keras.backend.backend() == "jax" else []


def around(call, attention=None, shape=(5, 6), extra=()):
    """A model that returns what `call(layer of attention, inputs, *extra)` does."""
    attention = attention or layers.MultiHeadAttention(4, 3, name="attention")
    inputs = keras.Input(shape)
    return keras.Model([inputs, *extra], call(attention, inputs, *extra))


def members(space):
    return {(m.name, m.axis, m.role): m.index_map.tolist() for m in space.members}


@needs_gates
def test_members_are_slices_of_all_kernels_and_biases():
    attention = layers.MultiHeadAttention(3, 2, value_dim=5, use_gate=True, name="attention")
    model = networks.encoder(attention)
    heads = [0, 1, 2]
    space = channel_spaces(model)["attention/heads"]
    assert members(space) == {
        **{
            (f"attention/{part}/{name}", axis, "producer"): heads
            for part in ("query", "key", "value", "gate")
            for name, axis in (("kernel", 1), ("bias", 0))
        },
        ("attention/attention_output/kernel", 0, "consumer"): heads,
    }
    for member in space.members:
        assert member.variable.shape[member.axis] == 3
    assert channel_spaces(model).coverage() > 0.9


def test_a_head_of_keys_goes_with_all_heads_of_queries_that_read_it():
    attention = layers.GroupQueryAttention(2, 6, 3, use_bias=False, name="attention")
    space = channel_spaces(networks.encoder(attention))["attention/heads"]
    assert space.size == 3
    assert members(space) == {
        ("attention/query/kernel", 1, "producer"): [0, 0, 1, 1, 2, 2],
        ("attention/key/kernel", 1, "producer"): [0, 1, 2],
        ("attention/value/kernel", 1, "producer"): [0, 1, 2],
        ("attention/attention_output/kernel", 0, "consumer"): [0, 0, 1, 1, 2, 2],
    }


def test_what_attention_reads_and_returns_is_frozen():
    model = around(lambda f, x: layers.Dense(2, name="z")(f(layers.Dense(3, name="a")(x), x)))
    spaces = channel_spaces(model)
    assert spaces["a"].frozen == "of 'attention' (MultiHeadAttention) only the heads can be cut"
    assert spaces["attention"].frozen == (
        "it is an output of 'attention' (MultiHeadAttention), which its rule leaves whole"
    )
    assert [space.name for space in spaces.free] == ["attention/heads"]


def mask(*shape):
    return keras.Input(shape, dtype="bool")


FREE = {
    "one mask for all heads": lambda: around(
        lambda f, x, m: f(x, x, attention_mask=m), extra=(mask(5, 5),)
    ),
    "an axis of one for the heads": lambda: around(
        lambda f, x, m: f(x, x, x, attention_mask=m), extra=(mask(1, 5, 5),)
    ),
    "a causal mask": lambda: around(lambda f, x: f(x, value=x, use_causal_mask=True)),
    "a constant mask": lambda: around(
        lambda f, x: f(x, x, attention_mask=np.ones((1, 1, 5, 5), bool))
    ),
    "scores that nobody reads": lambda: around(
        lambda f, x: f(x, x, return_attention_scores=True)[0]
    ),
    "scores that are read by heads": lambda: around(
        lambda f, x: layers.Dense(2)(
            layers.Permute((2, 3, 1))(f(x, x, return_attention_scores=True)[1])
        )
    ),
    "called twice": lambda: around(lambda f, x: f(f(x, x), x)),
    "attention over one axis of two": lambda: around(
        lambda f, x: f(x, x),
        layers.MultiHeadAttention(4, 3, attention_axes=(2,), output_shape=(3, 2), name="attention"),
        shape=(3, 5, 6),
    ),
    "as many masks as there are rows beside": lambda: around(
        lambda f, x, m: f(x, x, attention_mask=m),
        layers.MultiHeadAttention(4, 3, attention_axes=(2,), name="attention"),
        shape=(4, 5, 6),
        extra=(mask(4, 5, 5),),
    ),
    "one head": lambda: around(
        lambda f, x: f(x, x), layers.MultiHeadAttention(1, 3, name="attention")
    ),
}


@pytest.mark.parametrize("make", FREE.values(), ids=FREE)
def test_free(make):
    space = channel_spaces(make())["attention/heads"]
    assert space.frozen is None
    assert space.size in (1, 4)


class Mixed(layers.MultiHeadAttention):
    """Talking heads, as Keras invites to."""

    def _compute_attention(self, query, key, value, *args, **kwargs):
        output, scores = super()._compute_attention(query, key, value, *args, **kwargs)
        return ops.flip(output, 2), scores


class Named(layers.MultiHeadAttention):
    """Computes what its base computes."""


FROZEN = {
    "a mask for every head": (
        lambda: around(lambda f, x, m: f(x, x, attention_mask=m), extra=(mask(4, 5, 5),)),
        "the mask of 'attention' has an entry for every head",
    ),
    "a constant mask for every head": (
        lambda: around(lambda f, x: f(x, x, attention_mask=np.ones((1, 4, 5, 5), bool))),
        "the mask of 'attention' has an entry for every head",
    ),
    "masks of an unknown number": (
        lambda: around(lambda f, x, m: f(x, x, attention_mask=m), extra=(mask(None, 5, 5),)),
        "the mask of 'attention' has an entry for every head",
    ),
    "a mask for every head of grouped queries": (
        lambda: around(
            lambda f, x, m: f(x, x, attention_mask=m),
            layers.GroupQueryAttention(2, 4, 2, name="attention"),
            extra=(mask(4, 5, 5),),
        ),
        "the mask of 'attention' has an entry for every head",
    ),
    "a mask for every head beside other axes": (
        lambda: around(
            lambda f, x, m: f(x, x, attention_mask=m),
            layers.MultiHeadAttention(4, 3, attention_axes=(2,), name="attention"),
            shape=(3, 5, 6),
            extra=(mask(1, 4, 5, 5),),
        ),
        "the mask of 'attention' has an entry for every head",
    ),
    "one of two calls": (
        lambda: around(lambda f, x, m: f(f(x, x), x, attention_mask=m), extra=(mask(4, 5, 5),)),
        "the mask of 'attention' has an entry for every head",
    ),
    "scores that are returned": (
        lambda: around(lambda f, x: f(x, x, return_attention_scores=True)),
        "it is an output of the model",
    ),
    "grouped scores that are returned": (
        lambda: around(
            lambda f, x: f(x, x, return_attention_scores=True),
            layers.GroupQueryAttention(2, 4, 2, name="attention"),
        ),
        "it is an output of the model",
    ),
    "the mean of scores": (
        lambda: around(lambda f, x: ops.mean(f(x, x, return_attention_scores=True)[1], axis=1)),
        "reduces over the channels",
    ),
    "scores as an image": (
        lambda: around(
            lambda f, x: layers.Conv2D(2, 1, name="odd")(f(x, x, return_attention_scores=True)[1])
        ),
        "'odd' works along another axis",
    ),
    "scores of other axes": (
        lambda: around(
            lambda f, x: f(x, x, return_attention_scores=True)[0],
            layers.MultiHeadAttention(4, 3, attention_axes=(2,), name="attention"),
            shape=(3, 5, 6),
        ),
        "'attention' returns the scores of its heads",
    ),
    "a projection that is used elsewhere": (
        lambda: around(lambda f, x: (f(x, x), f.query_dense(x))),
        "is not that of Dense",
    ),
}


@pytest.mark.parametrize(("make", "reason"), FROZEN.values(), ids=FROZEN)
def test_frozen(make, reason):
    assert reason in channel_spaces(make())["attention/heads"].frozen


def test_subclasses():
    named = Named(4, 3, name="attention")
    assert channel_spaces(networks.encoder(named))["attention/heads"].frozen is None
    spaces = channel_spaces(
        around(lambda f, x: f(layers.Dense(6, name="a")(x), x), Mixed(4, 3, name="attention"))
    )
    assert spaces["a"].frozen == "'attention' (Mixed) has a `_compute_attention` of its own"
    assert [space.name for space in spaces.free] == []


@pytest.mark.parametrize("change", ["lora", "quantization"])
def test_projections_that_keras_has_changed(change):
    model = networks.encoder()
    attention = model.get_layer("attention")
    if change == "lora":
        attention.value_dense.enable_lora(2)
    else:
        attention.output_dense.quantize("int8")
    assert [space.name for space in channel_spaces(model).free] == ["up"]


def test_rows_of_heads_as_a_target():
    model = networks.encoder()
    targets, _ = coupled_targets(model)
    (target,) = (target for target in targets if target.name == "attention/heads/channels")
    # Queries, keys and values: 3 of 6 features and a bias; 3 rows of 6 that read a head.
    assert target.shape == (4, 3 * 3 * 7 + 3 * 6)
    attention = model.get_layer("attention")
    assert target.layer is attention
    rows = array(target.read())
    for head, row in enumerate(rows):
        parts = [
            array(weight)[:, head] if weight.ndim == 3 else array(weight)[head]
            for part in (attention.key_dense, attention.value_dense, attention.query_dense)
            for weight in part.weights
        ]
        parts.append(array(attention.output_dense.kernel)[head])
        np.testing.assert_allclose(
            np.sort(row), np.sort(np.concatenate([part.reshape(-1) for part in parts]))
        )
    attention.trainable = False
    _, skipped = coupled_targets(model)
    assert "attention/heads/channels" in {entry.name for entry in skipped}


def test_rules_find_heads_by_name_and_by_class():
    model = networks.encoder()
    for where in ("heads", layers.MultiHeadAttention):
        plan = Recipe(channels=[Rule(where, Proximal(GroupLasso(0.1)))]).plan(model)
        assert [a.target.name for a in plan.assignments] == ["attention/heads/channels"]
