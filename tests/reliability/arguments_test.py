"""What a constructor or a configuration does not take is refused by this package, in words.

A message says whose argument it is (the class or the argument), and what was received.
"""

import inspect
import json
import math
import pathlib
import re
import traceback

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import keras_compaware as kc

PACKAGE = pathlib.Path(kc.__file__).parent

# Public class -> arguments that it takes.
VALID = {
    "L1": {"strength": 0.1},
    "AtEnd": {"compressor": kc.LowRank(rank=2)},
    "BinaryCodeQuantization": {"bits": 2},
    "Chain": {"compressors": (kc.MagnitudePruning(0.5),)},
    "Compressed": {"layer": keras.layers.Dense(3), "compressor": kc.MagnitudePruning(0.5)},
    "CompressionCallback": {"assignments": ()},
    "CompressionOptimizer": {"inner_optimizer": keras.optimizers.SGD()},
    "Every": {"every": 2, "constraint": kc.MagnitudePruning(0.5)},
    "GroupLasso": {"strength": 0.1},
    "GroupPruning": {"sparsity": 0.5},
    "KernelAxes": {},
    "LowRank": {"rank": 2},
    "LowRankGroupSparsity": {"strength": 0.1, "group_strength": 0.1},
    "MagnitudePruning": {"sparsity": 0.5},
    "NMPruning": {"keep": 2, "block": 4},
    "NuclearNorm": {"strength": 0.1},
    "OccasionalCompression": {"constraint": kc.MagnitudePruning(0.5), "every": 2},
    "PartialGroupLasso": {"strength": 0.1},
    "Penalty": {"regularizer": kc.L1(0.1)},
    "Proximal": {"regularizer": kc.L1(0.1)},
    "Ramp": {"initial": 0.0},
    "Recipe": {"rules": [kc.Rule(None, kc.Skip())]},
    "Rule": {"where": None, "actions": kc.Skip()},
    "Skip": {},
    "SparseGroupLasso": {"strength": 0.1, "l1_strength": 0.1},
    "StraightThrough": {"compressor": kc.MagnitudePruning(0.5)},
    "StrengthController": {"dead_groups": 0.5},
    "TernaryQuantization": {},
    "TruncatedNuclearNorm": {"strength": 0.1, "target_rank": 1},
    "Tucker2": {"ratio": 0.5},
    "UniformQuantization": {"bits": 4},
    "WeightClustering": {"num_clusters": 4},
    "WeightDecay": {"rate": 0.1},
    "WeightNoise": {"stddev": 0.1},
}
# What functions of the package return, and what its own compressors are made of: plain records.
RECORDS = {
    *("Allocation", "ChannelSpace", "Code", "CompactResult", "Firing", "Plan", "RecoverResult"),
    *("Sensitivity", "Target"),
}
ABSTRACT = {"Compressor", "ProximalRegularizer"}

ARGUMENTS = [
    (name, argument)
    for name in VALID
    for argument, parameter in inspect.signature(getattr(kc, name)).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD  # those of Keras
]

# Of no argument: kinds of values, one of each.
WRONG = {
    "NaN": math.nan,
    "infinity": math.inf,
    "-infinity": -math.inf,
    "NaN of NumPy": np.float32("nan"),
    "negative integer": -1,
    "negative number": -0.5,
    "huge integer": 10**400,
    "huge number": 1e300,
    "complex": 1j,
    "text": "(text",
    "bytes": b"x",
    "object": object(),
    "set": {1},
    "array": np.ones(3),
    "array of one": np.array(2),
    "mixed list": [1, "a"],
    "nested tuple": ((1,), (2,)),
    "class": int,
    "bool of NumPy": np.True_,
}
# Right for some arguments, wrong for the others.
TELLING = {
    "true": (True, {"weighted", "hold", "strict"}),
    "false": (False, {"weighted", "hold", "strict"}),
    "empty text": ("", {"where", "reason"}),
    "text of a number": ("1", {"where", "reason"}),
    "empty list": ([], {"assignments", "entries", "inputs", "outputs", "spatial", "channels"}),
    "empty mapping": ({}, set()),
    "function": (len, {"where"}),
}


def make(name, argument, value):
    kind, arguments = getattr(kc, name), {**VALID[name], argument: value}
    if name == "Rule":
        return kind(arguments["where"], arguments["actions"])
    return kind(**arguments)


def assert_refused(make, words):
    """Asserts that a call raises in this package, with one of the words and what was received."""
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    place = pathlib.Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert PACKAGE in place.parents, f"raised in {place}: {caught.value}"
    message = str(caught.value)
    assert re.search("Received: |: '.*'", message), message
    assert any(re.search(rf"\b{word}\b", message) for word in words), message


def words(name, argument):
    owner = {"OccasionalCompression": ["Every", "Rule"], "LowRankGroupSparsity": ["NuclearNorm"]}
    return [name, argument, *owner.get(name, [])]


def test_every_public_class_is_tried():
    classes = {name for name in kc.__all__ if isinstance(getattr(kc, name), type)}
    assert classes == set(VALID) | RECORDS | ABSTRACT
    for name, arguments in VALID.items():
        for argument, value in arguments.items():
            make(name, argument, value)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_what_an_argument_does_not_take(name, argument):
    for value in WRONG.values():
        if not (argument == "reason" and isinstance(value, str)):  # a reason is any text
            assert_refused(lambda value=value: make(name, argument, value), words(name, argument))
    for value, right in TELLING.values():
        if argument in right:
            make(name, argument, value)
        else:
            assert_refused(lambda value=value: make(name, argument, value), words(name, argument))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from(["inputs", "outputs", "channel", "spatial", "vbmf", "cosine", "largest"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=4,
)
SAVED = sorted(set(VALID) - {"Compressed", "CompressionCallback", "OccasionalCompression"})


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.sampled_from(ARGUMENTS), values)
@example(("PartialGroupLasso", "indices"), (0, 2))
@example(("Tucker2", "round_to"), 4)
def test_any_value_is_refused_or_survives_saving(where, value):
    """What is taken is taken as it is: its configuration is JSON and restores an equal value."""
    name, argument = where
    try:
        made = make(name, argument, value)
    except (TypeError, ValueError):
        assert_refused(lambda: make(name, argument, value), words(name, argument))
        return
    if name not in SAVED:
        return
    text = json.dumps(keras.saving.serialize_keras_object(made), allow_nan=False)
    again = keras.saving.deserialize_keras_object(json.loads(text))
    if name != "CompressionOptimizer":  # optimizers compare by identity
        assert again == made


@pytest.mark.parametrize("name", [n for n in SAVED if n != "CompressionOptimizer"])
def test_configurations(name):
    """An unknown key and a configuration that is none are refused, and so is a wrong value."""
    kind = getattr(kc, name)
    made = make(name, *next(iter(VALID[name].items()), ("", None))) if VALID[name] else kind()
    config = made.get_config()
    assert kind.from_config(config) == made
    assert_refused(lambda: kind.from_config({**config, "wdith": 1}), [name])
    for wrong in (None, 3, "text", [1]):
        assert_refused(lambda wrong=wrong: kind.from_config(wrong), [name])
    for key in config:
        assert_refused(lambda key=key: kind.from_config({**config, key: 1j}), words(name, key))
