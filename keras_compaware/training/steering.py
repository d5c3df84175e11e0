"""Steering the strength of a proximal map towards what a `StrengthController` asks for."""

import functools
import math

import numpy as np
from keras import ops

from keras_compaware._math.axes import matrix_shape
from keras_compaware._math.backend import compiled
from keras_compaware.base import Proximal

_CORRECTIONS = 10  # at least, between the begin of an action and the end of its controller
_HORIZON = 5  # corrections: so much of the way at least is thought to be left


class Steering:
    """The controller of one action on all targets that have it, in one training.

    Args:
        action: A `Proximal` with a controller.
        targets: The targets that it acts on.
        model: The model that is trained.
        in_step: Whether the action acts inside the training step.

    Attributes:
        strength: What stands in for the regularizer's strength at present.
        name: Text that tells it from others of the same model.
        every, begin, end: When the strength is corrected, where the action acts inside the step.

    Raises:
        ValueError: If the target can never be met.
    """

    def __init__(self, action, targets, model, in_step):
        self.action, self.targets, self.in_step = action, targets, in_step
        self._controller = action.controller.within(action.begin, action.end)
        self.begin, self.end = action.begin, self._controller.end
        longest = max(1, (self.end - self.begin) // _CORRECTIONS)
        self.every = min(self._controller.every, longest) if in_step else action.every
        self.name = f"{targets[0].name}/controller"
        self.strength, self._step, self._stays = 0.0, None, None
        self._whole = model.count_params()
        self._others = self._whole - sum(math.prod(v.shape) for v in self._variables)
        self._select()

    def correct(self, step, since, summed):
        """Finds anew the strength and the groups that stay, after an optimizer step.

        Args:
            step: Optimizer steps done.
            since: The last one that the proximal map has taken into account.
            summed: Function `(first, last) -> sum of the learning rates of first + 1 .. last`.
        """
        if step == self._step and self._stays is not None:  # for another target
            return
        threshold, stays = self._select()
        last = max(self.end, since + _HORIZON * self.every)
        self.strength = threshold / max(summed(since, last), 1e-30) if step < self.end else 0.0
        self._step, self._stays = step, stays

    def stays(self, target):
        """Returns which groups of a target stayed at the last correction."""
        return next(s for t, s in zip(self.targets, self._stays, strict=True) if t is target)

    def get_state(self):
        """Returns what an interrupted run must restore, as plain JSON values."""
        return {"strength": self.strength, "step": self._step}

    def set_state(self, state):
        """Restores `get_state()`'s result."""
        self.strength, self._step = state["strength"], state["step"]

    @property
    def _variables(self):
        return {id(v): v for target in self.targets for v in target.variables}.values()

    def _thresholds(self, target):
        function = _critical(self.action.regularizer, target.axes)
        return np.array(ops.convert_to_numpy(function(target.read())))

    def _select(self):
        """Returns the threshold that meets the target, and which groups of each target stay."""
        found = [self._thresholds(target) for target in self.targets]
        if self._controller.parameters is None:
            values = np.concatenate(found)
            number = math.ceil(self._controller.dead_groups * values.size - 1e-9)
            last = float(np.partition(values, number - 1)[number - 1])
        else:
            last = self._by_parameters(found)
        if not math.isfinite(last):
            free = np.mean(np.isinf(np.concatenate(found)))
            raise ValueError(
                f"{self._controller} is out of reach: {self.action.regularizer} on "
                f"{len(self.targets)} targets ('{self.targets[0].name}', ...) leaves {free:.3g} of "
                "the groups unpenalised, and the rest does not suffice. Ask for less, or penalise "
                "more."
            )
        return last, [thresholds > last for thresholds in found]

    def _by_parameters(self, found):
        """The least threshold that leaves few enough parameters; infinity if there is none."""
        candidates = np.unique(np.concatenate([[0.0], *found]))
        candidates = candidates[np.isfinite(candidates)]
        allowed = self._controller.parameters * self._whole
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            left = [values > candidates[middle] for values in found]
            if self._others + self._parameters(left) <= allowed:
                high = middle
            else:
                low = middle + 1
        return float(candidates[low]) if low < len(candidates) else math.inf

    def _parameters(self, left):
        """Number of parameters of the targets, given which groups of each are left."""
        if self.targets[0].layout is not None:
            return _parameters_of_channels(self.targets, left)
        total = 0
        for target, groups in zip(self.targets, left, strict=True):
            split = self.action.regularizer.split
            _, rows, columns = matrix_shape(target.shape, target.axes, split)
            factors = int(np.count_nonzero(groups)) * (rows + columns)
            total += min(factors, math.prod(target.shape))
        return total


def steerings(assignments, model, in_step):
    """Returns the `Steering`s of assignments: one for each action that has a controller.

    Args:
        assignments: The assignments of a model.
        model: The model.
        in_step: Function `(target, action)`: whether the action acts inside the training step.

    Raises:
        ValueError: If a target can never be met.
    """
    found = {}
    for assignment in assignments:
        for action in assignment.actions:
            if isinstance(action, Proximal) and action.controller is not None:
                is_space = assignment.target.layout is not None
                _refuse_unknown(action, assignment.target)
                found.setdefault((action, is_space), []).append(assignment.target)
    return [
        Steering(action, targets, model, in_step(targets[0], action))
        for (action, _), targets in found.items()
    ]


def _refuse_unknown(action, target):
    by_rank = hasattr(action.regularizer, "split")
    if action.controller.parameters is not None and target.layout is None and not by_rank:
        raise ValueError(
            "StrengthController: what zeros in one kernel remove depends on its neighbours, so "
            f"`parameters` cannot steer {action.regularizer} on '{target.name}'. Give "
            "`dead_groups`, or put the rule into `channels` of the recipe."
        )


@functools.lru_cache(maxsize=256)
def _critical(regularizer, axes):
    return compiled(lambda w: regularizer.critical_thresholds(w, axes))


def _parameters_of_channels(targets, left):
    """Number of entries of the targets' variables that belong to no channel that vanishes."""
    places = {}  # id(variable) -> axis -> which places along it are left
    for target, channels in zip(targets, left, strict=True):
        layout = target.layout
        for variable, axis, index_map in zip(
            target.variables, layout.axes, layout.index_maps, strict=True
        ):
            index_map = np.asarray(index_map)
            kept = (index_map < 0) | channels[np.maximum(index_map, 0)]
            known = places.setdefault(id(variable), (variable, {}))[1]
            known[axis] = known.get(axis, True) & kept
    return sum(
        math.prod(
            int(np.count_nonzero(known[axis])) if axis in known else size
            for axis, size in enumerate(variable.shape)
        )
        for variable, known in places.values()
    )
