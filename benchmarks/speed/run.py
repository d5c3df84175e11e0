"""What compression in training costs: time of steps, of decompositions, memory, recompilations.

Four parts, on the backend that Keras runs; the results of the backends stand side by side:

    steps           training of a small convolutional network with what acts every N steps
    decompositions  one low-rank approximation by itself: warm, cold and by `keras.ops.svd`
    ramp            how often a ramp of the rank compiles anew
    memory          peak of a firing, each in a process of its own (Linux only)

  KERAS_BACKEND=tensorflow python -m benchmarks.speed.run --out=benchmarks/speed

`--tfmot` lets TensorFlow's model optimization toolkit take part in the steps on TensorFlow, which
needs tf_keras and tensorflow-model-optimization, in an environment of their own.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_compaware as kc
from benchmarks.common import environment, in_fresh_process, peak_of, table, write_results
from keras_compaware import data
from keras_compaware._math import truncation
from keras_compaware._math.backend import compiled
from keras_compaware.training.firing import apply, encoded

PARTS = ("steps", "decompositions", "ramp", "memory")
BACKENDS = ("tensorflow", "jax", "torch")
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (4608, 512))
DRIFT = 0.02  # of the norm, between two firings
_TOOLKIT = ("tf_keras", "tensorflow_model_optimization")


def _everywhere(constraint, every: int) -> Callable:
    return lambda: kc.Recipe([kc.Rule(lambda target: True, kc.Every(every, constraint))])


def _proximal(regularizer, every: int = 1) -> Callable:
    return lambda: kc.Recipe([kc.Rule(lambda target: True, kc.Proximal(regularizer, every=every))])


@dataclasses.dataclass(frozen=True)
class Arm:
    """Something that acts on all kernels in training.

    Args:
        name: Its name in tables.
        recipe: Function without arguments that returns its recipe.
        every: Optimizer steps from one time to the next.
        limits: Most that it may cost by backend, as a fraction: of the time of `fit` if it is
            done by the callback, of the time of training without it if in the optimizer.
        in_step: Whether it is done by the optimizer.
    """

    name: str
    recipe: Callable
    every: int
    limits: dict
    in_step: bool = False


ARMS = (
    Arm("LowRank(ratio=0.25)", _everywhere(kc.LowRank(ratio=0.25), 100), 100,
        dict.fromkeys(BACKENDS, 0.01)),
    Arm("LowRank(ratio=0.25)", _everywhere(kc.LowRank(ratio=0.25), 10), 10,
        dict.fromkeys(BACKENDS, 0.05)),
    Arm("MagnitudePruning(0.5)", _everywhere(kc.MagnitudePruning(0.5), 10), 10,
        dict.fromkeys(BACKENDS, 0.03)),
    Arm("MagnitudePruning(0.5)", _everywhere(kc.MagnitudePruning(0.5), 1), 1,
        {"tensorflow": 0.3, "jax": 0.2, "torch": 0.2}),
    Arm("prox of NuclearNorm", _proximal(kc.NuclearNorm(1e-3), 100), 100,
        dict.fromkeys(BACKENDS, 0.02)),
    Arm("prox of GroupLasso", _proximal(kc.GroupLasso(1e-4)), 1,
        dict.fromkeys(BACKENDS, 0.1), in_step=True),
)  # fmt: skip


# ---- steps ------------------------------------------------------------------------------------


def network(kit=keras):
    """Builds the small convolutional network, by Keras or another module that has its layers."""
    layer = kit.layers
    stack = [kit.Input((32, 32, 3)) if kit is keras else kit.layers.InputLayer((32, 32, 3))]
    for filters in (32, 64, 128):
        stack += [layer.Conv2D(filters, 3, padding="same", activation="relu")]
        stack += [layer.MaxPooling2D()]
    stack += [layer.GlobalAveragePooling2D(), layer.Dense(256, "relu"), layer.Dense(10)]
    return kit.Sequential(stack)


class Timed(keras.callbacks.Callback):
    """Times what a callback does after a batch, once the batch itself is computed."""

    def __init__(self, inner: keras.callbacks.Callback):
        super().__init__()
        self.inner = inner
        self.seconds = 0.0

    def set_model(self, model):
        super().set_model(model)
        self.inner.set_model(model)

    def set_params(self, params):
        super().set_params(params)
        self.inner.set_params(params)

    def on_train_begin(self, logs=None):
        self.inner.on_train_begin(logs)

    def on_train_end(self, logs=None):
        self.inner.on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.inner.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self.inner.on_epoch_end(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        self.inner.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # waits for the step
        started = time.perf_counter()
        self.inner.on_train_batch_end(batch, logs)
        self.seconds += time.perf_counter() - started


class Clock(keras.callbacks.Callback):
    """Keeps the seconds of every epoch, between its first batch and its end."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._elapsed = time.perf_counter() - self._started

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self._elapsed)


class Run:
    """Training that goes on epoch by epoch, with an arm or without.

    As in any epoch, the first firing of each starts cold.

    Args:
        arm: What acts, or None.
        steps: Optimizer steps of an epoch.
        batch: Batch size.
    """

    def __init__(self, arm: Arm | None, steps: int, batch: int):
        self._model = network()
        self._recipe = arm.recipe() if arm else None
        optimizer = keras.optimizers.Adam(1e-3)
        if arm and arm.in_step:
            optimizer = self._recipe.optimizer(optimizer)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._model.compile(optimizer, loss)
        self._data = examples(steps * batch)
        self._batch = batch
        self.epochs, self.inside = [], []

    def warm_up(self, every: int):
        """Compiles everything: the step, and two firings in a row."""
        steps = max(2, min(3 * every, 3 * len(self._data[0]) // self._batch))
        x, y = (np.resize(part, (steps * self._batch, *part.shape[1:])) for part in self._data)
        self._fit(x, y, self._callbacks())

    def turn(self):
        """Trains one epoch more and notes its time."""
        clock, callbacks = Clock(), self._callbacks()
        self._fit(*self._data, [*callbacks, clock])
        self.epochs.append(clock.epochs[-1])

    def turn_timed(self):
        """Trains one epoch more and notes the share of its time that firings take."""
        clock, timed = Clock(), [Timed(callback) for callback in self._callbacks()]
        self._fit(*self._data, [*timed, clock])
        self.inside.append(sum(callback.seconds for callback in timed) / clock.epochs[-1])

    def _callbacks(self):
        return list(self._recipe.callbacks(self._model)) if self._recipe else []

    def _fit(self, x, y, callbacks):
        self._model.fit(x, y, batch_size=self._batch, shuffle=False, verbose=0, callbacks=callbacks)


class ToolkitRun:
    """Training by tf_keras, with the pruning of TensorFlow's toolkit at every step or without."""

    def __init__(self, pruned: bool, steps: int, batch: int):
        kit, toolkit = map(importlib.import_module, _TOOLKIT)
        model = network(kit)
        self._callbacks = []
        if pruned:
            sparsity = toolkit.sparsity.keras
            schedule = sparsity.ConstantSparsity(0.5, begin_step=0, frequency=1)
            model = sparsity.prune_low_magnitude(model, pruning_schedule=schedule)
            self._callbacks = [sparsity.UpdatePruningStep()]
        loss = kit.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(kit.optimizers.Adam(1e-3), loss)
        self._model, self._data, self._batch = model, examples(steps * batch), batch
        self.epochs, self.inside = [], []

    def warm_up(self, every: int):
        """Compiles the step."""
        self.turn()
        self.epochs.clear()

    def turn(self):
        """Trains one epoch more and notes its time."""
        started = time.perf_counter()
        self._model.fit(
            *self._data,
            batch_size=self._batch,
            shuffle=False,
            verbose=0,
            callbacks=self._callbacks,
        )
        self.epochs.append(time.perf_counter() - started)


def examples(number: int) -> tuple:
    """Returns random images and labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(number, 32, 32, 3)).astype("float32")
    return images, random.integers(0, 10, number)


def measure_steps(rounds: int, steps: int, batch: int, with_toolkit: bool) -> list[dict]:
    """Trains without and with every arm by turns, the order reversed every other round.

    Returns:
        An entry for every arm: its cost by both measures, and the seconds of every round.
    """
    runs = {"none": Run(None, steps, batch)}
    runs |= {number: Run(arm, steps, batch) for number, arm in enumerate(ARMS)}
    if with_toolkit:
        runs |= {f"tfmot {p}": ToolkitRun(p, steps, batch) for p in (False, True)}
    for name, run in runs.items():
        run.warm_up(ARMS[name].every if name in range(len(ARMS)) else 1)
    for number in range(rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            gc.collect()
            runs[name].turn()
    for _ in range(rounds):
        for name, arm in enumerate(ARMS):
            if not arm.in_step:
                runs[name].turn_timed()
    backend = keras.backend.backend()
    entries = [
        _entry(f"{arm.name}, every {arm.every}", runs["none"], runs[number], arm.limits[backend])
        | {"in_step": arm.in_step}
        for number, arm in enumerate(ARMS)
    ]
    if with_toolkit:
        entry = _entry("tfmot, every 1", runs["tfmot False"], runs["tfmot True"], None)
        entries.append(entry | {"in_step": True})
    return entries


def _entry(name, plain, run, limit):
    ratios = [a / b - 1 for a, b in zip(run.epochs, plain.epochs, strict=True)]
    return {
        "name": name,
        "inside": statistics.median(run.inside) if run.inside else None,
        "paired": statistics.median(ratios),
        "limit": limit,
        "seconds": run.epochs,
        "seconds_without": plain.epochs,
        "shares": run.inside,
    }


# ---- decompositions ---------------------------------------------------------------------------


def spectra(smaller: int) -> dict:
    """Returns singular values by name; None stands for normal random numbers."""
    places = np.arange(smaller)
    return {
        "exponential": np.exp(-5 * places / smaller),
        "harmonic": 1 / (places + 1.0),
        "flat": None,
    }


def kernel(shape: tuple, values: np.ndarray | None, seed: int = 0) -> np.ndarray:
    """Returns a matrix with these singular values."""
    random = np.random.default_rng(seed)
    if values is None:
        return random.normal(size=shape).astype("float32")
    left, right = (np.linalg.qr(random.normal(size=(n, len(values))))[0] for n in shape)
    return ((left * values) @ right.T).astype("float32")


def trained_kernel(shape: tuple, epochs: int) -> np.ndarray:
    """Returns the kernel of a hidden layer that was trained on digits."""
    with tempfile.TemporaryDirectory() as folder:
        digits = data.load("digits", data_dir=folder, cache_dir=folder)
    x = digits.train.images.reshape(len(digits.train.images), -1).astype("float32")
    x = x / x.max()
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Dense(shape[0], "relu"),
            layers.Dense(shape[1], "relu"),
            layers.Dense(digits.num_classes),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.1), loss)
    model.fit(x, digits.train.labels, batch_size=32, epochs=epochs, verbose=0)
    return keras.ops.convert_to_numpy(model.layers[1].kernel)


def _seconds(function, *arguments, repeats):
    taken = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        result = function(*arguments)
        keras.tree.map_structure(keras.ops.convert_to_numpy, result)
        if number:  # the first one compiles
            taken.append(time.perf_counter() - started)
    return statistics.median(taken), result


def _error(matrix, factors):
    left, right = (keras.ops.convert_to_numpy(f)[0].astype("float64") for f in factors)
    return float(np.linalg.norm(matrix - left @ right))


def measure_decomposition(name: str, matrix: np.ndarray, repeats: int) -> dict:
    """Measures the approximation of a matrix at a tenth of its rank.

    Returns:
        Seconds of `keras.ops.svd`, of a cold and of a warm start (from the factors of the matrix,
        for its approximation plus noise of 2 % of the norm); whether their certificates held, and
        their errors over the least ones.
    """
    rank = max(1, min(matrix.shape) // 10)
    entry = {"name": name, "shape": list(matrix.shape), "rank": rank}
    full = compiled(lambda w: keras.ops.svd(w, full_matrices=False))
    cold = compiled(lambda w: truncation.truncated(w, rank))
    warm = compiled(lambda w, *factors: truncation.truncated(w, rank, factors))

    w = keras.ops.convert_to_tensor(matrix[None])
    entry["svd_seconds"], (_, values, _) = _seconds(full, w, repeats=repeats)
    entry["cold_seconds"], factors = _seconds(cold, w, repeats=repeats)
    least = np.linalg.norm(keras.ops.convert_to_numpy(values)[0, rank:].astype("float64"))
    entry["cold_error"] = _error(matrix, factors) / least
    held = compiled(lambda w: truncation.attempt(w, rank)[0])
    entry["cold_held"] = bool(keras.ops.convert_to_numpy(held(w)))

    before = np.matmul(*map(keras.ops.convert_to_numpy, factors))[0]
    noise = np.random.default_rng(1).normal(size=matrix.shape)
    noise *= DRIFT * np.linalg.norm(before) / np.linalg.norm(noise)
    after = (before + noise).astype("float32")
    w = keras.ops.convert_to_tensor(after[None])
    _, values, _ = full(w)
    least = np.linalg.norm(keras.ops.convert_to_numpy(values)[0, rank:].astype("float64"))
    entry["warm_seconds"], found = _seconds(warm, w, *factors, repeats=repeats)
    entry["warm_error"] = _error(after, found) / least
    held = compiled(lambda w, *factors: truncation.attempt_from(w, rank, factors)[0])
    entry["warm_held"] = bool(keras.ops.convert_to_numpy(held(w, *factors)))
    return entry


def measure_decompositions(shapes: tuple, repeats: int, epochs: int) -> list[dict]:
    """Measures all spectra of all shapes, and a trained kernel of the first shape."""
    entries = []
    for shape in shapes:
        cases = {k: kernel(shape, values) for k, values in spectra(min(shape)).items()}
        if shape == shapes[0]:
            cases["trained"] = trained_kernel(shape, epochs)
        for name, matrix in cases.items():
            entries.append(measure_decomposition(name, matrix, repeats))
            gc.collect()
    return entries


# ---- recompilations and memory ----------------------------------------------------------------


def measure_ramp(firings: int) -> dict:
    """Counts how often the map is traced while a ramp lowers the rank, per kernel.

    PyTorch compiles nothing; there every firing calls the map.
    """
    calls, original = [], kc.LowRank.__call__

    def counted(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    model = keras.Sequential([keras.Input((16,)), layers.Dense(12), layers.Dense(1)])
    model.compile("sgd", "mse")
    ramp = kc.Ramp(1.0, begin=0, end=firings + 1, power=1)
    callback = kc.OccasionalCompression(kc.LowRank(ratio=0.25), every=1, end=firings + 1, ramp=ramp)
    x = np.random.default_rng(0).normal(size=(firings, 16)).astype("float32")
    with mock.patch.object(kc.LowRank, "__call__", counted):
        model.fit(x, x[:, :1], batch_size=1, verbose=0, callbacks=[callback])
    fired = [firing for firing in callback.firings if not firing.final]
    return {"firings": len(fired), "traces": len(calls)}


def measure_memory(kind: str, size: int) -> dict:
    """Measures in this process how far a firing raises its peak of resident memory.

    Args:
        kind: "warm", "cold" or "svd".
        size: Rows and columns of the kernel.

    Returns:
        Bytes of the kernel and of the rise, which is None where the system does not tell it.
    """
    layer = layers.Dense(size, use_bias=False)
    layer.build((None, size))
    (target,), _ = kc.find_targets(layer)
    values = None if kind == "svd" else spectra(size)["exponential"]
    layer.kernel.assign(kernel((size, size), values))
    # The decomposition is computed at a quarter of the full rank, whatever the values.
    compressor = kc.LowRank(rank=max(1, size // (4 if kind == "svd" else 10)))
    ((_, code),) = apply([encoded(target, compressor)])
    random = np.random.default_rng(1)
    w = keras.ops.convert_to_numpy(layer.kernel.value)
    if kind == "svd":
        w = random.normal(size=w.shape)
    elif kind == "warm":
        noise = random.normal(size=w.shape)
        w = w + DRIFT * np.linalg.norm(w) * noise / np.linalg.norm(noise)
    else:
        w = kernel((size, size), values, seed=2)
    previous = code if kind == "warm" else None
    if previous is not None:
        apply([encoded(target, compressor, previous)])
    layer.kernel.assign(w.astype("float32"))
    del w
    _, rise = peak_of(lambda: apply([encoded(target, compressor, previous)]))
    return {"kind": kind, "kernel_bytes": 4 * size * size, "peak_extra_bytes": rise}


def memory_elsewhere(kind: str, size: int) -> dict:
    """As `measure_memory`, in a fresh process."""
    arguments = [f"--memory_of={kind}", f"--memory_size={size}"]
    return in_fresh_process("benchmarks.speed.run", arguments, f"the memory of {kind}")


# ---- report -----------------------------------------------------------------------------------


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"


def steps_table(results: dict) -> str:
    """Returns the table of what steps cost."""
    rows = []
    for backend, parts in results.items():
        found = parts.get("steps", [])
        toolkit = next((e["paired"] for e in found if e["limit"] is None), None)
        for entry in found:
            cost = entry["paired"] if entry["in_step"] else entry["inside"]
            limit, met = entry["limit"], ""
            if limit is not None:
                met = _met(cost <= limit)
            is_rival = entry["name"] == "MagnitudePruning(0.5), every 1"
            if is_rival and toolkit is not None:
                met += f", half of tfmot's: {_met(entry['paired'] <= toolkit / 2)}"
            rows.append(
                [
                    f"{backend}: {entry['name']}",
                    "" if entry["inside"] is None else f"{entry['inside']:.1%}",
                    f"{entry['paired']:+.1%}",
                    "" if limit is None else f"{limit:.0%}",
                    met,
                ]
            )
    return table(["", "in firings / fit", "with / without", "limit", "met"], rows)


def decompositions_table(results: dict) -> str:
    """Returns the table of single approximations; the limits are 10x warm at 2048, 4x cold."""
    rows = []
    for backend, parts in results.items():
        for entry in parts.get("decompositions", []):
            rows_, columns = entry["shape"]
            cells = [f"{backend}: {rows_} x {columns}, {entry['name']}"]
            cells.append(f"{1e3 * entry['svd_seconds']:.0f} ms")
            met = []
            for start, factor in (("cold", 4), ("warm", 10)):
                speed = entry["svd_seconds"] / entry[f"{start}_seconds"]
                cells.append(f"{1e3 * entry[f'{start}_seconds']:.1f} ms ({speed:.1f}x)")
                cells.append(f"{entry[f'{start}_error']:.5f}")
                cells.append(_met(entry[f"{start}_held"]))
                met.append(entry[f"{start}_error"] <= 1 + truncation.EXCESS)
                if start == "warm" and rows_ == columns == 2048:
                    met.append(speed >= factor)
                if start == "cold" and entry["name"] != "flat":
                    met.append(speed >= factor)
            rows.append([*cells, _met(all(met))])
    header = ["", "svd", "cold", "error / least", "held", "warm", "error / least", "held", "met"]
    return table(header, rows)


def memory_table(results: dict) -> str:
    """Returns the table of peak memory and of recompilations."""
    rows = []
    for backend, parts in results.items():
        for entry in parts.get("memory", []):
            limit = 6 if entry["kind"] == "svd" else 3
            rise = entry["peak_extra_bytes"]
            ratio = None if rise is None else rise / entry["kernel_bytes"]
            rows.append(
                [
                    f"{backend}: peak of a firing / kernel, {entry['kind']}",
                    "not measured" if ratio is None else f"{ratio:.2f}",
                    str(limit),
                    "" if ratio is None else _met(ratio <= limit),
                ]
            )
        if "ramp" in parts:
            ramp = parts["ramp"]
            if backend != "torch":
                name = f"{backend}: traces in {ramp['firings']} firings of a ramp"
                rows.append([name, str(ramp["traces"]), "1", _met(ramp["traces"] <= 1)])
    return table(["", "measured", "limit", "met"], rows)


def summary(results: dict) -> str:
    """Returns all tables."""
    tables = (steps_table(results), decompositions_table(results), memory_table(results))
    return "\n\n".join(tables)


def merged(path: pathlib.Path | None, found: dict) -> dict:
    """Returns the results of all backends: those in the file, with new parts put in their place."""
    results = {}
    if path is not None and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    backend = keras.backend.backend()
    results[backend] = {**results.get(backend, {}), **found}
    return {name: results[name] for name in BACKENDS if name in results}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each arm")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of an epoch")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--repeats", type=int, default=5, help="of each decomposition")
    parser.add_argument("--shapes", default="", help="ROWSxCOLUMNS,... of the decompositions")
    parser.add_argument("--epochs", type=int, default=30, help="for which a kernel is trained")
    parser.add_argument("--memory_size", type=int, default=3072, help="rows of the kernel")
    parser.add_argument("--memory_of", help="print the peak of this kind of firing")
    parser.add_argument("--tfmot", action="store_true", help="compare with TensorFlow's toolkit")
    parser.add_argument("--report", action="store_true", help="print the tables of results.json")
    flags = parser.parse_args()
    if flags.memory_of:
        print(json.dumps(measure_memory(flags.memory_of, flags.memory_size)))
        return
    path = flags.out / "results.json" if flags.out else None
    if flags.report:
        print(summary(json.loads(path.read_text(encoding="utf-8"))))
        return
    shapes = tuple(tuple(map(int, text.split("x"))) for text in flags.shapes.split(",") if text)
    found = {"environment": environment()}
    for part in flags.parts.split(","):
        if part == "steps":
            found[part] = measure_steps(flags.rounds, flags.steps, flags.batch, flags.tfmot)
        elif part == "decompositions":
            shapes = shapes or SHAPES
            found[part] = measure_decompositions(shapes, flags.repeats, flags.epochs)
        elif part == "ramp":
            found[part] = measure_ramp(10)
        elif part == "memory":
            kinds = ("warm", "cold", "svd")
            found[part] = [memory_elsewhere(kind, flags.memory_size) for kind in kinds]
        else:
            parser.error(f"--parts: {part!r} is none of {', '.join(PARTS)}")
    results = merged(path, found)
    print(summary(results))
    if path is not None:
        write_results(path, results)


if __name__ == "__main__":
    main()
