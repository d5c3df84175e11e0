"""Kernels and models at the edge of what makes sense: a sound result or a message, no crash."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

import keras_compaware as kc
from keras_compaware.kernels import find_targets
from tests.laws.helpers import array, eagerly
from tests.marks import slow_on_jax

ON_JAX = keras.backend.backend() == "jax"

COMPRESSORS = [
    kc.MagnitudePruning(0.5),
    kc.NMPruning(keep=2, block=4),
    kc.GroupPruning(0.5),
    kc.GroupPruning(0.5, axis="outputs"),
    kc.GroupPruning(0.5, block=(2, 2)),
    kc.LowRank(rank=1),
    kc.LowRank(energy=0.9),
    kc.LowRank(rank="vbmf"),
    kc.LowRank(ratio=0.5, split="spatial"),
    kc.LowRank(ratio=0.5, tile=4),
    kc.Tucker2(ratio=0.5),
    kc.Tucker2(energy=0.9),
    kc.UniformQuantization(4),
    kc.UniformQuantization(8, axis="outputs"),
    kc.BinaryCodeQuantization(2),
    kc.TernaryQuantization(axis="outputs"),
    kc.WeightClustering(4, rounds=2),
    kc.WeightClustering(4, axis="outputs", rounds=2),
    kc.Chain((kc.LowRank(ratio=0.5), kc.UniformQuantization(8))),
    kc.Chain((kc.MagnitudePruning(0.5), kc.UniformQuantization(4))),
]
PERTURBATIONS = [kc.WeightDecay(0.1), kc.WeightNoise(0.1)]
REGULARIZERS = [
    kc.L1(0.1),
    kc.GroupLasso(0.1),
    kc.GroupLasso(0.1, block=(2, 2)),
    kc.SparseGroupLasso(0.1, 0.1, axis="outputs"),
    kc.PartialGroupLasso(0.1),
    kc.PartialGroupLasso(0.1, mode="largest"),
    kc.PartialGroupLasso(0.1, mode="block"),
    kc.NuclearNorm(0.1),
    kc.TruncatedNuclearNorm(0.1, 1),
    kc.LowRankGroupSparsity(0.1, 0.1),
]
METHODS = [*COMPRESSORS, *PERTURBATIONS, *REGULARIZERS]

EMPTY = [(0,), (0, 0), (0, 5), (5, 0), (0, 3, 2), (3, 0, 2), (3, 2, 0), (3, 3, 0, 4), (3, 3, 4, 0)]
FEW = [(1, 1), (13, 11), (3, 3, 5, 7)]
MORE = [
    *((1,), (7,), (997,), (1, 7), (7, 1), (1, 997), (509, 3), (1, 1, 1), (5, 3, 7)),
    *((7, 1, 2), (1, 1, 7, 5), (2, 2, 1, 61), (5, 5, 1, 3), (127, 131)),
]


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


KERNELS = {
    "random": random,
    "zeros": lambda shape: np.zeros(shape, "float32"),
    "equal": lambda shape: np.full(shape, 0.3, "float32"),
    "tiny": lambda shape: random(shape) * np.float32(1e-30),
    "denormal": lambda shape: random(shape) * np.float32(1e-41),
    "large": lambda shape: random(shape) * np.float32(1e15),
    "huge": lambda shape: np.sign(random(shape)) * np.float32(1e38),
    "one large": lambda shape: np.where(np.arange(np.prod(shape)).reshape(shape), 1e-6, 1e6).astype(
        "float32"
    ),
    "float16": lambda shape: random(shape).astype("float16"),
    "float64": lambda shape: random(shape).astype("float64"),
}


def applied(method, w):
    """Everything that a method makes of a kernel, in the shape of the kernel."""
    if isinstance(method, kc.ProximalRegularizer):
        ops.convert_to_numpy(method(w))
        return [method.prox(w, 0.1)]
    if isinstance(method, kc.Compressor):
        code = method.encode(w)
        assert code.num_bits > 0
        return [method(w), method.decode(code)]
    return [method(w)]


def check(method, kind, shape):
    """The result is finite wherever the norm of the kernel is, in float32."""
    w = KERNELS[kind](shape)
    has_norm = np.linalg.norm(w.astype("float64")) < np.finfo("float32").max
    try:
        results = applied(method, w)
    except FloatingPointError:
        assert not has_norm
        return
    for result in results:
        assert tuple(result.shape) == shape
        assert result.dtype == ops.convert_to_tensor(w).dtype  # JAX has no float64 by default
        result = array(result)
        assert np.isfinite(result).all() or not has_norm, (kind, method)
        if kind == "zeros" and not isinstance(method, kc.WeightNoise):
            assert not result.any()


# All methods, each with some of the kinds; the slow tests have each with all, on more shapes.
@pytest.mark.parametrize("number", range(0, len(METHODS), 6 if ON_JAX else 1))
def test_kernels_of_every_kind(number):
    kinds = [kind for place, kind in enumerate(KERNELS) if (place + number) % 3 == 0]
    for kind in kinds:
        for shape in FEW if kind == "random" and not ON_JAX else FEW[1:2]:
            with eagerly():
                check(METHODS[number], kind, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*FEW, *MORE], ids=str)
def test_more_kernels_of_every_kind(shape):
    for method in METHODS:
        for kind in KERNELS:
            with eagerly():
                check(method, kind, shape)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_kernels_that_are_none(method):
    for shape in EMPTY:
        with pytest.raises(
            ValueError, match=r"(must have entries|largest possible rank 0).*eceived"
        ):
            applied(method, np.zeros(shape, "float32"))
    for w in (np.ones((4, 4), "int32"), np.ones((4, 4), bool), np.ones((4, 4), "complex64")):
        with pytest.raises(TypeError, match=r"must have a float dtype\. Received: "):
            applied(method, w)
    with pytest.raises(ValueError, match="axes of a kernel of 6 dimensions are not known"):
        applied(method, np.ones((1, 1, 1, 1, 2, 2), "float32"))


@slow_on_jax
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(METHODS),
    st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=1, max_size=4).map(tuple),
    st.integers(0, 2**31),
    st.sampled_from([1e-41, 1e-30, 1e-3, 1.0, 1e10, 1e18]),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_any_kernel(method, shape, seed, size, zeros):
    """Sparse, tiny and large kernels; whole channels may be zero."""
    w = random(shape, seed) * np.float32(size)
    w[np.random.default_rng(seed).uniform(size=shape) < zeros] = 0
    with eagerly():
        for result in applied(method, w):
            assert tuple(result.shape) == shape
            assert np.isfinite(array(result)).all()


# ---- NaN and infinity: found where weights are overwritten or stored


def network(kernel):
    """A model whose first layer has a kernel of this value."""
    *window, inputs, outputs = kernel.shape
    hidden = keras.layers.Dense(outputs, name="hidden")
    if window:
        hidden = keras.layers.Conv2D(outputs, window, padding="same", name="hidden")
    head = keras.layers.Dense(2, name="head")
    model = keras.Sequential([keras.Input((*window, inputs)), hidden, head])
    model.layers[0].kernel.assign(kernel)
    return model


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        pytest.param(
            number,
            kind,
            marks=[] if number % (12 if ON_JAX else 4) == place else pytest.mark.slow,
        )
        for number in range(len(COMPRESSORS))
        for place, kind in enumerate(("NaN", "infinity", "huge"))
    ],
)
def test_kernels_that_are_not_finite_are_not_compressed(number, kind):
    method = COMPRESSORS[number]
    shape = (3, 3, 5, 7) if isinstance(method, kc.Tucker2) else (13, 11)
    w = KERNELS["huge"](shape) if kind == "huge" else random(shape)
    if kind != "huge":
        w[..., 2, 2] = {"NaN": np.nan, "infinity": -np.inf}[kind]
    model = network(w)
    try:
        small = kc.compress(model, method)
    except FloatingPointError as error:
        message = str(error)
    else:
        assert kind == "huge"
        assert np.isfinite(array(small.layers[0].kernel)).all()
        return
    assert "'hidden/kernel'" in message
    assert "infinit" in message
    np.testing.assert_array_equal(array(model.layers[0].kernel), w)


@pytest.mark.parametrize(
    "action",
    [
        kc.Every(1, kc.LowRank(rank="vbmf")),
        pytest.param(kc.Every(1, kc.LowRank(energy=0.9)), marks=pytest.mark.slow),
        pytest.param(kc.Every(2, kc.WeightClustering(4)), marks=pytest.mark.slow),
        pytest.param(kc.Proximal(kc.NuclearNorm(0.1), every=2), marks=pytest.mark.slow),
        pytest.param(kc.AtEnd(kc.TernaryQuantization()), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_that_diverges_is_stopped(action):
    w = random((13, 11))
    w[5, 5] = np.nan
    model = network(w)
    recipe = kc.Recipe([kc.Rule("hidden", action)])
    model.compile(recipe.optimizer(keras.optimizers.SGD(0.1)), "mse")
    x, y = np.ones((8, 13), "float32"), np.ones((8, 2), "float32")
    with pytest.raises(
        FloatingPointError, match=r"'hidden/kernel' hold NaN or infinity at .* step"
    ):
        model.fit(x, y, batch_size=2, verbose=0, callbacks=recipe.callbacks(model))


def test_kernels_that_are_not_finite_are_not_stored_as_codes(tmp_path):
    w = random((13, 11))
    w[0, 0] = np.inf
    model, path = network(w), tmp_path / "codes.safetensors"
    with pytest.raises(ValueError, match="'hidden/kernel' holds NaN or infinity"):
        kc.export.save_codes(model, {"hidden/kernel": kc.UniformQuantization(4)}, path)
    assert not path.exists()
    kc.export.save_codes(model, None, path)  # bit for bit, whatever it is
    other = network(random((13, 11)))
    kc.export.load_codes(path, other)
    np.testing.assert_array_equal(array(other.layers[0].kernel), w)


# ---- models


def test_a_model_without_kernels():
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Flatten(), keras.layers.ReLU()])
    recipe = kc.Recipe([kc.Rule(".*", kc.Every(1, kc.MagnitudePruning(0.5)))])
    assert find_targets(model) == ([], [])
    for refuse in (recipe.plan, recipe.callbacks, lambda model: kc.compress(model, recipe)):
        with pytest.raises(ValueError, match=r"takes no kernel: .*: none"):
            refuse(model)
    assert kc.compact(model).rows == ()
    assert not kc.channel_spaces(model).free
    with pytest.raises(ValueError, match="the model has no channel space that may be cut"):
        kc.choose_channels(model, score="l2", budget={"macs": 0.5})
    assert kc.choose_ranks(model, budget={"params": 0.5}) == {}
    assert "0 -> 0" in str(kc.fit_budget(model, None, {"params": 0.5}))


def test_a_kernel_without_entries():
    inputs = keras.Input((4,)), keras.Input((0,))
    x = keras.layers.Dense(6, name="hidden")(inputs[0]) + keras.layers.Dense(6, name="empty")(
        inputs[1]
    )
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    targets, skipped = find_targets(model)
    assert [target.name for target in targets] == ["hidden/kernel", "head/kernel"]
    assert [(s.name, s.reason) for s in skipped] == [("empty/kernel", "it has no entries: (0, 6)")]
    small = kc.compress(model, kc.LowRank(rank=1))
    assert np.linalg.matrix_rank(array(small.get_layer("hidden").kernel)) == 1
    with pytest.raises(ValueError, match="it has no entries"):
        kc.Recipe([kc.Rule("empty", kc.AtEnd(kc.LowRank(rank=1)))]).plan(model)


def test_a_model_that_is_frozen():
    model = network(random((13, 11)))
    model.trainable = False
    for where in (".*", "hidden", keras.layers.Dense):
        recipe = kc.Recipe([kc.Rule(where, kc.AtEnd(kc.MagnitudePruning(0.5)))])
        with pytest.raises(ValueError, match="frozen"):
            kc.compress(model, recipe)
    before = [array(w) for w in model.weights]
    kc.compact(model)
    for one, other in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array(one), other)


@slow_on_jax
def test_a_layer_that_is_shared_is_compressed_once():
    shared = keras.layers.Dense(6, name="shared")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(shared(shared(inputs))))
    noise = kc.Recipe([kc.Rule("shared", kc.Every(1, kc.WeightDecay(0.5)))])
    assert [row.name for row in noise.plan(model).rows] == ["shared/kernel", "head/kernel"]
    before = array(shared.kernel)
    model.compile(noise.optimizer(keras.optimizers.SGD(0.0)), "mse")
    x = np.ones((2, 6), "float32"), np.ones((2, 2), "float32")
    model.fit(*x, verbose=0, callbacks=noise.callbacks(model))
    np.testing.assert_allclose(array(shared.kernel), 0.5 * before, rtol=1e-6)
    small = kc.compact(kc.compress(model, kc.LowRank(rank=1)))
    assert small.max_error < 1e-5


def test_a_variable_that_two_layers_share():
    class Tied(keras.layers.Dense):
        def build(self, input_shape):
            self._kernel = first.kernel
            self._bias = None
            self.built = True

        @property
        def kernel(self):
            return self._kernel

    first = keras.layers.Dense(6, use_bias=False, name="first")
    second = Tied(6, use_bias=False, name="second")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(second(first(inputs))))
    targets, _ = find_targets(model)
    assert len({id(target.variables[0]) for target in targets}) == len(targets)
