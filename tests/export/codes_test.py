"""Archives of weights: bit for bit what compressors store, and nothing else is ever loaded."""

import dataclasses
import hashlib
import json
import math
import os
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from keras_compaware import (
    AtEnd,
    Chain,
    Code,
    Every,
    LowRank,
    MagnitudePruning,
    Recipe,
    Rule,
    StraightThrough,
    UniformQuantization,
    export,
    register_kernels,
)
from keras_compaware.export import _packing
from keras_compaware.kernels import find_targets
from tests.laws.cases import COMPRESSORS
from tests.laws.helpers import eagerly
from tests.laws.kernels_under_test import kernel
from tests.marks import slow_on_jax

# ---- the format, read and written by hand -----------------------------------------------------


def contents(path):
    """`(header, {tensor name: (dtype, shape, bytes)})` of a file, by the format's definition."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    header = json.loads(table.pop("__metadata__")["keras_compaware"])
    tensors = {
        name: (entry["dtype"], entry["shape"], data[8 + size :][slice(*entry["data_offsets"])])
        for name, entry in table.items()
    }
    return header, tensors


def forge(path, header, tensors=None, table=None):
    """Writes a file with a digest that is right, whatever it says."""
    if tensors is None:
        tensors = contents(path)[1]
    header = {"sha256": "0" * 64, **{k: v for k, v in header.items() if k != "sha256"}}
    entries, body = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(body), len(body) + len(content)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += content
    entries.update(table or {})
    metadata = {"keras_compaware": json.dumps(header, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + body
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(b"0" * 64, digest, 1))


def packed_by_hand(values, bits):
    """The integers as one large number, the first one lowest."""
    number = sum((value % 2**bits) << (bits * i) for i, value in enumerate(values))
    return number.to_bytes(math.ceil(len(values) * bits / 8), "little")


# ---- packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@given(bits=st.integers(1, 16), data=st.data())
@settings(max_examples=40, deadline=None)
def test_integers_are_packed_and_unpacked(signed, bits, data):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(low, high), max_size=40))
    array = np.array(values, "int32")
    packed = _packing.pack(array, bits)
    assert packed.tobytes() == packed_by_hand(values, bits)
    assert _packing.unpack(packed, len(values), bits, signed=signed).tolist() == values
    assert _packing.fits(array, bits, signed=signed)


def test_packing_does_not_depend_on_the_size_of_a_block(monkeypatch):
    values = np.random.default_rng(0).integers(-16, 16, 101)
    whole = _packing.pack(values, 5)
    monkeypatch.setattr(_packing, "_BLOCK", 8)
    np.testing.assert_array_equal(_packing.pack(values, 5), whole)
    np.testing.assert_array_equal(_packing.unpack(whole, 101, 5, signed=True), values)


@pytest.mark.parametrize(
    ("value", "bits", "signed"), [(4, 2, False), (2, 2, True), (-3, 2, True), (-1, 8, False)]
)
def test_what_does_not_fit_is_noticed(value, bits, signed):
    assert not _packing.fits(np.array([0, value]), bits, signed=signed)


# ---- codes ------------------------------------------------------------------------------------

KERNELS = ("dense", "depthwise conv2d")
# On JAX every operation is compiled anew for every shape, which is most of what these tests cost.
FAST_ON_JAX = ("pruning 70 %", "rank 1", "prune, then 4 bits", "2 of 4")


def is_slow(case, name):
    on_jax = keras.backend.backend() == "jax"
    return on_jax and (name != "dense" or case.id not in FAST_ON_JAX)


CASES = [
    pytest.param(
        case,
        name,
        id=f"{case.id}, {name}",
        marks=[pytest.mark.slow] if is_slow(case, name) else [],
    )
    for case in COMPRESSORS
    for name in KERNELS
    if case.fits(kernel(name).shape, kernel(name).axes)
]


class Holder(layers.Layer):
    """A layer of one kernel, of whatever shape and axes."""

    def __init__(self, found, matrix=None, name=None):
        super().__init__(name=name)
        self.axes = found.axes
        self.matrix = self.add_weight(shape=found.shape) if matrix is None else matrix
        self.built = True


register_kernels(Holder, matrix=lambda layer: layer.axes)


def leaves(code, outside=True, name=""):
    """Yields `(name, array, bits, stored)` of all parts, with the entries that are stored."""
    mask = outside
    if code.mask is not None:
        mask = np.asarray(ops.convert_to_numpy(code.parts[code.mask])) & outside
    for key, part in code.parts.items():
        stored = mask if key in code.counts else outside
        if isinstance(part, Code):
            yield from leaves(part, stored if part.shape == code.shape else True, f"{name}:{key}")
            continue
        array = np.asarray(ops.convert_to_numpy(part))
        stored = np.broadcast_to(stored if key in code.entrywise else True, array.shape)
        yield f"{name}:{key}", array, code.bits[key], stored


def skeleton(code):
    """Everything of a code that is not an array."""
    fields = {f.name: getattr(code, f.name) for f in dataclasses.fields(code)}
    parts = fields.pop("parts")
    for name in ("bits", "payload", "counts"):
        fields[name] = dict(fields[name])
    inner = {key: skeleton(part) for key, part in parts.items() if isinstance(part, Code)}
    return fields, list(parts), inner


@pytest.mark.parametrize(("case", "name"), CASES)
def test_every_code_comes_back_bit_for_bit(case, name, tmp_path):
    found, path = kernel(name), tmp_path / "codes.safetensors"
    model = Holder(found)
    with eagerly():
        compressor = case.compressor.settle(found.random(), found.axes)
        code = compressor.encode(ops.convert_to_tensor(found.random()), axes=found.axes)
        decoded = ops.convert_to_numpy(compressor.decode(code))
        model.matrix.assign(decoded)
        finals, codes = {"matrix": compressor}, {"matrix": code}
        result = export.save_codes(model, finals, path, codes)
        saved = export.load_codes(path)
        assert result.max_error <= 1e-6
        np.testing.assert_allclose(saved.kernel("matrix"), decoded, rtol=0, atol=1e-6)
    assert saved.weights == {}
    assert saved.compressors == {"matrix": compressor}
    assert skeleton(saved.codes["matrix"]) == skeleton(code)
    tensors = contents(path)[1]
    total = 0
    for (place, array, bits, stored), (_, restored, _, _) in zip(
        leaves(code), leaves(saved.codes["matrix"]), strict=True
    ):
        assert restored.dtype == array.dtype, place
        np.testing.assert_array_equal(restored, np.where(stored, array, 0), err_msg=place)
        dtype, _, content = tensors[f"matrix{place}"]
        count = int(np.sum(stored))
        assert len(content) == math.ceil(count * bits / 8), place
        if dtype == "U8" and bits < 8:
            assert content == packed_by_hand([int(v) for v in array[stored]], bits), place
        total += count * bits
    # The bits that are counted are those in the file, but for the last byte of each tensor.
    assert total == code.num_bits
    expected = case.num_bits(found.shape, found.axes)
    assert expected is None or total == expected
    assert result.bytes == path.stat().st_size


def test_the_bytes_of_pruned_and_quantized_weights(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, use_bias=False, name="d")])
    w = np.zeros((4, 4), "float32")
    w[0] = [3.5, -2.0, 0.5, 1.0]  # of scale 0.5
    w[2, 3] = -1.5
    w[3, 0] = 2.5
    model.layers[0].kernel.assign(w)
    path = tmp_path / "codes.safetensors"
    chain = Chain([MagnitudePruning(0.625), UniformQuantization(4)])
    assert export.save_codes(model, {"d/kernel": chain}, path).max_error < 1e-6
    header, tensors = contents(path)
    assert {name: content for name, (_, _, content) in tensors.items()} == {
        "d/kernel:mask": b"\x0f\x18",
        # 7, -4, 1, 2, -3, 5 in four bits each, the first one in the low half
        "d/kernel:values:codes": b"\xc7\x21\x5d",
        "d/kernel:values:scale": np.float32(0.5).tobytes(),
    }
    assert header["format"] == "codes"
    assert header["version"] == 1
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + size + 2 + 3 + 4


def test_the_bytes_of_plain_weights(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(5, name="d")])
    path = tmp_path / "codes.safetensors"
    result = export.save_codes(model, None, path)
    header, tensors = contents(path)
    w, b = model.get_weights()
    assert tensors == {
        "d/bias": ("F32", [5], b.tobytes()),
        "d/kernel": ("F32", [3, 5], w.tobytes()),
    }
    assert header["codes"] == {}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert result.bytes == path.stat().st_size == 8 + size + 4 * 20
    assert result.max_error == 0.0


def test_a_part_that_does_not_fit_its_bits_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")])
    compressor = UniformQuantization(8)
    w = model.layers[0].kernel
    code = compressor.encode(w.value)
    w.assign(compressor.decode(code))
    code = dataclasses.replace(code, bits={**code.bits, "codes": 4})
    with pytest.raises(ValueError, match=r"'d/kernel:codes' has values in .* the 4 bits"):
        export.save_codes(model, {"d/kernel": compressor}, tmp_path / "a", {"d/kernel": code})


# ---- models -----------------------------------------------------------------------------------


def network():
    """Embedding, convolution, batch normalisation, a nested model, and a recurrent layer."""
    block = keras.Sequential(
        [
            keras.Input((5, 6)),
            layers.Conv1D(8, 1, name="conv"),
            layers.BatchNormalization(name="bn"),
        ],
        name="block",
    )
    x = inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(8, 6, name="embedding")(x)
    x = block(x)
    x = layers.GRU(6, name="gru")(x)
    x = layers.Dense(8, name="dense")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x), name="network")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    return model


RECIPE = Recipe(
    [
        Rule("conv", AtEnd(Chain([MagnitudePruning(0.5), UniformQuantization(4)]))),
        Rule("embedding", AtEnd(MagnitudePruning(0.5))),
        Rule("dense/", Every(10, LowRank(rank=1))),
    ]
)
NAMES = {
    *("block/bn/beta", "block/bn/gamma", "block/bn/moving_mean", "block/bn/moving_variance"),
    *("block/conv/bias", "dense/bias", "head/bias", "head/kernel"),
    *("gru/gru_cell/bias", "gru/gru_cell/kernel", "gru/gru_cell/recurrent_kernel"),
}
CODED = {
    "block/conv/kernel": lambda model: model.get_layer("block").get_layer("conv").kernel,
    "dense/kernel": lambda model: model.get_layer("dense").kernel,
    "embedding/embeddings": lambda model: model.get_layer("embedding").embeddings,
}


def arrays(model):
    return [np.asarray(ops.convert_to_numpy(w)) for w in model.weights]


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def archive(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "codes.safetensors"
    with eagerly():
        export.save_codes(model, RECIPE, path)
    return path


@pytest.fixture
def copy(archive, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(archive.read_bytes())
    return path


def test_a_model_comes_back(model, archive):
    fresh = network()
    fresh.set_weights([np.zeros(w.shape) for w in fresh.get_weights()])
    with eagerly():
        saved = export.load_codes(archive, fresh)
        for name, variable in CODED.items():
            target = next(t for t in find_targets(model)[0] if t.name == name)
            compressor = RECIPE.final_compressors(model)[name]
            expected = ops.convert_to_numpy(compressor(target.read(), axes=target.axes))
            actual = ops.convert_to_numpy(variable(fresh))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=name)
    assert set(saved.weights) == NAMES
    assert set(saved.codes) == set(saved.compressors) == set(CODED)
    plain = [w.path for w in model.weights if not w.path.endswith(tuple(CODED))]
    assert len(plain) == len(NAMES)
    for name, expected, actual in zip(
        [w.path for w in model.weights], arrays(model), arrays(fresh), strict=True
    ):
        if name in plain:
            np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_saving_what_was_loaded_gives_the_same_file(archive, tmp_path):
    fresh, path = network(), tmp_path / "again.safetensors"
    with eagerly():
        saved = export.load_codes(archive, fresh)
        export.save_codes(fresh, saved.compressors, path, saved.codes)
    assert path.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_sixteen_bits(dtype, tmp_path):
    def build():
        stack = [layers.Embedding(8, 6, name="embedding"), layers.Dense(3, name="dense")]
        return keras.Sequential([keras.Input((5,)), *stack])

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model, fresh = build(), build()
    finally:
        keras.config.set_dtype_policy(policy)
    path, pruning = tmp_path / "codes.safetensors", MagnitudePruning(0.5)
    with eagerly():
        embeddings = model.get_layer("embedding").embeddings
        embeddings.assign(pruning(embeddings.value))
        result = export.save_codes(model, {"embedding/embeddings": pruning}, path)
        saved = export.load_codes(path, fresh)
    assert result.max_error == 0.0
    for expected, actual in zip(arrays(model), arrays(fresh), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert saved.weights["dense/bias"].dtype.name == dtype
    assert saved.kernel("embedding/embeddings").dtype.name == dtype
    assert contents(path)[1]["dense/kernel"][0] == {"bfloat16": "BF16", "float16": "F16"}[dtype]


def test_wrapped_layers_have_the_names_of_plain_ones(tmp_path):
    recipe = Recipe([Rule("dense/", StraightThrough(LowRank(rank=2)))])
    wrapped, path = recipe.wrap(network()), tmp_path / "codes.safetensors"
    assert len(wrapped.weights) == len(network().weights) + 1  # the basis
    with eagerly():
        export.save_codes(wrapped, recipe, path)
        plain = network()
        saved = export.load_codes(path, plain)
        assert set(saved.weights) | set(saved.codes) == NAMES | set(CODED)
        export.load_codes(path, wrapped)
    basis = wrapped.get_layer("dense").bases[0]
    assert not np.any(ops.convert_to_numpy(basis))  # the kernel is used as it is
    latent = ops.convert_to_numpy(wrapped.get_layer("dense").layer.kernel)
    np.testing.assert_array_equal(latent, ops.convert_to_numpy(plain.get_layer("dense").kernel))


class Shared(keras.Model):
    """Two layers of one name, one of them used twice, and weights of no name of their own."""

    def __init__(self):
        super().__init__(name="shared")
        self.first = layers.Dense(4, name="same")
        self.second = layers.Dense(4, name="same")
        self.again = self.first
        self.scale = self.add_weight(shape=(4,), initializer="ones")
        self.scales = [self.add_weight(shape=(2,), initializer="ones") for _ in range(2)]

    def call(self, x):
        return self.again(self.second(self.first(x))) * self.scale


def test_names_are_unique_and_do_not_depend_on_what_was_built_before(tmp_path):
    model, other = Shared(), Shared()
    for each in (model, other):
        each(np.ones((1, 4)))
    path = tmp_path / "codes.safetensors"
    export.save_codes(model, None, path)
    saved = export.load_codes(path, other)
    assert set(saved.weights) == {
        *("same/kernel", "same/kernel_2", "same/bias", "same/bias_2"),
        *("scale", "weight_1", "weight_2"),
    }
    for expected, actual in zip(arrays(model), arrays(other), strict=True):
        np.testing.assert_array_equal(actual, expected)


class Tied(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = Holder(kernel("dense"), name="first")
        self.second = Holder(kernel("dense"), self.first.matrix, name="second")
        self.built = True


def test_a_tied_kernel_is_stored_once(tmp_path):
    model, path = Tied(), tmp_path / "codes.safetensors"
    with eagerly():
        export.save_codes(model, {"first/matrix": UniformQuantization(8)}, path)
        assert list(export.load_codes(path, model).codes) == ["first/matrix"]
    assert set(contents(path)[1]) == {"first/matrix:codes", "first/matrix:scale"}


@slow_on_jax
def test_the_codes_that_training_leaves_keep_quantized_factors(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, name="dense")])
    chain = Chain([LowRank(rank=2), UniformQuantization(4)])
    recipe = Recipe([Rule(".*", Every(2, LowRank(rank=2)), AtEnd(UniformQuantization(4)))])
    path, w = tmp_path / "codes.safetensors", model.layers[0].kernel
    with eagerly():
        code = chain.encode(kernel("dense").random())
        w.assign(chain.decode(code))
        codes = {"dense/kernel": code}
        assert export.save_codes(model, recipe, path, codes).max_error < 1e-6
        loaded = export.load_codes(path).codes["dense/kernel"]
        assert loaded.num_bits == 4 * 2 * (8 + 6) + 2 * 32
        # Its parts know what decodes them, without the chain.
        restored = LowRank(rank=2).decode(loaded.plain())
        np.testing.assert_allclose(ops.convert_to_numpy(restored), arrays(model)[0], atol=1e-6)
        # Encoded again, the balanced factors lie on another grid.
        assert export.save_codes(model, recipe, path).max_error > 1e-3
        w.assign(2 * ops.convert_to_numpy(w))
        before = path.read_bytes()
        with pytest.raises(ValueError, match="'dense/kernel' does not restore its kernel"):
            export.save_codes(model, recipe, path, codes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("other", [None, UniformQuantization(5)])
def test_parts_of_another_compressor_than_the_chain_has(tmp_path, other):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, name="dense")])
    chain = Chain([MagnitudePruning(0.5), UniformQuantization(4)])
    path, w = tmp_path / "codes.safetensors", model.layers[0].kernel
    with eagerly():
        code = chain.encode(kernel("dense").random())
        values = dataclasses.replace(code.parts["values"], compressor=other)
        code = dataclasses.replace(code, parts={**code.parts, "values": values})
        w.assign(chain.decode(code))
        export.save_codes(model, {"dense/kernel": chain}, path, {"dense/kernel": code})
        saved = export.load_codes(path)
    assert skeleton(saved.codes["dense/kernel"]) == skeleton(code)


# ---- wrong arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "codes", "error", "message"),
    [
        (UniformQuantization(4), None, TypeError, "must be a Recipe, a mapping .* or None"),
        ({"dense/kernel": 4}, None, TypeError, "'dense/kernel' needs a Compressor. Received: 4"),
        ({"dens": LowRank(rank=1)}, None, ValueError, "compressors for dens. .*head/kernel"),
        (None, {"dense/kernel": 1}, ValueError, "codes for dense/kernel. .*are none"),
        ({"dense/kernel": LowRank(rank=1)}, {"dense/kernel": 1}, TypeError, "needs a Code"),
    ],
)
def test_wrong_arguments(model, tmp_path, recipe, codes, error, message):
    with pytest.raises(error, match=message):
        export.save_codes(model, recipe, tmp_path / "codes.safetensors", codes)
    assert os.listdir(tmp_path) == []


def test_a_code_of_another_compressor_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")])
    code = MagnitudePruning(0.0).encode(model.layers[0].kernel.value)
    with pytest.raises(ValueError, match="the code of 'd/kernel' does not restore its kernel"):
        export.save_codes(model, {"d/kernel": LowRank(rank=1)}, tmp_path / "a", {"d/kernel": code})


def test_a_model_that_is_not_built_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not built"):
        export.save_codes(keras.Sequential([layers.Dense(2)]), None, tmp_path / "codes")


def test_a_model_that_does_not_fit_is_left_as_it_was(archive):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(8, 7, name="embedding")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(6, name="other")(x)))
    before = arrays(model)
    with pytest.raises(ValueError, match="does not fit the model") as raised:
        export.load_codes(archive, model)
    message = str(raised.value)
    assert "'embedding/embeddings' has the shape (8, 7) in the model and (8, 6) in" in message
    assert "'other/kernel' is not in the file" in message
    assert "'block/bn/beta' is not in the model" in message
    assert "more. Expected: " in message
    for old, new in zip(before, arrays(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_an_unknown_kernel(archive):
    with pytest.raises(
        ValueError, match=r"no compressed kernel 'head/kernel'. Known: .*dense/kernel"
    ):
        export.load_codes(archive).kernel("head/kernel")


def test_the_old_file_survives_a_failure(copy, model, monkeypatch):
    before = copy.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        export.save_codes(model, None, copy)
    assert copy.read_bytes() == before
    assert os.listdir(copy.parent) == [copy.name]


def test_missing_files_and_folders(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.safetensors"):
        export.load_codes(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export.save_codes(model, None, tmp_path / "folder" / "a.safetensors")


# ---- damaged and hostile files ----------------------------------------------------------------


def refused(path, match, model=None):
    with pytest.raises(ValueError, match=match) as raised:
        export.load_codes(path, model)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert re.search("Copy the file again|write it anew", message)


def test_every_flipped_byte_is_noticed(copy):
    data = copy.read_bytes()
    size = int.from_bytes(data[:8], "little")
    random = np.random.default_rng(0)
    places = {
        *range(8),
        *random.integers(8, 8 + size, 25),
        *random.integers(8 + size, len(data), 25),
    }
    places |= {8 + size - 1, len(data) - 1}
    for place in map(int, places):
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        copy.write_bytes(changed)
        refused(copy, "damaged|cut off|format")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -100])
def test_a_file_that_was_cut_off_is_refused(copy, size):
    copy.write_bytes(copy.read_bytes()[:size])
    refused(copy, "cut off|damaged")


def test_a_file_with_something_behind_it_is_refused(copy):
    copy.write_bytes(copy.read_bytes() + b"\0" * 8)
    refused(copy, "digest is another")


def test_other_files_are_refused(copy):
    copy.write_bytes(b"PK\x03\x04 this is a zip file")
    refused(copy, "no safetensors file")
    text = b'{"__metadata__":{"format":"pt"}}'
    copy.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(copy, "not written by save_codes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "in version 2 of its format; this release reads version 1"),
        ({"version": None}, "in version None"),
        ({"format": "models"}, "of the format 'models', expected 'codes'"),
        ({"codes": None}, "its header is wrong"),
        ({"codes": {"a": None}}, "its header is wrong"),
    ],
)
def test_wrong_headers_are_refused(copy, change, message):
    forge(copy, {**contents(copy)[0], **change})
    refused(copy, message)


def test_what_forge_writes_is_taken_if_nothing_is_changed(copy):
    forge(copy, contents(copy)[0])
    assert set(export.load_codes(copy).codes) == set(CODED)


def test_a_header_of_any_claimed_size_is_refused_before_it_is_read(copy):
    data = copy.read_bytes()
    for size in (len(data), 2**40, 2**63, 2**64 - 1):
        copy.write_bytes(size.to_bytes(8, "little") + data[8:])
        refused(copy, f"a header of {size} bytes")


HUGE = 2**40


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]},
        {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [HUGE, 0, HUGE], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
    ],
)
def test_tensors_larger_than_the_file_are_refused(copy, entry):
    forge(copy, {**contents(copy)[0], "codes": {}}, {}, {"w": entry})
    refused(copy, "damaged")


def change_code(path, change, name="block/conv/kernel"):
    header = contents(path)[0]
    change(header["codes"][name])
    forge(path, header)


@pytest.mark.parametrize(
    "change",
    [
        lambda code: code.update(shape=[HUGE, 6, 8]),
        lambda code: code["parts"]["mask"].__setitem__(1, [HUGE, 6, 8]),
        lambda code: code["parts"]["values"].update(shape=[HUGE, 6, 8]),
        lambda code: code["parts"]["values"]["parts"]["codes"].__setitem__(1, [HUGE, 1, 6, 8]),
        lambda code: code["parts"]["values"]["parts"]["codes"].__setitem__(1, [1, 6, 9]),
        lambda code: code["parts"]["values"]["parts"]["codes"].__setitem__(0, "float32"),
        lambda code: code["parts"]["values"]["parts"]["codes"].__setitem__(0, "object"),
        lambda code: code["parts"]["values"]["parts"].update(scale=["float32", [HUGE]]),
        lambda code: code["parts"]["values"]["bits"].update(codes=1),
        lambda code: code["parts"]["values"]["bits"].update(codes=0),
        lambda code: code["parts"]["values"]["bits"].update(codes=10**9),
        lambda code: code["parts"]["values"]["bits"].update(codes="4"),
        lambda code: code.update(shape=[1, 6, -8]),
        lambda code: code.update(shape=[1, 6, 8.0]),
        lambda code: code.update(axes=[[HUGE], [2], [0], 1]),
        lambda code: code.update(dtype="string"),
        lambda code: code.update(mask=["mask"]),
        lambda code: code.update(mask="values"),
        lambda code: code["parts"].update(more=["float32", [1]]),
        lambda code: code.pop("bits"),
        lambda code: code.pop("parts"),
        lambda code: code.update(counts={"values": -1}),
    ],
)
def test_codes_that_contradict_their_bytes_are_refused(copy, change):
    change_code(copy, change)
    refused(copy, "its header is wrong")


def test_planes_of_which_nothing_is_stored_are_refused(copy):
    """With an empty mask any number of planes would take no bytes at all."""
    header, tensors = contents(copy)
    code = header["codes"]["block/conv/kernel"]
    code["parts"]["values"]["parts"]["codes"][1] = [HUGE, 1, 6, 8]
    dtype, shape, content = tensors["block/conv/kernel:mask"]
    tensors["block/conv/kernel:mask"] = dtype, shape, bytes(len(content))
    tensors["block/conv/kernel:values:codes"] = "U8", [0], b""
    forge(copy, header, tensors)
    refused(copy, "at most 64 bytes of each")


def test_a_product_larger_than_its_factors_can_give_is_refused(copy):
    change_code(copy, lambda code: code.update(shape=[HUGE, HUGE]), "dense/kernel")
    refused(copy, "is said to have the shape")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor": {"class_name": "keras_compaware>MagnitudePruning", "config": {}}}, "wrong"),
        (
            {
                "compressor": {
                    "class_name": "keras_compaware>MagnitudePruning",
                    "config": {"sparsity": 0.5},
                }
            },
            "MagnitudePruning.* cannot decode the code of 'dense/kernel'",
        ),
    ],
)
def test_a_code_of_another_compressor_is_not_written_into_a_model(copy, fields, message):
    change_code(copy, lambda code: code.update(fields), "dense/kernel")
    model = network()
    before = arrays(model)
    with pytest.raises(ValueError, match=message):
        export.load_codes(copy, model)
    for old, new in zip(before, arrays(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_kernel_of_another_shape_is_not_handed_out():
    pruning = MagnitudePruning(0.5)
    code = dataclasses.replace(pruning.encode(np.eye(4, dtype="float32")), shape=(2, 8))
    saved = export.SavedCodes({"a": code}, {"a": pruning}, {})
    with pytest.raises(ValueError, match=r"decodes the code of 'a' to a kernel of .*\(4, 4\), not"):
        saved.kernel("a")


RAN = []


@keras.saving.register_keras_serializable(package="elsewhere")
@dataclasses.dataclass(frozen=True)
class Foreign(UniformQuantization):
    @classmethod
    def from_config(cls, config):
        RAN.append("from_config")
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_compaware", name="not_a_compressor")
def run_me(**kwargs):
    RAN.append(kwargs)


@pytest.mark.parametrize(
    "entry",
    [
        {"class_name": "elsewhere>Foreign", "config": {"bits": 4}},
        {"class_name": "keras_compaware>not_a_compressor", "config": {"a": 1}},
        {"class_name": "keras_compaware>Compressed", "config": {}},
        {"class_name": "keras_compaware>Rule", "config": {"where": None, "actions": []}},
        {"class_name": "LowRank", "config": {"rank": 1}},
        {"class_name": "Lambda", "module": "keras.layers", "config": {}, "registered_name": None},
        {"class_name": "system", "module": "os", "config": {"command": "true"}},
        {"class_name": "function", "module": "builtins", "config": "eval"},
        {"class_name": "__lambda__", "config": {"value": "4wEA"}},
        {"class_name": ["keras_compaware>LowRank"], "config": {"rank": 1}},
        {"class_name": "keras_compaware>LowRank", "config": {"rank": 1, "command": "true"}},
        {"class_name": "keras_compaware>LowRank", "config": {"rank": -1}},
        {
            "class_name": "keras_compaware>Chain",
            "config": {"compressors": [{"class_name": "elsewhere>Foreign", "config": {"bits": 4}}]},
        },
        {
            "class_name": "keras_compaware>LowRank",
            "config": {"rank": {"class_name": "system", "module": "os", "config": {}}},
        },
    ],
)
def test_only_compressors_of_the_package_are_made(copy, entry):
    RAN.clear()
    change_code(copy, lambda code: code.update(compressor=entry), "dense/kernel")
    refused(copy, "its header is wrong")
    assert RAN == []


def test_a_compressor_that_could_not_be_loaded_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="is not a compressor of keras_compaware"):
        export.save_codes(model, {"dense/kernel": Foreign(4)}, tmp_path / "codes")
    assert os.listdir(tmp_path) == []
    assert RAN == []
