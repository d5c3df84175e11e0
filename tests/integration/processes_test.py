"""Data parallel training in two processes, which talk over the loopback device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

JAX_WORKER = """
import os
import sys

import jax

rank, size, port = map(int, sys.argv[1:])
jax.config.update("jax_enable_x64", True)
if size > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=size, process_id=rank)

import keras
import numpy as np
import keras_compaware as kc

keras.config.set_floatx("float64")
keras.utils.set_random_seed(0)
if size > 1:
    assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
    data_parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(data_parallel)

names = ("shrunk", "pruned", "thin", "coded")
dense = [keras.layers.Dense(8, activation="tanh", name=name) for name in names]
model = keras.Sequential([keras.Input((6,)), *dense, keras.layers.Dense(2, name="head")])
recipe = kc.Recipe([
    kc.Rule("shrunk", kc.Proximal(kc.GroupLasso(0.05))),
    kc.Rule("pruned", kc.Every(3, kc.MagnitudePruning(0.75), hold=True)),
    kc.Rule("thin", kc.Every(3, kc.LowRank(rank=2))),
    kc.Rule("coded", kc.Every(3, kc.WeightClustering(4))),
    kc.Rule("head", kc.Every(3, kc.UniformQuantization(4))),
])
model.compile(recipe.optimizer(keras.optimizers.SGD(0.05, momentum=0.5)), "mse")
(compression,) = recipe.callbacks(model)
found = {}

def note(moment):
    for layer in model.layers:
        for variable in layer.weights:
            value = keras.ops.convert_to_numpy(variable)
            found[f"{moment} {layer.name} {variable.name}"] = value

class Note(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        model = self.model  # moves the state into the variables
        if batch in (2, 5):
            assert compression.firings[-1].step == batch + 1
            note(batch + 1)

random = np.random.default_rng(0)
x, y = random.normal(size=(64, 6)), random.normal(size=(64, 2))
own = np.arange(64).reshape(8, size, 8 // size)[:, rank].ravel()  # a part of each batch
model.fit(
    x[own], y[own], batch_size=8 // size, epochs=1, shuffle=False, verbose=0,
    callbacks=[compression, Note()],
)
assert [firing.step for firing in compression.firings] == [3, 6, 8]
note("end")
assert not os.listdir()  # training writes nothing by itself

np.savez(f"../weights-{rank}-of-{size}.npz", **found)
if size > 1 and jax.process_index() == 0:
    keras.distribution.set_distribution(None)  # from here on this worker acts alone
    own = keras.models.clone_model(model)
    own.set_weights(model.get_weights())
    small = kc.compact(own).model
    small.save("compact.keras")
    kc.export.save_codes(own, recipe, "codes.safetensors")
"""


MODEL_PARALLEL_WORKER = """
import sys

import jax

rank, size, port = map(int, sys.argv[1:])
jax.config.update("jax_enable_x64", True)
if size > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=size, process_id=rank)

import keras
import numpy as np
from jax.experimental import multihost_utils
import keras_compaware as kc

keras.config.set_floatx("float64")
keras.utils.set_random_seed(0)
if size > 1:
    mesh = keras.distribution.DeviceMesh(
        (1, 2), ("batch", "model"), keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*(thin|coded)/kernel"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    )

names = ("thin", "coded", "pruned", "head")
dense = [keras.layers.Dense(8, activation="tanh", name=name) for name in names]
model = keras.Sequential([keras.Input((6,)), *dense])
before = keras.tree.map_structure(lambda v: v.value, model.variables)
recipe = kc.Recipe([
    kc.Rule("thin", kc.StraightThrough(kc.LowRank(rank=2), every=3)),
    kc.Rule("coded", kc.StraightThrough(kc.UniformQuantization(4))),
    kc.Rule("pruned", kc.Every(3, kc.MagnitudePruning(0.75), hold=True)),
])
wrapped = recipe.wrap(model)
if size > 1:
    kernel = wrapped.get_layer("thin").layer.kernel
    assert kernel.value.addressable_shards[0].data.shape == (6, 4)
wrapped.compile(recipe.optimizer(keras.optimizers.SGD(0.05, momentum=0.5)), "mse")
random = np.random.default_rng(0)
x, y = random.normal(size=(64, 6)), random.normal(size=(64, 8))
wrapped.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0,
            callbacks=recipe.callbacks(wrapped))

def whole(variable):
    value = variable.value
    return np.array(multihost_utils.process_allgather(value, tiled=True) if size > 1 else value)

found = {v.path: whole(v) for v in wrapped.variables}
for variable, value in zip(model.variables, before, strict=True):  # the model was copied
    found[f"untrained {variable.path}"] = whole(variable)
    assert variable.value is value and not value.is_deleted()
np.savez(f"../weights-{rank}-of-{size}.npz", **found)
"""


TENSORFLOW_WORKER = """
import sys

import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()  # reads TF_CONFIG

import keras
import numpy as np
import keras_compaware as kc

keras.utils.set_random_seed(0)
rank = int(sys.argv[1])
recipe = kc.Recipe([
    kc.Rule("thin", kc.Every(3, kc.LowRank(rank=2))),
    kc.Rule("pruned", kc.Every(3, kc.MagnitudePruning(0.75), hold=True)),
])
with strategy.scope():
    dense = [keras.layers.Dense(8, name=name) for name in ("thin", "pruned")]
    model = keras.Sequential([keras.Input((6,)), *dense, keras.layers.Dense(2, name="head")])
    optimizer = recipe.optimizer(keras.optimizers.SGD(0.05))
    model.compile(optimizer, "mse")
    (compression,) = recipe.callbacks(model)
    optimizer.build(model.trainable_variables)
random = np.random.default_rng(0)
x = random.normal(size=(64, 6)).astype("float32")
y = random.normal(size=(64, 2)).astype("float32")

try:
    model.fit(x, y, batch_size=8, verbose=0)
except ValueError as error:  # in Keras, and before any callback is asked
    assert "PerReplica" in str(error), error
else:
    raise AssertionError("fit works under this strategy now: docs/distribution.md says it fails")

@tf.function
def step(inputs, outputs):
    def on_replica(inputs, outputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(inputs, training=True) - outputs)) / (8 * 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # adds up those of all workers
    strategy.run(on_replica, (inputs, outputs))

for n, own in enumerate(np.arange(64).reshape(8, 2, 4)[:, rank], 1):
    step(tf.constant(x[own]), tf.constant(y[own]))
    compression.step(model, n)
    if n >= 3:  # held in the steps between two firings as well
        assert np.sum(keras.ops.convert_to_numpy(dense[1].kernel) == 0) == 48, n
compression.finish(model)
assert [firing.step for firing in compression.firings] == [3, 6, 8]
found = {layer.name: keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers}
np.savez(f"../weights-{rank}-of-2.npz", **found)
"""


def start(folder, rank, size, port, worker=JAX_WORKER, **more):
    place = folder / f"worker-{rank}-of-{size}"
    place.mkdir()
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": str(ROOT),
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-c", worker, str(rank), str(size), str(port)],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(folder, workers):
    """Waits for processes; returns the weights that each worker of two has written."""
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=400)
            assert worker.returncode == 0, output[-3000:]
    finally:
        for worker in workers:  # one that waits for another that has failed
            worker.kill()
            worker.wait()
    return [dict(np.load(folder / f"weights-{rank}-of-2.npz")) for rank in range(2)]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="jax.distributed is JAX's")
def test_two_processes_train_as_one(tmp_path):
    port = free_port()
    workers = [start(tmp_path, rank, size, port) for rank, size in [(0, 1), (0, 2), (1, 2)]]
    first, second = results(tmp_path, workers)
    alone = dict(np.load(tmp_path / "weights-0-of-1.npz"))
    assert len(alone) == 3 * 10
    for name, weights in first.items():
        np.testing.assert_array_equal(weights, second[name], err_msg=name)
    for name in filter(lambda name: name.startswith("3 "), alone):
        np.testing.assert_allclose(first[name], alone[name], rtol=0, atol=1e-9, err_msg=name)
    for moment in ("3", "6", "end"):
        kernel = {name: first[f"{moment} {name} kernel"] for name in ("pruned", "thin", "coded")}
        assert np.sum(kernel["pruned"] == 0) == 48
        assert np.linalg.matrix_rank(kernel["thin"], tol=1e-6) == 2
        assert len(np.unique(kernel["coded"])) <= 4
    assert all(np.any(first[f"3 {name} bias"] != 0) for name in ("shrunk", "head"))

    files = {
        place.name: sorted(file.name for file in place.iterdir())
        for place in tmp_path.glob("worker-*")
    }
    assert files == {
        "worker-0-of-1": [],
        "worker-0-of-2": ["codes.safetensors", "compact.keras"],
        "worker-1-of-2": [],
    }


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="ModelParallel is JAX's")
def test_two_processes_that_hold_parts_of_the_kernels(tmp_path):
    port = free_port()
    workers = [
        start(tmp_path, rank, size, port, MODEL_PARALLEL_WORKER)
        for rank, size in [(0, 1), (0, 2), (1, 2)]
    ]
    first, second = results(tmp_path, workers)
    alone = dict(np.load(tmp_path / "weights-0-of-1.npz"))
    assert set(alone) == set(first)
    for name, weights in alone.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        # Not closer: what is compressed is computed in float32.
        np.testing.assert_allclose(first[name], weights, rtol=0, atol=1e-6, err_msg=name)
    (thin,) = (value for name, value in first.items() if name.endswith("thin/kernel")
               and not name.startswith("untrained"))  # fmt: skip
    assert np.linalg.matrix_rank(thin, tol=1e-6) == 2


@pytest.mark.tensorflow
def test_a_custom_loop_under_a_strategy_of_several_workers(tmp_path):
    hosts = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    workers = []
    for rank in range(2):
        task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
        config = json.dumps(task)
        workers.append(start(tmp_path, rank, 2, 0, TENSORFLOW_WORKER, TF_CONFIG=config))
    first, second = results(tmp_path, workers)
    for name, kernel in first.items():
        np.testing.assert_array_equal(kernel, second[name], err_msg=name)
    assert np.linalg.matrix_rank(first["thin"], tol=1e-5) == 2
    assert np.sum(first["pruned"] == 0) == 48
