"""`--distribute`: what it refuses, how batches are shared, and what it trains."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")

from keras_compaware import data
from keras_compaware.cli import distribution
from keras_compaware.cli.config import resolve
from keras_compaware.cli.distribution import Shares, start
from keras_compaware.cli.program import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BACKEND = keras.backend.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="several processes train on JAX only")
distributes = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no such thing on PyTorch")

THREE = {"coordinator": "localhost:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"distribute": "model"}, {}, r"one of none, data\. Received: 'model'"),
        ({"num_devices": 0}, {}, r"num_devices must be an integer of at least 1.*Received: 0"),
        ({"num_devices": True}, {}, r"num_devices must be an integer.*Received: True"),
        ({"num_devices": 2}, {}, r"--num_devices: only with --distribute=data"),
        ({}, THREE, r"--coordinator, --num_processes, --process_id: only with"),
        ({"distribute": "data"}, {**THREE, "process_id": None}, r"give all of them"),
        ({"distribute": "data"}, {**THREE, "coordinator": "here"}, r"HOST:PORT.*Received: here"),
        ({"distribute": "data"}, {**THREE, "num_processes": 1}, r"at least 2\. Received: 1"),
        ({"distribute": "data"}, {**THREE, "process_id": 2}, r"from 0 to 1\. Received: 2"),
        (
            {"distribute": "data", "shrink": {"budget": {"macs": 0.5}}},
            THREE,
            r"config.shrink trains a smaller network further.*Leave --coordinator out",
        ),
        ({"distribute": "data", "compact_at_epoch": 1}, THREE, r"config.compact_at_epoch trains"),
    ],
)
def test_refused_on_every_backend(config, arguments, message):
    with pytest.raises(UserError, match=message):
        start(resolve(config), **arguments)


def test_the_program_takes_the_flags(programs, config, tmp_path):
    arguments = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    message = programs.fails(*arguments, "--num_devices=2")
    assert "--num_devices: only with --distribute=data" in message
    assert "--process_id" in programs.fails(*arguments, "--distribute=data", "--process_id=0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [None, "none"])
def test_one_device_is_the_default(kind):
    config = resolve({"distribute": kind})
    assert start(config) is distribution.ONE_DEVICE
    assert config == resolve({})  # the same run, and the same twin


@pytest.mark.skipif(BACKEND != "torch", reason="what the other backends can")
def test_pytorch_is_refused():
    with pytest.raises(UserError, match=r"one device only with PyTorch.*Received: torch"):
        start(resolve({"distribute": "data"}))


@pytest.mark.tensorflow
def test_several_workers_of_tensorflow_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"only on JAX.*docs/distribution.md"):
        start(resolve({"distribute": "data"}), **THREE)
    workers = ["localhost:1", "localhost:2"]
    for cluster in ({"worker": workers}, {"chief": workers[:1], "worker": workers[1:]}):
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster}))
        with pytest.raises(UserError, match=r"names 2 workers.*docs/distribution.md"):
            start(resolve({"distribute": "data"}))


@distributes
def test_the_batch_has_to_be_a_multiple_of_the_devices(monkeypatch):
    three = distribution.Devices(number=3)
    monkeypatch.setitem(distribution._START, BACKEND, lambda *_: three)
    with pytest.raises(UserError, match=r"multiple of their number, 3, for example 63.*: 64"):
        start(resolve({"distribute": "data", "batch_size": 64}))
    config = resolve({"distribute": "data", "batch_size": 63})
    assert start(config) is three
    assert config["num_devices"] == 3  # written to config.json, part of the twin's fingerprint


@distributes
def test_more_devices_than_there_are(monkeypatch):
    with pytest.raises(UserError, match=r"--num_devices=3: there are only 2, a, b"):
        distribution._chosen(["a", "b"], 3)
    assert distribution._chosen(["a", "b"], 1) == ["a"]
    assert distribution._chosen(["a", "b"], None) == ["a", "b"]


@pytest.mark.parametrize(("examples", "devices"), [(22, 2), (23, 4), (9, 4), (8, 4)])
def test_the_shares_of_all_processes_are_the_batches(examples, devices):
    images = np.arange(examples, dtype="uint8")[:, None, None, None]
    whole = data.batches(data.Split(images, np.arange(examples)), 8, seed=1)
    parts = [Shares(whole, devices, process, 2) for process in range(2)]
    usable = distribution.Devices(number=devices).usable(examples)
    assert usable % devices == 0 <= examples - usable < devices
    labels = []
    for index in range(len(parts[0])):
        shares = [part[index] for part in parts]
        assert len({len(labels) for _, labels in shares}) == 1
        for i, array in enumerate(whole[index]):
            joined = np.concatenate([share[i] for share in shares])
            np.testing.assert_array_equal(joined, array[: len(joined)])
            assert len(array) - len(joined) < devices
        labels += [label for _, own in shares for label in own]
    assert len(labels) == len(set(labels)) == usable


# ---- trainings: in processes of their own, for devices are made before a backend starts ---------

TRAININGS = """
import json, pathlib, sys
import keras
import numpy as np
from keras_compaware.cli import distribution, workdir
from keras_compaware.cli.config import resolve
from keras_compaware.cli.experiment import Experiment

rank = {"where": "dense1", "every": 13, "compressor": "LowRank", "rank": 4}
held = {"where": "dense2", "every": 13, "compressor": "MagnitudePruning", "sparsity": 0.5,
        "hold": True}
coded = {**held, "at_end": {"compressor": "UniformQuantization", "bits": 4}}
wrapped = {"where": "head", "action": "StraightThrough", "compressor": "UniformQuantization",
           "bits": 8}
base = {"data": {"name": "digits", "validation": 0.101},  # 810 examples: an even number
        "model": "lenet_300_100", "model_args": {"units": [32, 16]}, "batch_size": 64,
        "optimizer": {"name": "sgd", "learning_rate": 0.1}, "recalibrate_steps": 0,
        "rules": {"rank": rank, "held": held}}
folder = pathlib.Path(sys.argv[1])
shared = resolve({**base, "distribute": "data", "num_devices": 2, "epochs": 1})
devices = distribution.start(shared)
assert (devices.number, devices.processes) == (2, 1)

def train(name, config, devices=distribution.ONE_DEVICE):
    place = workdir.Workdir(folder / name)
    place.path.mkdir(exist_ok=True)
    model, checkpoint = Experiment(config, sys.argv[2], devices).train(place)
    assert keras.distribution.distribution() is None
    return model, checkpoint

def weights(model):
    return [*model.get_weights(), *map(keras.ops.convert_to_numpy, model.optimizer.variables)]

def same(one, other, **tolerance):
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)

# Sums over a batch are made in another order; through the first firing nothing else differs.
alone, _ = train("alone", resolve({**base, "epochs": 1}))
both, checkpoint = train("both", shared, devices)
same(both, alone, rtol=0, atol=1e-5)
assert [row["step"] for row in checkpoint.all_firings()] == [13, 13]

# Interrupted after an epoch and resumed: as if nothing had happened.
shared |= {"epochs": 2, "rules": {"rank": rank, "held": coded, "wrapped": wrapped}}
whole, checkpoint = train("whole", shared, devices)
class Stop(Exception): pass
old = workdir.Checkpoint.on_epoch_begin
def stop(self, epoch, logs=None):
    if epoch == 1:
        raise Stop
    old(self, epoch, logs)
workdir.Checkpoint.on_epoch_begin = stop
try:
    train("broken", shared, devices)
except Stop:
    assert keras.distribution.distribution() is None
workdir.Checkpoint.on_epoch_begin = old
resumed, again = train("broken", shared, devices)
same(resumed, whole, rtol=0, atol=0)
assert [row["step"] for row in again.all_firings()] == [13, 26, 26]

# The model that comes back is that of one device, with what training has left of it.
x = np.zeros((1, 8, 8, 1), "float32")
both(x), alone(x), whole(x), whole.predict(x, verbose=0)
assert set(checkpoint.codes) == {"dense2/kernel"}
decoded = checkpoint.compressors["dense2/kernel"].decode(checkpoint.codes["dense2/kernel"])
kernel = keras.ops.convert_to_numpy(whole.get_layer("dense2").kernel)
np.testing.assert_array_equal(keras.ops.convert_to_numpy(decoded), kernel)
assert np.sum(kernel == 0) >= 32 * 16 // 2
"""


def environment(programs, **more):
    return {**os.environ, **programs.environment, "KERAS_BACKEND": BACKEND, **more}


@distributes
@pytest.mark.slow
def test_two_devices_train_as_one_and_go_on(programs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAININGS, str(tmp_path), programs.environment["TFDS_DATA_DIR"]],
        cwd=ROOT, env=environment(programs), capture_output=True, text=True, check=False,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@distributes
@pytest.mark.slow
def test_the_program_on_two_devices(programs, write_config, tmp_path):
    file = write_config("config.compact_at_epoch = 2")
    arguments = (f"--config={file}", f"--workdir={tmp_path}", "--distribute=data")
    outcome = programs.process("train", *arguments, "--num_devices=2", timeout=400)
    assert outcome.status == 0, str(outcome)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["distribute"] == "data"
    assert report["config"]["num_devices"] == 2
    assert report["compact"]["agreement"] > 0.99
    assert report["compact"]["early"]["epoch"] == 2
    assert report["compact"]["parameters"] < report["dense"]["parameters"]
    twins = pathlib.Path(programs.environment["KERAS_COMPAWARE_CACHE"]) / "dense_twins"
    found = [json.loads(file.read_text()) for file in twins.glob("*/config.json")]
    assert [twin["num_devices"] for twin in found if twin["distribute"] == "data"] == [2]


@on_jax
@pytest.mark.slow
def test_the_program_in_two_processes(programs, config, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*more):
        workers = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "apps.train", f"--config={config}"),
                    *(f"--workdir={tmp_path}", "--distribute=data", "--num_processes=2"),
                    *(f"--coordinator=127.0.0.1:{port}", f"--process_id={rank}", *more),
                ],
                cwd=ROOT,
                env=environment(programs, JAX_PLATFORMS="cpu"),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            return [(*worker.communicate(timeout=400), worker.returncode) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

    (out, err, status), (quiet, other_err, other) = run()
    assert (status, other) == (0, 0), err[-2000:] + other_err[-2000:]
    assert "written to" in out
    assert all(line.startswith("[Gloo]") for line in quiet.splitlines()), quiet
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["num_devices"] == 2
    assert [row["step"] for row in report["compact"]["firings"]][:2] == [5, 10]

    # One that is refused ends the others instead of leaving them to wait.
    (_, err, status), (_, _, other) = run()
    assert "holds a finished run" in err
    assert status == 1
    assert other != 0
