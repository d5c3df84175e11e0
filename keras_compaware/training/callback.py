"""The callback that compresses every N optimizer steps, on every backend."""

import contextlib
import dataclasses
import sys
import threading
import time
import weakref

import keras
from keras import ops

from keras_compaware.base import (
    AtEnd,
    Chain,
    Compressor,
    Every,
    Proximal,
    Target,
)
from keras_compaware.kernels import find_targets
from keras_compaware.layers.compressed import compressed_layers
from keras_compaware.training.firing import (
    apply,
    constrained,
    costs_less_together,
    encoded,
    encoded_on,
    finite,
    num_dead_channels,
    pruned,
    shrunk,
    sparsity_of,
)
from keras_compaware.training.optimizer import holds, step_optimizer
from keras_compaware.training.steering import steerings


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A target and the actions that apply to it, in order.

    Args:
        target: A `Target`.
        actions: Tuple of actions (`Every`, `Proximal`, `AtEnd`, ...).
    """

    target: Target
    actions: tuple

    @property
    def compressors(self):
        """The compressors that act on the target, in order, by the number of their action."""
        subjects = (
            getattr(action, "constraint", getattr(action, "compressor", None))
            for action in self.actions
        )
        return {number: c for number, c in enumerate(subjects) if isinstance(c, Compressor)}


@dataclasses.dataclass(frozen=True)
class Firing:
    """What one firing did.

    Args:
        step: Number of optimizer steps done.
        seconds: Wall time.
        distortion: ||C(w) - w|| / ||w|| by the target's name.
        sparsity: Fraction of entries that are zero afterwards, by the target's name.
        final: Whether it is the compression at the end of training.
    """

    step: int
    seconds: float
    distortion: dict
    sparsity: dict = dataclasses.field(default_factory=dict)
    final: bool = False


class CompressionCallback(keras.callbacks.Callback):
    """Carries out actions on kernels during `fit`: every N optimizer steps and at the end.

    A kernel is overwritten after optimizer step t whenever `(t - begin) // every` has grown, once
    if several firings are due (several steps per execution). Steps are those of
    `optimizer.iterations`, so gradient accumulation, a partial last batch, `initial_epoch` and a
    resumed run count right. Between firings the model is not touched. When training ends, every
    target is exactly compressed; put callbacks that change or save weights at the end
    (`EarlyStopping(restore_best_weights=True)`, `ModelCheckpoint`) accordingly: the first kind
    before this one in the list, the second after it.

    Usually made by `Recipe.callbacks` or as `OccasionalCompression`. In a custom training loop
    call `step(model, n)` after optimizer step n and `finish(model)` at the end.

    What a recipe does at every step is left to its `CompressionOptimizer`, if the model is compiled
    with it. At the end of each epoch the callback adds to the logs, and so to the progress bar, the
    history, CSVLogger and TensorBoard (which come after it in the list):

        sparsity              zeros among all entries of the targets, after their last firing
        dead_channels         of the targets that are channel spaces, if there are any: the share of
                              channels that are zero, so that `compact` removes them
        rank                  mean rank of the targets whose rank is reduced, if there are any
        distortion            mean of ||C(w) - w|| / ||w|| of the targets at their last firing
        compression_seconds   time spent in firings during the epoch
        strength              of the first regularizer that has a controller, if there is one

    A compressor that fits iteratively starts from the code of its last firing in the same epoch.

    Args:
        assignments: Sequence of `Assignment`s, for one model. `Compressed` layers of the model
            are looked after (their bases refreshed) without being assigned.

    Attributes:
        firings: List of `Firing`s so far.
        codes: At the end of training: by target name the codes that encoding the kernel anew would
            not find again (factors that were quantized). `compact(model, codes)` and
            `export.save_codes` take them.
        compressors: At the end of training: by target name what the target is compressed by now.

    Raises:
        ValueError: When training begins, if the targets do not belong to the model, or other
            callbacks would undo the final compression.
        FloatingPointError: If a target holds NaN or infinity at a firing.
    """

    def __init__(self, assignments=()):
        super().__init__()
        known = isinstance(assignments, (list, tuple))
        if not known or not all(isinstance(each, Assignment) for each in assignments):
            raise TypeError(
                "CompressionCallback: `assignments` must be a sequence of Assignments, as in "
                f"`recipe.plan(model).assignments`. Received: {assignments!r}."
            )
        self.firings = []
        self.codes = {}
        self.compressors = {}
        self._assignments = tuple(assignments)
        self._jobs = None
        self._settled = {}
        self._applied = {}
        self._start = None
        self._trained = None
        self._previous = {}
        self._steerings, self._steered = [], {}
        self._monitor = _Monitor()

    # ---- Keras hooks --------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self._thread = threading.get_ident()
        self._siblings = _sibling_callbacks()
        self._start = None
        # On TensorFlow a model without an input shape is built in the first training step.
        self._is_waiting = not self._model.built
        if not self._is_waiting:
            self._prepare(self.model)
            self._refuse_callbacks_that_undo(self._siblings)

    def on_epoch_begin(self, epoch, logs=None):
        # Not earlier: callbacks that restore a checkpoint do so when training begins.
        if self._start is None and not self._is_waiting:
            self._begin(self._read_step())
        self._batches_seen = 0
        self._epoch_rate = None
        self._previous.clear()  # a run that is resumed here does the same as one that went on

    def on_train_batch_begin(self, batch, logs=None):
        if self._is_waiting:
            return
        # `fit(callbacks=callback)`, without a list, runs the hooks at the end of a batch on other
        # threads on JAX and PyTorch. Then the firing after a step happens here, before the next.
        self._count(batch)
        if self._epoch_rate is None and self._has_proximal_jobs:
            # Not earlier: schedulers set the rate of an epoch when it begins, and the next one's
            # when it ends. The state is still attached, so reading it costs nothing.
            self._epoch_rate = self._learning_rate.now()

    def on_train_batch_end(self, batch, logs=None):
        if threading.get_ident() == self._thread:
            if self._is_waiting:
                self._stop_waiting()
            self._count(batch + 1)

    def on_test_begin(self, logs=None):
        if self._start is not None:
            self._fire(self._read_step(), self._epoch_rate)

    def on_epoch_end(self, epoch, logs=None):
        if self._is_waiting:
            self._stop_waiting()
        # Always: without a list of callbacks the last batch of an epoch has not been counted. The
        # state is attached to the model here, so reading the step costs nothing.
        step = self._read_step()
        self._fire(step, self._epoch_rate)
        self._monitor.report(self._resolved, self._jobs, step, logs)
        if logs is not None and self._steerings:
            logs["strength"] = self._steerings[0].strength

    def on_train_end(self, logs=None):
        if self._is_waiting:  # not a step was trained
            return
        step = self._read_step()
        if self._start is None:  # resumed after the last epoch: no epoch was left to run
            self._begin(step)
        self._finish(step)
        self._start = None

    # ---- custom training loops ----------------------------------------------------------------

    def step(self, model, n):
        """Tells that optimizer step `n` (1, 2, ...) of a custom loop is done; fires if due.

        On JAX the model's variables must hold the current state when this is called.
        """
        if self._start is None:
            self._prepare(model)
            self._begin(n - 1)
        if n >= self._next:
            self._fire(n)
        self._known = n

    def finish(self, model):
        """Ends a custom loop: every target of the model is exactly compressed afterwards."""
        if self._start is None:
            self._prepare(model)
            self._begin(0)
        self._finish(self._known)
        self._start = None

    # ---- state --------------------------------------------------------------------------------

    def get_state(self):
        """Returns what an interrupted run must restore, as plain JSON values."""
        return {
            "settled": {
                key: keras.saving.serialize_keras_object(compressor)
                for key, compressor in self._settled.items()
            },
            "applied": dict(self._applied),
            "steered": dict(self._steered),
        }

    def set_state(self, state):
        """Restores `get_state()`'s result before `fit` goes on."""
        self._settled = {
            key: keras.saving.deserialize_keras_object(config)
            for key, config in state["settled"].items()
        }
        self._applied = {key: int(step) for key, step in state["applied"].items()}
        self._steered = dict(state.get("steered", {}))

    # ---- inside -------------------------------------------------------------------------------

    def _resolve(self, model):
        """Returns the assignments for a model."""
        known = {id(variable) for variable in model.variables}
        for assignment in self._assignments:
            if any(id(variable) not in known for variable in assignment.target.variables):
                raise ValueError(
                    f"{type(self).__name__}: the target '{assignment.target.name}' does not belong "
                    "to the model that is being trained. Make the callbacks for this very model, "
                    "after wrapping or loading it: `recipe.callbacks(model)`."
                )
        return self._assignments

    def _prepare(self, model):
        assignments = self._resolved = self._resolve(model)
        if self._trained is not None and self._trained() is not model:
            # What another model has left.
            self._settled, self._applied, self._steered = {}, {}, {}
            self._monitor = _Monitor()
        self._trained = weakref.ref(model)
        self._engine = _engine_for(assignments, model)
        self._optimizer = _innermost(getattr(model, "optimizer", None))
        accumulation = getattr(self._optimizer, "gradient_accumulation_steps", None)
        self._accumulation = accumulation or 1
        self._jobs = [
            _Job(assignment.target, action, f"{assignment.target.name}#{number}")
            for assignment in assignments
            for number, action in enumerate(assignment.actions)
            if isinstance(action, (Every, Proximal))
            and not self._acts_in_step(assignment.target, action)
        ]
        self._wrappers = compressed_layers(model)
        self._jobs += [
            _Job(wrapper, action, wrapper.name)
            for wrapper in self._wrappers
            for action in _actions_of(wrapper)
        ]
        self._has_proximal_jobs = bool(self._proximal_jobs())
        self._steerings = steerings(assignments, model, self._acts_in_step)
        self._jobs += [
            _Job(s, _LayerAction(self._steer, s.every, s.begin, s.end), s.name)
            for s in self._steerings
            if s.in_step
        ]
        self._job_batches = _batches(self._jobs)
        self._finals = _final_compressors(assignments, self._wrappers, model)

    def _stop_waiting(self):
        self._is_waiting = False
        self._prepare(self.model)
        self._refuse_callbacks_that_undo(self._siblings)
        self._begin(0)

    def _begin(self, step):
        self._start = self._known = step
        self._batches = self._batches_seen = 0
        self._epoch_rate = None
        self._learning_rate = _LearningRate(self._optimizer, self._accumulation, step)
        # A compiled model or an older checkpoint counts from an earlier step again.
        self._applied = {key: done for key, done in self._applied.items() if done <= step}
        for wrapper in self._wrappers:
            if not wrapper.is_fitted:
                wrapper.refresh()
            wrapper.blend(step)
        for job in self._jobs:
            job.fired = job.count(step)
        for steering in self._steerings:
            state = self._steered.get(steering.name)
            if state is not None and state["step"] <= step:
                steering.set_state(state)
            elif steering.in_step:
                self._steer(steering, max(step, steering.begin))
        self._next = min((job.next_due() for job in self._jobs), default=float("inf"))

    def _count(self, batches_of_epoch):
        """Notes that so many batches of the epoch are done; fires if a firing may be due."""
        self._batches += max(0, batches_of_epoch - self._batches_seen)
        self._batches_seen = max(self._batches_seen, batches_of_epoch)
        if self._pending():
            self._fire(self._read_step())

    def _pending(self):
        # At most: a partial accumulation may have been under way at the last reading.
        at_most = (self._batches + self._accumulation - 1) // self._accumulation
        return self._known + at_most >= self._next

    def _read_step(self):
        model = self.model  # On JAX this moves the trainer's state into the variables.
        # A tensor where gradients accumulate; under a distribution strategy one copy per device.
        iterations = keras.ops.convert_to_tensor(model.optimizer.iterations)
        return int(keras.ops.convert_to_numpy(iterations))

    def _fire(self, step, rate=None):
        self._known, self._batches = step, 0
        if self._has_proximal_jobs:
            self._learning_rate.note(step, rate)
        due = [batch for batch in self._job_batches if batch[0].count(step) > batch[0].fired]
        if due:
            with self._firing(step) as changes:
                for batch in due:
                    changes |= self._act(batch, step)
                    for job in batch:
                        job.fired = job.count(step)
        if self._has_proximal_jobs:
            self._learning_rate.forget(min(map(self._applied_until, self._proximal_jobs())))
        self._next = min((job.next_due() for job in self._jobs), default=float("inf"))

    @contextlib.contextmanager
    def _firing(self, step, final=False):
        """Notes the changes that the block makes as one `Firing`."""
        started, changes = time.perf_counter(), {}
        yield changes
        if changes or not final:
            firing = Firing(
                step,
                time.perf_counter() - started,
                {name: change.distortion for name, change in changes.items()},
                {name: change.sparsity for name, change in changes.items()},
                final,
            )
            self.firings.append(firing)
            self._monitor.note(firing)

    def _act(self, batch, step):
        """Fires jobs at once; returns the `Change` of each target by name, of a layer none."""
        if isinstance(batch[0].action, _LayerAction):
            (job,) = batch
            job.action.fire(job.target, step)
            return {}
        results = apply([self._rewrite(job, step) for job in batch], step)
        for job, (_, code) in zip(batch, results, strict=True):
            if code is not None:
                self._previous[job.key] = code
            if getattr(job.action, "hold", False):
                self._engine.hold(job.target)
        return {job.target.name: change for job, (change, _) in zip(batch, results, strict=True)}

    def _rewrite(self, job, step):
        """Returns the `Rewrite` that a job makes when it fires."""
        action, target = job.action, job.target
        if isinstance(action, Proximal):
            return self._shrunk(job, step)
        subject = self._settle(job.key, target, action.constraint, step)
        ramp = action.schedule
        # From the ramp's end on the constraint's own budget counts, exactly.
        ramping = ramp is not None and step < ramp.end
        job.subject = subject
        job.budget = ramp(step, getattr(subject, subject.budget)) if ramping else None
        if ramping:
            return constrained(target, subject, job.budget, step)
        return self._constrained(job.key, target, subject, step)

    def _acts_in_step(self, target, action):
        return self._engine is not None and self._engine.handles(target, action)

    def _steer(self, steering, step):
        """Corrects the strength of what acts inside the training step; ends it when it is time."""
        steering.correct(step, step, self._learning_rate.summed)
        self._steered[steering.name] = steering.get_state()
        self._engine.steer(steering.action, steering.strength)
        if step >= steering.end:
            for target in steering.targets:
                apply([pruned(target, steering.action.regularizer, steering.stays(target))], step)
            for target in steering.targets:  # some share weights
                self._engine.hold(target)

    def _constrained(self, key, target, subject, step):
        if not getattr(subject, "warm_starts", False):
            return constrained(target, subject, step=step)
        return encoded(target, subject, self._previous.get(key))

    def _shrunk(self, job, step):
        action, target = job.action, job.target
        since = self._applied_until(job)
        last = step if action.end is None else min(step, action.end)
        self._applied[job.key] = step
        ramp = action.schedule
        budget = None if ramp is None else ramp(step, action.regularizer.strength)
        if action.controller is not None:
            steering = next(s for s in self._steerings if target in s.targets)
            steering.correct(step, since, self._learning_rate.summed)
            self._steered[steering.name] = steering.get_state()
            if step >= steering.end:
                return pruned(target, action.regularizer, steering.stays(target))
            budget = steering.strength
        step_size = self._learning_rate.summed(since, last)
        return shrunk(target, action.regularizer, step_size, budget)

    def _proximal_jobs(self):
        return [job for job in self._jobs if isinstance(job.action, Proximal)]

    def _applied_until(self, job):
        """The last optimizer step that the proximal map has taken into account."""
        return max(self._applied.get(job.key, self._start), job.begin)

    def _settle(self, key, target, constraint, step):
        if not isinstance(constraint, Compressor):
            return constraint
        if key not in self._settled:
            with finite([target], step):
                self._settled[key] = constraint.settle(target.read(), target.axes)
        return self._settled[key]

    def _finish(self, step):
        """Applies what is left of the proximal maps, then compresses every target.

        Kernels of straight-through layers become what the forward pass has last run with, the
        others the codes that their compressors find.
        """
        self.codes, self.compressors = {}, {}
        with self._firing(step, final=True) as changes:
            for job in self._proximal_jobs():
                last = step if job.end is None else min(step, job.end)
                if last > self._applied_until(job):
                    changes |= self._act([job], step)
            for target, compressors in self._finals:
                changes[target.name] = self._compress_finally(target, compressors, step)
            for wrapper in self._wrappers:
                wrapper.release()
        self._previous.clear()

    def _compress_finally(self, target, compressors, step):
        keys = [f"{target.name}#{number}" for number, _ in compressors]
        members = [
            self._settle(key, target, compressor, step)
            for key, (_, compressor) in zip(keys, compressors, strict=True)
        ]
        compressor = members[0] if len(members) == 1 else Chain(members)
        self.compressors[target.name] = compressor
        basis = self._basis_of(target, compressors)
        if basis is not None:
            rewrite = encoded_on(target, compressor, basis)
        elif compressor.repeats:
            rewrite = self._constrained(keys[0], target, compressor, step)
        else:
            previous = self._previous.get(keys[0]) if len(members) == 1 else None
            rewrite = encoded(target, compressor, previous)
        ((change, code),) = apply([rewrite], step)
        if not compressor.repeats:
            self.codes[target.name] = code
        return change

    def _basis_of(self, target, compressors):
        """The basis that a straight-through layer has fitted for a target, or None.

        None as well if other compressors act on the target.
        """
        for wrapper in self._wrappers:
            if [wrapper.compressor] != [compressor for _, compressor in compressors]:
                continue
            for own, basis in zip(wrapper.targets or (), wrapper.bases, strict=False):
                if own.variables[0] is target.variables[0] and wrapper.is_fitted:
                    return ops.cast(basis.value, "float32")
        return None

    def _refuse_callbacks_that_undo(self, callbacks):
        if self not in callbacks or not self._finals:
            return
        own = callbacks.index(self)
        for place, callback in enumerate(callbacks):
            name = type(callback).__name__
            if place > own and getattr(callback, "restore_best_weights", False):
                raise ValueError(
                    f"{name}(restore_best_weights=True) comes after {type(self).__name__} in the "
                    "list of callbacks and would undo the final compression when training ends. "
                    f"Expected order: callbacks=[{name}(...), {type(self).__name__}(...)]."
                )
            if isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_best_only:
                self._refuse_uncompressed_best(callback, place > own)

    def _refuse_uncompressed_best(self, checkpoint, after):
        assignments = [(a.target.name, _overwriting(a)) for a in self._resolved]
        assignments = [(name, actions) for name, actions in assignments if actions]
        batches = (self.params or {}).get("steps")
        whole = batches and batches % self._accumulation == 0
        steps = batches // self._accumulation if whole else None
        holds = steps and all(_holds_at_every(steps, actions) for _, actions in assignments)
        if not assignments or (after and holds and checkpoint.save_freq == "epoch"):
            return
        what = "; ".join(f"{name}: {', '.join(map(str, act))}" for name, act in assignments)
        raise ValueError(
            "ModelCheckpoint(save_best_only=True) would keep the weights of an epoch's end at "
            f"which they are not compressed: an epoch has {batches} batches, and what acts is "
            f"{what}. Expected: Every(N, ...) with an N that divides the optimizer steps of an "
            "epoch, without begin, end, ramp and AtEnd, and the checkpoint after "
            f"{type(self).__name__} in the list; or save_best_only=False and the model "
            "after training, which is compressed; or "
            "compress the loaded best model once with `compress(model, recipe)`."
        )


def _overwriting(assignment):
    """The actions that leave the kernel compressed at the end; a wrapped layer always runs so."""
    return [
        action
        for action in assignment.actions
        if isinstance(action, AtEnd)
        or (isinstance(action, Every) and isinstance(action.constraint, Compressor))
    ]


def _holds_at_every(steps, actions):
    """Whether kernels are compressed whenever that many optimizer steps of an epoch are done."""
    return all(
        isinstance(action, Every)
        and steps % action.every == 0
        and (action.begin, action.end, action.ramp) == (0, None, None)
        for action in actions
    )


def bind_optimizer(assignments, model):
    """Tells a model's `CompressionOptimizer`, if it has one, all that it has to do.

    Raises:
        ValueError: If it was made for something else, or there is none and zeros are to be held.
    """
    engine = step_optimizer(getattr(model, "optimizer", None))
    if engine is not None:
        engine.bind(assignments, model)
    _engine_for(assignments, model)


def _engine_for(assignments, model):
    """Returns the `CompressionOptimizer` of a model, or None.

    A callback may act beside an optimizer that was made for other actions.
    """
    engine = step_optimizer(getattr(model, "optimizer", None))
    if engine is not None and engine.entries is None:
        engine.bind(assignments, model)
    for assignment in assignments:
        is_held = engine is not None and engine.holds(assignment.target)
        if any(map(holds, assignment.actions)) and not is_held:
            raise ValueError(
                f"The rule for '{assignment.target.name}' has hold=True, which acts inside the "
                "training step. Compile the model with the recipe's optimizer: "
                "`model.compile(recipe.optimizer(keras.optimizers.Adam()), ...)`."
            )
    return engine


class _LayerAction:
    """What the callback does to a straight-through layer: every so many steps in a window."""

    def __init__(self, fire, every, begin=0, end=None):
        self.fire, self.every, self.begin, self.end = fire, every, begin, end


def _actions_of(wrapper):
    actions = []
    if wrapper.bases:
        actions.append(_LayerAction(lambda layer, step: layer.refresh(), wrapper.every))
    if wrapper.alpha is not None:
        ramp = wrapper.alpha.within(0, None)
        blend = type(wrapper).blend
        actions.append(_LayerAction(blend, wrapper.every, ramp.begin, ramp.end))
    return actions


class _Monitor:
    """Collects what firings do and writes it into the logs of an epoch."""

    def __init__(self):
        self._distortion, self._sparsity = {}, {}
        self._seconds = 0.0

    def note(self, firing):
        self._distortion |= firing.distortion
        self._sparsity |= firing.sparsity
        self._seconds += firing.seconds

    def report(self, assignments, jobs, step, logs):
        """Adds the numbers to `logs`.

        Raises:
            FloatingPointError: If a target on which only the optimizer acts holds NaN or infinity.
        """
        fired = {job.target.name for job in jobs if job.fired}
        targets = [assignment.target for assignment in assignments]
        spaces = [target for target in targets if target.layout is not None]
        zeros = entries = 0.0
        # Where there are rules for kernels, a space holds what is counted there already.
        for target in [target for target in targets if target.layout is None] or spaces:
            known = self._sparsity.get(target.name) if target.name in fired else None
            sparsity = sparsity_of(target, step) if known is None else known
            zeros += sparsity * target.num_parameters
            entries += target.num_parameters
        ranks = list(filter(None, map(_rank, jobs)))
        seconds, self._seconds = self._seconds, 0.0
        if logs is None or not entries:
            return
        logs["sparsity"] = zeros / entries
        if spaces:
            dead = sum(num_dead_channels(target) for target in spaces)
            logs["dead_channels"] = dead / sum(target.layout.size for target in spaces)
        if ranks:
            logs["rank"] = float(sum(ranks)) / len(ranks)
        distortion = self._distortion.values()
        logs["distortion"] = sum(distortion) / len(distortion) if distortion else 0.0
        logs["compression_seconds"] = seconds


def _rank(job):
    """The rank to which a job reduces its target; of a proximal map the present one."""
    if isinstance(job.action, Proximal):
        rank = job.action.regularizer.rank(job.target.read(), job.target.axes)
        return None if rank is None else int(keras.ops.convert_to_numpy(rank))
    subject = job.subject or getattr(job.action, "constraint", None)
    if not isinstance(subject, Compressor):
        return None
    rank = subject.rank_of(job.target.shape, job.target.axes)
    if rank is None or job.budget is None:
        return rank
    if subject.budget == "rank":
        return max(1, round(job.budget))
    ramped = subject.replace(**{subject.budget: job.budget})
    return ramped.rank_of(job.target.shape, job.target.axes)


class _Job:
    """An action on a target (or layer) together with how often it has fired."""

    subject = None  # the constraint as it was applied last, with its budget settled
    budget = None  # what a ramp has put in the place of the constraint's own budget

    def __init__(self, target, action, key):
        self.target, self.action, self.key = target, action, key
        self.begin = getattr(action, "begin", 0)
        self.end = getattr(action, "end", None)
        self.every = action.every
        self.fired = 0

    def count(self, step):
        """Number of firings up to an optimizer step."""
        if self.end is None or step < self.end:
            return max(0, (step - self.begin) // self.every)
        # At the end of its window it fires in any case: the last interval may be shorter.
        return -((self.begin - self.end) // self.every)

    def next_due(self):
        """First step after which it fires again."""
        due = self.begin + (self.fired + 1) * self.every
        if self.end is None or due <= self.end:
            return due
        return self.end if self.fired < self.count(self.end) else float("inf")


def _batches(jobs):
    """Splits jobs, in order, into lists of those that fire together, applied by one call."""
    batches = []
    for job in jobs:
        if not (batches and _join(batches[-1], job)):
            batches.append([])
        batches[-1].append(job)
    return batches


def _join(batch, job):
    """Whether a job always fires when others do, and may be applied in one call with them."""
    jobs = [*batch, job]
    actions = {(type(job.action), job.begin, job.end, job.every) for job in jobs}
    if len(actions) > 1 or any(isinstance(job.action, _LayerAction) for job in jobs):
        return False
    if any(getattr(getattr(job.action, "constraint", None), "is_random", False) for job in jobs):
        return False
    variables = [id(variable) for job in jobs for variable in job.target.variables]
    disjoint = len(set(variables)) == len(variables)
    return disjoint and costs_less_together([job.target for job in jobs])


class _LearningRate:
    """The learning rate, summed over optimizer steps.

    A schedule is evaluated at the steps. A rate that callbacks set is known from notes: what was
    found at a firing held since the last note, and what was found at the first step of an epoch
    held until its end.
    """

    samples = 8

    def __init__(self, optimizer, accumulation, step):
        self._optimizer = optimizer
        self._accumulation = accumulation
        rate = getattr(optimizer, "_learning_rate", None)
        is_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
        self._schedule = rate if is_schedule else None
        self._noted = step
        self._notes = []  # (first, last, rate): the rate of the steps first + 1 .. last

    def now(self):
        """The present rate."""
        if self._optimizer is None:
            raise ValueError(
                "A proximal map needs the learning rate of the model's optimizer. Compile the "
                "model with the optimizer of the custom loop, or use a projection (`Every`)."
            )
        return float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))

    def note(self, step, rate=None):
        """Notes the rate of the steps since the last note; None stands for the present one."""
        if self._schedule is not None or step <= self._noted:
            return
        rate = self.now() if rate is None else rate
        goes_on = self._notes and self._notes[-1][2] == rate
        first = self._notes.pop()[0] if goes_on else self._noted
        self._notes.append((first, step, rate))
        self._noted = step

    def forget(self, step):
        """Drops the notes of steps up to `step`."""
        self._notes = [note for note in self._notes if note[1] > step]

    def summed(self, first, last):
        """Sum over the steps first + 1 .. last; of more than 8 steps of a schedule, nearly."""
        number = last - first
        if number <= 0:
            return 0.0
        if self._schedule is not None:
            return self._summed_schedule(first, number)
        total = 0.0
        for start, end, rate in self._notes:
            noted = max(0, min(end, last) - max(start, first))
            total, number = total + noted * rate, number - noted
        return total + number * self.now() if number else total

    def _summed_schedule(self, first, number):
        samples = min(number, self.samples)
        width = number / samples
        points = [first + (index + 0.5) * width - 0.5 for index in range(samples)]
        # Keras evaluates a schedule at the number of batches done, not of updates.
        points = [(point + 1.0) * self._accumulation - 1.0 for point in points]
        return width * sum(float(keras.ops.convert_to_numpy(self._schedule(p))) for p in points)


def _innermost(optimizer):
    """The optimizer inside wrappers such as `LossScaleOptimizer`."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _final_compressors(assignments, wrappers, model):
    """Returns `[(target, [(number of the action, compressor), ...]), ...]` for the end.

    Channels come first: kernels keep the zeros that are left in them, and are then compressed
    exactly.
    """
    finals, covered = [], set()
    for assignment in sorted(assignments, key=lambda assignment: assignment.target.layout is None):
        compressors = list(assignment.compressors.items())
        if compressors:
            finals.append((assignment.target, compressors))
            covered.update(id(variable) for variable in assignment.target.variables)
    known = {id(target.variables[0]): target for target in find_targets(model)[0]}
    for wrapper in wrappers:
        for target in wrapper.targets or ():
            variable = id(target.variables[0])
            if variable not in covered:  # frozen kernels are not among the known ones
                unique = dataclasses.replace(target, name=f"{wrapper.path}/{target.name}")
                finals.append((known.get(variable, unique), [("layer", wrapper.compressor)]))
    return finals


def _sibling_callbacks():
    """The list of callbacks of the running `fit`, or an empty list.

    Keras hands a callback no reference to the others; the `CallbackList` that is calling
    `on_train_begin` is found on the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return list(caller.callbacks)
        frame = frame.f_back
    return []
