"""The whole way of the core: train, compact, save, load where the package does not exist."""

import json
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_compaware import (
    AtEnd,
    Every,
    LowRank,
    MagnitudePruning,
    NuclearNorm,
    OccasionalCompression,
    PartialGroupLasso,
    Penalty,
    Proximal,
    Recipe,
    Rule,
    Skip,
    StraightThrough,
    UniformQuantization,
    compact,
    recalibrate_batch_norm,
)
from keras_compaware.measure import macs, parameters

LOAD = """
    import json, sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "keras_compaware":
                raise ImportError("keras_compaware is not here")

    sys.meta_path.insert(0, Block())
    import keras, numpy as np

    model = keras.models.load_model(sys.argv[1])
    outputs = model.predict(np.load(sys.argv[2]), verbose=0)
    np.save(sys.argv[3], outputs)
    print(json.dumps({
        "ours": sorted(name for name in sys.modules if name.startswith("keras_compaware")),
        "compiled": model.compiled,
    }))
"""


def problem(number=96):
    """Images whose class is the quadrant of a bright spot."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, number)
    x = 0.3 * generator.normal(size=(number, 8, 8, 3))
    for image, label in zip(x, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 1.0
    return x.astype("float32"), labels


def network():
    keras.utils.set_random_seed(0)
    block = keras.Sequential(
        [
            keras.Input((8, 8, 8)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(name="relu"),
        ],
        name="block",
    )
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(inputs)
    x = keras.layers.MaxPooling2D(name="pool")(block(x))
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(32, activation="relu", name="hidden")(x)
    x = keras.layers.Dropout(0.1, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="head")(x), name="net")


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def fit(model, callbacks):
    x, labels = problem()
    return model.fit(x, labels, batch_size=16, epochs=6, callbacks=callbacks, verbose=0)


def accuracy(model):
    return model.evaluate(*problem(), verbose=0)[1]


RECIPE = Recipe(
    [
        Rule("stem", StraightThrough(UniformQuantization(6))),
        Rule("block/conv", Every(5, LowRank(rank=3))),
        Rule("hidden", Proximal(NuclearNorm(0.3), every=4), AtEnd(LowRank(rank=4))),
        Rule("head", Skip()),
    ],
    strict=True,
)


def test_train_compact_save_load(tmp_path):
    model = compiled(RECIPE.wrap(network()))
    x, _ = problem()
    fit(model, RECIPE.callbacks(model))
    recalibrate_batch_norm(model, x)
    assert accuracy(model) > 0.9  # of four classes

    result = compact(model)
    small = result.model
    notes = {row.name: row.note for row in result.rows}
    assert notes["conv"] == "rank 3 of 16, channel split"
    assert notes["hidden"] == "rank 4 of 32"
    assert notes["head"].startswith("as it is")
    assert parameters(small) < 0.3 * parameters(model)
    assert macs(small) < 0.6 * macs(model)
    stem = keras.ops.convert_to_numpy(small.get_layer("stem").kernel)
    assert len(np.unique(stem)) <= 63
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(small.predict(x, verbose=0), expected, atol=1e-3, rtol=1e-4)

    paths = [tmp_path / name for name in ("small.keras", "x.npy", "y.npy", "load.py")]
    small.save(paths[0])
    np.save(paths[1], x)
    paths[3].write_text(textwrap.dedent(LOAD))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", paths[3], *paths[:3]],
        env={**environment, "KERAS_BACKEND": keras.backend.backend()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"ours": [], "compiled": True}
    np.testing.assert_allclose(np.load(paths[2]), small.predict(x, verbose=0), atol=1e-5)


def test_the_block_that_hides_the_package_does():
    code = textwrap.dedent(LOAD).split("import keras,")[0] + "import keras_compaware"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "keras_compaware is not here" in run.stderr


def test_one_line(tmp_path):
    """Occasional compression as a callback, with validation and a checkpoint of the best."""
    model = compiled(network())
    path = tmp_path / "best.keras"
    callback = OccasionalCompression(LowRank(ratio=0.3), every=6)
    best = keras.callbacks.ModelCheckpoint(str(path), "loss", save_best_only=True)
    fit(model, [callback, best])
    loaded = keras.models.load_model(path)
    sizes = {row.name: (row.before, row.after) for row in compact(loaded).rows}
    assert sizes["conv"][1] <= 0.3 * sizes["conv"][0]
    assert sizes["head"][0] == sizes["head"][1]
    assert [firing.step for firing in callback.firings] == [6, 12, 18, 24, 30, 36, 36]


def test_a_wrapped_model_goes_on_after_saving(tmp_path):
    model = compiled(RECIPE.wrap(network()))
    fit(model, RECIPE.callbacks(model))
    model.save(tmp_path / "wrapped.keras")
    loaded = keras.models.load_model(tmp_path / "wrapped.keras")
    fit(loaded, RECIPE.callbacks(loaded))
    assert accuracy(loaded) > 0.9
    assert parameters(compact(loaded).model) < 0.3 * parameters(loaded)


def test_regularizers_and_penalties_leave_no_trace(tmp_path):
    recipe = Recipe(
        [
            Rule("hidden", Penalty(PartialGroupLasso(1e-3)), AtEnd(MagnitudePruning(0.5))),
            Rule("stem", Every(3, keras.constraints.MaxNorm(2.0))),
        ]
    )
    model = compiled(recipe.wrap(network()))
    fit(model, recipe.callbacks(model))
    small = compact(model).model
    assert "keras_compaware" in model.to_json()
    assert "keras_compaware" not in small.to_json()
    assert "keras_compaware" not in json.dumps(small.get_compile_config())
    w = keras.ops.convert_to_numpy(small.get_layer("hidden").kernel)
    assert np.mean(w == 0) == pytest.approx(0.5, abs=1e-3)
