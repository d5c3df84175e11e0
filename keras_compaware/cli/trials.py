"""One trial of a sweep: a training and what it gave."""

import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_compaware import data, measure
from keras_compaware._files import atomic_path
from keras_compaware.base import Code, Compressor, Target
from keras_compaware.cli.config import optimizer_of
from keras_compaware.cli.experiment import Experiment, versions
from keras_compaware.cli.sweep_config import recipe_config
from keras_compaware.compaction import recalibrate_batch_norm
from keras_compaware.recipe import Recipe, compress
from keras_compaware.search import Trial
from keras_compaware.training.optimizer import acts_in_step

MAX_DISTORTIONS = 100
"""The most firings of a trial of which the distortion is kept, evenly spaced."""

_BATCH = 1000  # examples of a batch where nothing is trained


def worker(folder: str, data_dir: str | None) -> Callable[[Trial], dict[str, Any]]:
    """Returns the function that a worker process runs on each of its trials.

    Args:
        folder: The folder of the dense networks.
        data_dir: Folder of TFDS data sets, or None.
    """
    return functools.partial(run_trial, folder=folder, data_dir=data_dir)


def run_trial(trial: Trial, *, folder: str | os.PathLike, data_dir: str | None) -> dict[str, Any]:
    """Runs a trial and returns its record, as JSON values without the trial's own.

    Whatever ran before in the process, the result is the same. A training whose weights become NaN
    or infinite has the status "diverged" and no accuracy.

    Raises:
        RuntimeError: If the trial needs a dense network that is not there.
    """
    keras.utils.clear_session()  # names of layers are those of a fresh process
    started = time.perf_counter()
    experiment = Experiment(recipe_config(trial), data_dir)
    experiment.total_steps = trial.settings["steps"]
    record: dict[str, Any] = {"status": "done", "backend": keras.backend.backend()}
    record["versions"] = versions()
    try:
        record |= _result(trial, experiment, pathlib.Path(folder))
    except FloatingPointError as error:
        record |= {"status": "diverged", "error": str(error)}
    record["seconds"] = round(time.perf_counter() - started, 3)
    return record


def dense_path(folder: str | os.PathLike, trial: Trial) -> pathlib.Path:
    """Returns the file of the dense network with a trial's schedule and seed."""
    return pathlib.Path(folder) / f"{trial.schedule}-{trial.seed}.npz"


def _result(trial: Trial, experiment: Experiment, folder: pathlib.Path) -> dict[str, Any]:
    dense = dense_path(folder, trial)
    if trial.needs_dense and not dense.exists():
        raise RuntimeError(f"the dense network {dense.name} is missing: its training has no result")
    model, recipe = experiment.build_model(), experiment.recipe()
    parameters = measure.parameters(model)
    if trial.needs_dense:
        model.set_weights(_load(dense))
    found: dict[str, Any] = {"steps": 0, "firings": 0, "distortions": []}
    compressors, codes = {}, {}
    if trial.kind == "post_training":
        compressors = recipe.final_compressors(model)
        model = compress(model, recipe)
    else:
        model, callback, found["ms_per_step"] = _trained(model, recipe, trial, experiment)
        found["steps"] = trial.settings["steps"]
        if callback is not None:
            compressors, codes = callback.compressors, callback.codes
            found |= _firings(callback, recipe, model, found["steps"])
    _refuse_nan(model)
    if experiment.config["recalibrate_steps"]:
        recalibrate_batch_norm(
            model, experiment.batches("train"), experiment.config["recalibrate_steps"]
        )
    for split in ("validation", "test"):
        found[split] = _accuracy(model, getattr(experiment.dataset, split))
    if trial.kind == "dense":
        _save(model, dense)
    elif recipe is not None:
        targets = [assignment.target for assignment in recipe.plan(model).assignments]
        norms = _norms(experiment, dense) if dense.exists() else {}
        found |= _sizes(targets, compressors, codes, norms, parameters)
    return found


def _trained(
    model: keras.Model, recipe: Recipe | None, trial: Trial, experiment: Experiment
) -> tuple[keras.Model, Any, float | None]:
    """Returns the trained model, the callback that has compressed it or None, and ms per step."""
    steps = trial.settings["steps"]
    if recipe is not None:
        model = recipe.wrap(model)
    optimizer = optimizer_of(experiment.config, steps)
    model.compile(
        optimizer=optimizer if recipe is None else recipe.optimizer(optimizer),
        loss="sparse_categorical_crossentropy",
        steps_per_execution=_steps_per_execution(
            trial.settings["steps_per_execution"], steps, recipe
        ),
    )
    callbacks = [] if recipe is None else recipe.callbacks(model)
    clock = _Clock()
    batches = Steps(experiment.batches("train"), steps)
    try:
        model.fit(batches, shuffle=False, callbacks=[*callbacks, clock], verbose=0)
    except FloatingPointError:
        raise
    except Exception:
        _refuse_nan(model)  # on PyTorch a decomposition of NaN raises by itself
        raise
    return model, callbacks[0] if callbacks else None, clock.ms_per_step


class _Clock(keras.callbacks.Callback):
    """Measures steps, without those of the first execution, in which Keras compiles."""

    def __init__(self) -> None:
        super().__init__()
        self._first = self._last = None

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._last = (batch, time.perf_counter())
        self._first = self._first or self._last

    @property
    def ms_per_step(self) -> float | None:
        if not self._first or self._first == self._last:
            return None
        (first, started), (last, ended) = self._first, self._last
        return 1000 * (ended - started) / (last - first)


class Steps(keras.utils.PyDataset):
    """Batches of a reshuffled split, epoch after epoch, as one long epoch of so many steps.

    Each epoch's examples that do not fill a batch are left out, so that all batches have one shape.

    Args:
        batches: A `Batches`, with a seed.
        steps: Number of batches.
    """

    def __init__(self, batches: data.Batches, steps: int) -> None:
        super().__init__()
        self._batches, self._steps = batches, steps
        self._whole = max(1, len(batches.split) // batches.batch_size)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(index, self._whole)
        if self._batches.epoch != epoch:
            self._batches.epoch = epoch
        return self._batches[place]


def _steps_per_execution(most: int, steps: int, recipe: Recipe | None) -> int:
    """Returns the most steps that can be run at once so that every firing is in time."""
    if keras.backend.backend() == "torch":  # it runs one after the other
        return 1
    actions = [] if recipe is None else [a for rule in recipe.rules for a in rule.actions]
    periods = [getattr(action, "every", 0) for action in actions if not acts_in_step(action)]
    common = math.gcd(steps, *periods)
    return max(number for number in range(1, most + 1) if common % number == 0)


def _firings(callback: Any, recipe: Recipe, model: keras.Model, steps: int) -> dict[str, Any]:
    firings = [firing for firing in callback.firings if not firing.final]
    in_step = any(acts_in_step(action) for rule in recipe.rules for action in rule.actions)
    points = [
        [firing.step, float(np.mean(list(firing.distortion.values())))]
        for firing in firings
        if firing.distortion
    ]
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_DISTORTIONS)).round())
    kept = [points[int(place)] for place in chosen]
    return {
        "firings": steps if in_step else len(firings),
        "distortions": kept,
        "distortion": points[-1][1] if points else None,
    }


def _refuse_nan(model: keras.Model) -> None:
    for weight in model.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise FloatingPointError(f"'{weight.path}' holds NaN or infinity after training")


def _accuracy(model: keras.Model, split: data.Split) -> float:
    scores = model.predict(data.batches(split, _BATCH), verbose=0)
    return float(np.mean(np.argmax(scores, axis=-1) == split.labels))


def _save(model: keras.Model, path: pathlib.Path) -> None:
    with atomic_path(path) as temporary:
        np.savez(temporary, *model.get_weights())


def _load(path: pathlib.Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[name] for name in file.files]


def _norms(experiment: Experiment, path: pathlib.Path) -> dict[str, float]:
    """The norms of the dense network's kernels."""
    model = experiment.build_model()
    model.set_weights(_load(path))
    plan = experiment.recipe().plan(model)
    return {assignment.target.name: _norm(assignment.target) for assignment in plan.assignments}


def _norm(target: Target) -> float:
    return float(np.linalg.norm(keras.ops.convert_to_numpy(target.read()).astype("float64")))


def _sizes(
    targets: list[Target],
    compressors: Mapping[str, Compressor],
    codes: Mapping[str, Code],
    norms: Mapping[str, float],
    parameters: int,
) -> dict[str, Any]:
    """Returns what the kernels have become: zeros, ranks, bits counted from codes, norms.

    "kernel_ratio" is bits of the compressed kernels over those of dense ones, "model_ratio" the
    same of all weights; "norm_ratio" is the norm over that of the dense network's kernel, of all
    kernels together.
    """
    kernels: dict[str, dict[str, Any]] = {}
    for target in targets:
        compressor = compressors.get(target.name)
        bits = 32 * target.num_parameters
        if compressor is not None:
            kernel = target.read()
            code = codes.get(target.name)
            if code is None:
                code = compressor.settle(kernel, target.axes).encode(kernel, axes=target.axes)
            bits = code.num_bits
        reference = norms.get(target.name)
        kernels[target.name] = {
            "parameters": target.num_parameters,
            "bits": bits,
            "sparsity": float(np.mean(keras.ops.convert_to_numpy(target.read()) == 0)),
            "rank": compressor and compressor.rank_of(target.shape, target.axes),
            "norm_ratio": _norm(target) / reference if reference else None,
        }
    entries = sum(kernel["parameters"] for kernel in kernels.values())
    bits = sum(kernel["bits"] for kernel in kernels.values())
    zeros = sum(kernel["sparsity"] * kernel["parameters"] for kernel in kernels.values())
    ranks = [kernel["rank"] for kernel in kernels.values() if kernel["rank"] is not None]
    known = [target for target in targets if norms.get(target.name)]
    dense = math.hypot(*(norms[target.name] for target in known))
    return {
        "kernel_ratio": bits / (32 * entries),
        "model_ratio": (bits + 32 * (parameters - entries)) / (32 * parameters),
        "sparsity": zeros / entries,
        "rank": float(np.mean(ranks)) if ranks else None,
        "norm_ratio": math.hypot(*map(_norm, known)) / dense if dense else None,
        "kernels": kernels,
    }
