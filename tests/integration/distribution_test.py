"""Data parallel training on several devices of one machine; each test in a process of its own.

Devices have to be made before a backend starts, hence the processes.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BACKEND = keras.backend.backend()

COMMON = """
import keras
import numpy as np
import keras_compaware as kc

def recipe():
    return kc.Recipe([
        kc.Rule("shrunk", kc.Proximal(kc.GroupLasso(0.5))),
        kc.Rule("pruned", kc.Every(3, kc.MagnitudePruning(0.75), hold=True)),
        kc.Rule("masked", kc.Every(1, kc.MagnitudePruning(0.5), hold=True)),
        kc.Rule("thin", kc.Every(3, kc.LowRank(rank=2))),
        kc.Rule("coded", kc.Every(3, kc.WeightClustering(4))),
        kc.Rule("head", kc.Every(1, kc.UniformQuantization(4))),
    ])

def network():
    keras.utils.set_random_seed(0)
    names = ("shrunk", "pruned", "masked", "thin", "coded")
    dense = [keras.layers.Dense(8, activation="tanh", name=name) for name in names]
    return keras.Sequential([keras.Input((6,)), *dense, keras.layers.Dense(2, name="head")])

def train(model):
    plan = recipe()
    model.compile(plan.optimizer(keras.optimizers.SGD(0.05, momentum=0.5)), "mse")
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 6)).astype("float32")
    y = random.normal(size=(64, 2)).astype("float32")
    callbacks = plan.callbacks(model)
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    assert [f.step for f in callbacks[0].firings] == [3, 6, 8]
    return model, {layer.name: keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers}

def check(found, alone):
    assert np.sum(found["pruned"] == 0) == 48
    assert np.sum(found["masked"] == 0) == 32
    assert np.linalg.matrix_rank(found["thin"], tol=1e-5) == 2
    assert len(np.unique(found["coded"])) <= 4
    assert len(np.unique(found["head"])) <= 15
    for name, kernel in found.items():  # sums over a batch are made in another order
        np.testing.assert_allclose(kernel, alone[name], atol=1e-4, err_msg=name)
"""

MIRRORED = """
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
_, alone = train(network())
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = network()
    model, found = train(model)
check(found, alone)
for variable in (*model.variables, *model.optimizer.variables):
    copies = strategy.experimental_local_results(variable.value)
    assert len(copies) == 2
    np.testing.assert_array_equal(copies[0].numpy(), copies[1].numpy(), err_msg=variable.path)
"""

SHARDED = """
import jax

assert len(jax.devices()) == 2
_, alone = train(network())
keras.distribution.set_distribution(keras.distribution.DataParallel())
model, found = train(network())
check(found, alone)
for variable in model.variables:
    copies = [np.array(shard.data) for shard in variable.value.addressable_shards]
    assert len(copies) == 2
    np.testing.assert_array_equal(copies[0], copies[1], err_msg=variable.path)
"""


def run(script, **environment):
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, **environment}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.tensorflow
def test_mirrored_strategy_on_two_devices():
    run(MIRRORED)


@pytest.mark.skipif(BACKEND != "jax", reason="DataParallel over host devices is JAX's")
def test_data_parallel_on_two_devices():
    run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
