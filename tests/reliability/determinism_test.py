"""A seed decides everything: two runs end with the same weights, bit for bit."""

import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_compaware as kc

EVERYTHING = {
    "low rank": kc.Every(3, kc.LowRank(ratio=0.5)),
    "rank by energy": kc.Every(3, kc.LowRank(energy=0.9)),
    "clustering": kc.Every(3, kc.WeightClustering(4)),
    "binary codes": kc.Every(3, kc.BinaryCodeQuantization(2)),
    "grid in the step": kc.Every(1, kc.UniformQuantization(4)),
    "held mask": kc.Every(3, kc.MagnitudePruning(0.5), end=9, ramp=kc.Ramp(0.0), hold=True),
    "noise": kc.Every(2, kc.WeightNoise(0.01)),
    "nuclear norm": kc.Proximal(kc.NuclearNorm(0.1), every=3),
    "lasso in the step": kc.Proximal(kc.GroupLasso(0.01)),
    "straight-through": kc.StraightThrough(kc.LowRank(ratio=0.5), every=3),
}


def trained(action):
    """Weights after twelve steps from a seed, with dropout and shuffling."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, name="head"),
        ]
    )
    recipe = kc.Recipe([kc.Rule("hidden", action)])
    model = recipe.wrap(model)
    model.compile(recipe.optimizer(keras.optimizers.Adam(0.01)), "mse")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(48, 12)), random.normal(size=(48, 3))
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=recipe.callbacks(model))
    return model.get_weights()


QUICK = ("low rank",) if keras.backend.backend() == "jax" else ("low rank", "noise", "held mask")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERYTHING],
)
def test_two_trainings_in_a_process(name):
    for one, other in zip(*(trained(EVERYTHING[name]) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_trainings_in_two_processes(tmp_path):
    """All of them, one after the other, in the opposite order in the second process."""
    code = """
    import sys
    import numpy as np
    from tests.reliability.determinism_test import EVERYTHING, trained
    names = list(EVERYTHING)[:: int(sys.argv[2])]
    found = {name: trained(EVERYTHING[name]) for name in names}
    np.savez(sys.argv[1], **{f"{k} {n}": w for k, v in found.items() for n, w in enumerate(v)})
    """
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for file, order in zip(files, (1, -1), strict=True):
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(file), str(order)],
            cwd=pathlib.Path(__file__).resolve().parents[2],
            env=dict(os.environ),
            check=True,
            timeout=600,
        )
    one, other = map(np.load, files)
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_the_number_of_workers_of_a_sweep(programs, write_sweep, tmp_path):
    """Three processes, and one, which runs all trials: the same records."""
    pytest.importorskip("tensorflow")
    from tests.reliability.interruption_test import results

    file = write_sweep()
    found = []
    for workers in (1, 3):
        path = tmp_path / str(workers)
        programs.succeeds("sweep", f"--config={file}", f"--workdir={path}", f"--workers={workers}")
        found.append(results(path))
    assert len(found[0]) == 12  # per seed: dense, two periods, three baselines
    assert found[0] == found[1]
