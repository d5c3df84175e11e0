"""Every way in which Keras runs a training step, with all that acts in it and around it at once.

A pairwise covering array is run fast, the full product is left to the slow tests.
"""

import itertools

import keras
import numpy as np
import pytest

from keras_compaware import (
    Every,
    GroupLasso,
    LowRank,
    MagnitudePruning,
    Proximal,
    Recipe,
    Rule,
    StraightThrough,
    UniformQuantization,
)

BACKEND = keras.backend.backend()
VALUES = {
    "dtype": ("float32", "mixed_float16", "mixed_bfloat16"),
    "jit": (False, True),
    "together": (1, 4),
    "accumulation": (1, 2),
    "ema": (False, True),
}
PRODUCT = tuple(itertools.product(*VALUES.values()))
# Every pair of values of any two columns is in some row.
PAIRWISE = (
    ("float32", False, 1, 1, False),
    ("float32", True, 4, 2, True),
    ("mixed_float16", False, 4, 2, False),
    ("mixed_float16", True, 1, 1, True),
    ("mixed_bfloat16", False, 4, 1, True),
    ("mixed_bfloat16", True, 1, 2, False),
)
BATCH, UPDATES, EVERY = 4, 8, 4


# What is compiled takes minutes on PyTorch, what is not on JAX.
FAST = {
    "tensorflow": PAIRWISE,
    "jax": tuple((dtype, True, *rest) for dtype, _, *rest in PAIRWISE),
    "torch": tuple((dtype, False, 1, *rest) for dtype, _, _, *rest in PAIRWISE),
}[BACKEND]


def missing_pairs(rows):
    pairs = lambda row: set(itertools.combinations(enumerate(row), 2))  # noqa: E731
    return set().union(*map(pairs, PRODUCT)) - set().union(*map(pairs, rows))


def test_the_rows_cover_all_pairs():
    assert not missing_pairs(PAIRWISE)
    assert missing_pairs(PAIRWISE[:-1])


def recipe():
    return Recipe(
        [
            Rule("conv", Every(EVERY, LowRank(rank=2))),
            Rule("shrunk", Proximal(GroupLasso(0.3))),
            Rule("pruned", Every(EVERY, MagnitudePruning(0.75), hold=True)),
            Rule("wrapped", StraightThrough(UniformQuantization(3))),
            Rule("head", Every(1, UniformQuantization(4))),
        ]
    )


def network(dtype):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, use_bias=False, dtype=dtype, name="conv"),
            layers.BatchNormalization(dtype=dtype, name="norm"),
            layers.Flatten(),
            layers.Dense(12, activation="tanh", dtype=dtype, name="shrunk"),
            layers.Dense(8, activation="tanh", dtype=dtype, name="pruned"),
            layers.Dense(8, activation="tanh", dtype=dtype, name="wrapped"),
            layers.Dense(3, dtype="float32", name="head"),
        ]
    )


class Watch(keras.callbacks.Callback):
    """Looks at the held zeros after each batch; comes before the compression."""

    def __init__(self):
        super().__init__()
        self.zeros = []

    def on_train_batch_end(self, batch, logs=None):
        kernel = self.model.get_layer("pruned").kernel
        self.zeros.append(int(np.sum(keras.ops.convert_to_numpy(kernel) == 0)))


def train(dtype, jit, together, accumulation, ema):
    plan = recipe()
    model = plan.wrap(network(dtype))
    shrunk = model.get_layer("shrunk").kernel
    shrunk.assign(shrunk * np.where(np.arange(64) < 20, 1e-3, 1.0)[:, None])  # so that some die
    inner = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.05, 8 * UPDATES),
        momentum=0.5,
        gradient_accumulation_steps=accumulation if accumulation > 1 else None,
        use_ema=ema,
        ema_momentum=0.5,
    )
    optimizer = plan.optimizer(inner)
    if dtype == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**8)
    model.compile(optimizer, "mse", jit_compile=jit, steps_per_execution=together)
    random = np.random.default_rng(0)
    number = BATCH * UPDATES * accumulation
    x = random.normal(size=(number, 6, 6, 2)).astype("float32")
    y = random.normal(size=(number, 3)).astype("float32")
    callbacks, watch = plan.callbacks(model), Watch()
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[watch, *callbacks])
    return model, callbacks[0], watch


def kernels(model):
    names = ("conv", "shrunk", "pruned", "head")
    found = {name: model.get_layer(name).kernel for name in names}
    found["wrapped"] = model.get_layer("wrapped").layer.kernel
    return {name: keras.ops.convert_to_numpy(kernel) for name, kernel in found.items()}


_reference = {}


@pytest.mark.parametrize(
    ("dtype", "jit", "together", "accumulation", "ema"),
    [
        pytest.param(
            *row, marks=[] if row in FAST else pytest.mark.slow, id="-".join(map(str, row))
        )
        for row in PRODUCT
    ],
)
def test_training(dtype, jit, together, accumulation, ema):
    if BACKEND == "torch" and together > 1:
        pytest.skip("Keras refuses steps_per_execution > 1 on PyTorch")
    model, callback, watch = train(dtype, jit, together, accumulation, ema)
    assert int(model.optimizer.iterations) == UPDATES
    assert [firing.step for firing in callback.firings if not firing.final] == [4, 8]
    found = kernels(model)
    assert all(np.all(np.isfinite(kernel)) for kernel in found.values())
    assert np.linalg.matrix_rank(found["conv"].reshape(-1, 4), tol=1e-5) == 2
    dead = np.all(found["shrunk"] == 0, axis=1)
    assert 0 < dead.sum() < 64
    assert np.sum(found["pruned"] == 0) == 72
    # Held from the first firing, after 4 updates, on: `watch` has looked before it.
    looks = 4 * accumulation // together
    assert watch.zeros[:looks] == [0] * looks
    assert set(watch.zeros[looks:]) == {72}
    assert len(np.unique(found["wrapped"])) <= 7
    assert len(np.unique(found["head"])) <= 15
    if dtype == "float32":  # compiled or not, one step or several at once: the same training
        key = (accumulation, ema)
        if key not in _reference:
            other = train(dtype, BACKEND == "jax", 1, accumulation, ema)
            _reference[key] = kernels(other[0])
        for name, kernel in found.items():
            np.testing.assert_allclose(kernel, _reference[key][name], atol=1e-4, err_msg=name)
