"""How much a model suffers from fewer channels here, or a lower rank there: each by itself."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_compaware._batches import batches, inputs_of
from keras_compaware._math.backend import compiled
from keras_compaware._text import text_table
from keras_compaware.base import check_integer
from keras_compaware.compaction.batch_norm import batch_statistics
from keras_compaware.compaction.rebuild import copy_model
from keras_compaware.compressors import LowRank
from keras_compaware.coupling import channel_spaces
from keras_compaware.kernels import find_targets
from keras_compaware.scores.ranks import lost_energies
from keras_compaware.scores.score import ChannelScore
from keras_compaware.search.groups import CHANNELS, Group, Groups
from keras_compaware.search.results import ResultsFile

_NOTHING = 1e-30  # a share of energy that counts as none
_NEARLY_NOTHING = 1e-3
PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What the loss becomes when one thing of a model is made smaller, and all else stays.

    Args:
        measure: What the loss is: "change of the outputs", the name of a loss, or
            "-log(energy kept)".
        baseline: The loss of the model as it is.
        channels: Mapping from names of channel spaces to mappings from numbers of channels kept to
            losses.
        ranks: Mapping from names of kernels to mappings from ranks to losses.
    """

    measure: str
    baseline: float
    channels: Mapping[str, Mapping[int, float]]
    ranks: Mapping[str, Mapping[int, float]]

    def to_json(self) -> dict[str, Any]:
        """Returns it as what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Sensitivity":
        """The inverse of `to_json`; the keys of JSON, which are text, become integers."""
        curves = (
            {name: {int(n): float(loss) for n, loss in curve.items()} for name, curve in of.items()}
            for of in (value["channels"], value["ranks"])
        )
        return cls(value["measure"], float(value["baseline"]), *curves)

    def losses(self, group: Group) -> np.ndarray:
        """Returns by how much the loss grows with each amount of a group, 0 for the last one.

        Between measured amounts it is interpolated, and no amount has less than a larger one.

        Raises:
            ValueError: If the group was not measured.
        """
        curves = self.channels if group.kind == CHANNELS else self.ranks
        if group.name not in curves:
            raise ValueError(
                f"The sensitivity of '{group.name}' ({group.kind}) was not measured; measured: "
                f"{', '.join(curves) or 'none'}. Measure again, or leave it out: `exclude=`."
            )
        amounts, values = zip(*sorted(curves[group.name].items()), strict=True)
        found = np.interp(group.amounts, [*amounts, group.whole], [*values, self.baseline])
        return np.maximum.accumulate(np.maximum(found - self.baseline, 0.0)[::-1])[::-1]

    def __str__(self) -> str:
        rows = [
            [name, kind, "  ".join(f"{n}: {loss:.4g}" for n, loss in sorted(curve.items()))]
            for kind, curves in (("channels", self.channels), ("rank", self.ranks))
            for name, curve in curves.items()
        ]
        title = f"{self.measure}, {self.baseline:.4g} as it is"
        return f"{title}\n{text_table(['name', 'what', 'how many: loss'], rows)}"


def sensitivity(
    model: keras.Model,
    data: Iterable | None = None,
    *,
    loss: str | Callable | None = None,
    score: str | ChannelScore | Callable | Mapping[str, np.ndarray] = "l2",
    channels: bool = True,
    ranks: bool = True,
    steps: int = 8,
    round_to: int = 1,
    exclude: str | Sequence[str] | None = None,
    allow_inexact: bool = False,
    num_batches: int | None = None,
    cache: PathLike | None = None,
    verbose: int = 0,
) -> Sensitivity:
    """Measures how the loss grows with fewer channels of each space and lower ranks of each kernel.

    One space or kernel is made smaller at a time, by about `steps` amounts, as in Li et al. (2017,
    section 3.2) for filters. Nothing is rebuilt: with fewer channels what reads the others is set
    to zero, which equals cutting them, and of a kernel the best approximation of that rank takes
    the place. Batch normalisation uses the statistics of each batch, of the changed model, as after
    `recalibrate_batch_norm`: batches should hold some tens of examples. All is done on a copy.

    Without `loss` no labels are needed: what is measured is

        -log(1 - sum ||f'(x) - f(x)||^2 / sum ||f(x)||^2)

    over all outputs, f' being the changed model, and at most 6.9: what is nearly lost counts many
    times, or a sum of losses would take one ruined layer for cheap. Without `data` it is told from
    the weights alone,

        -log(energy kept),

    the share that is kept of the squared scores, or squared singular values: adding up these means
    multiplying the energies of all layers, as Zhang et al. (2016, arXiv 1505.06798) do to select
    ranks. That costs nothing, and knows nothing of what the layers before and behind make of it.

    Args:
        model: A Sequential or functional model, nested ones included. It is not changed.
        data: Iterable of batches: x, or (x, y, ...); kept in memory. None: from the weights alone.
        loss: Name of a Keras loss, a `keras.losses.Loss`, or a function (y_true, y_pred) of batches
            that returns a value per example or their mean; for one output. `data` must then have y.
            Default: change of the outputs.
        score: As of `choose_channels`: the channels of highest score stay.
        channels: Whether to measure the spaces' channels.
        ranks: Whether to measure the kernels' ranks: of those that `choose_ranks` may factorise,
            "channel" split, without groups.
        steps: Integer of at least 1: how many amounts each is measured at. Default 8.
        round_to: Integer of at least 1: all amounts are multiples of it, but numbers of heads of
            attention. Default 1.
        exclude: Regular expression or a sequence of them, searched in the names of spaces and
            kernels: those are not measured.
        allow_inexact: As of `channel_spaces`.
        num_batches: Integer of at least 1: how many batches are taken. Default None: all.
        cache: File in which each measurement is kept, one line of JSON; a call that was interrupted
            goes on from there. It must be of this model, these data and arguments.
        verbose: 1 shows a progress bar. Default 0.

    Returns:
        A `Sensitivity`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, there is no batch, the loss is not finite, or
            the cache is of something else.

    Example:
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((4,)),
    ...         keras.layers.Dense(2, use_bias=False, name="hidden"),
    ...         keras.layers.Dense(1, use_bias=False, name="head"),
    ...     ]
    ... )
    >>> model.set_weights([np.eye(4, 2), np.array([[3.0], [1.0]])])
    >>> sensitivity(model, [np.eye(4)], ranks=False).channels  # 1 of 3^2 + 1^2 is lost
    {'hidden': {1: 0.105...}}
    """
    groups = Groups(model, score, channels, ranks, round_to, exclude, allow_inexact)
    return measure_groups(
        model,
        data,
        groups,
        loss=loss,
        steps=steps,
        num_batches=num_batches,
        cache=cache,
        verbose=verbose,
    )


def measure_groups(
    model: keras.Model,
    data: Iterable | None,
    groups: Groups,
    *,
    loss: str | Callable | None = None,
    steps: int = 8,
    num_batches: int | None = None,
    cache: PathLike | None = None,
    verbose: int = 0,
) -> Sensitivity:
    """As `sensitivity`, for groups that are found already: scores may cost much."""
    check_integer("sensitivity", "steps", steps, 1)
    check_integer("sensitivity", "num_batches", num_batches, 1, optional=True)
    if data is None and loss is not None:
        raise ValueError("sensitivity: a `loss` needs `data`, an iterable of batches (x, y).")
    if data is None:
        measured = _FromWeights(groups)
    else:
        if isinstance(loss, str):
            loss = keras.losses.get(loss)
        measured = _Measured(model, groups, _kept(model, data, num_batches), loss)
    points = [(group, n) for group in groups.all for n in _some(group, steps)]
    key = _fingerprint(measured, points) if cache is not None else ""
    known = _known(cache, key)
    bar = keras.utils.Progbar(len(points), verbose=verbose) if points else None
    curves: dict[str, dict[str, dict[int, float]]] = {"channels": {}, "rank": {}}
    baseline = _remembered(known, cache, key, "baseline", lambda: measured.loss(None, 0))
    for number, (group, amount) in enumerate(points, 1):
        identity = f"{group.kind}:{group.name}:{amount}"
        value = _remembered(
            known, cache, key, identity, lambda g=group, n=amount: measured.loss(g, n)
        )
        curves[group.kind].setdefault(group.name, {})[amount] = value
        bar.update(number)
    return Sensitivity(measured.name, baseline, curves["channels"], curves["rank"])


def _some(group, steps):
    """Returns about so many amounts of a group, evenly spaced from the least one, without whole."""
    amounts = group.amounts[:-1]
    places = np.unique(np.linspace(0, len(amounts) - 1, min(steps, len(amounts))).round())
    return [int(amounts[int(place)]) for place in places]


# ---- the cache ----------------------------------------------------------------------------------


def _known(cache, key):
    if cache is None:
        return {}
    records = ResultsFile(cache).load()
    for record in records:
        if record.get("key") != key:
            raise ValueError(
                f"sensitivity: the cache {os.fspath(cache)!r} was written for another model, other "
                "data or other arguments. Choose another file, or remove it."
            )
    return {record["id"]: record["loss"] for record in records}


def _remembered(known, cache, key, identity, compute):
    if identity not in known:
        value = compute()
        if not np.isfinite(value):
            raise ValueError(
                f"sensitivity: the loss ({identity}) is not finite. Look at the data for NaN, and "
                "train again from the last checkpoint without NaN."
            )
        if cache is not None:
            record = {"id": identity, "status": "done", "key": key, "loss": value}
            ResultsFile(cache).append(record)
        known[identity] = value
    return known[identity]


def _fingerprint(measured, points):
    digest = hashlib.sha256(repr([(g.kind, g.name, n) for g, n in points]).encode())
    for text, array in measured.identity():
        array = np.ascontiguousarray(array)
        digest.update(json.dumps([text, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- what is measured ---------------------------------------------------------------------------


def _kept(model, data, num_batches):
    """Returns a list of `(inputs, targets or None)`."""
    kept = []
    for batch in itertools.islice(batches("sensitivity", data), num_batches):
        inputs_of("sensitivity", model, batch)  # checks them
        _, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        kept.append((x, y))
    if not kept:
        raise ValueError("sensitivity: `data` yields no batch.")
    return kept


class _Measured:
    """Losses on data, of a copy of the model that is changed and restored."""

    def __init__(self, model, groups, kept, loss):
        self._copy = copy_model(model)
        self._call = compiled(self._copy.stateless_call)
        self._groups = groups
        self._data = kept
        self._loss = loss
        spaces = channel_spaces(self._copy, groups.allow_inexact)
        self._spaces = {space.name: space for space in spaces}
        self._kernels = {target.name: target for target in find_targets(self._copy)[0]}
        if loss is None:
            self.name = "change of the outputs"
            self._whole = [self._outputs(x) for x, _ in kept]
            self._size = sum(float(np.sum(np.square(y))) for out in self._whole for y in out)
            if not (np.isfinite(self._size) and self._size > 0):
                raise ValueError(
                    "sensitivity: the outputs of the model on `data` are all zero, or not finite."
                )
        else:
            self.name = getattr(loss, "name", None) or getattr(loss, "__name__", "loss")
            if any(y is None for _, y in kept):
                raise ValueError("sensitivity: a `loss` needs `data` with batches (x, y).")

    def identity(self):
        """Yields what the losses depend on: pairs of a text and an array."""
        yield self.name, np.zeros(0)
        for weight in self._copy.weights:
            yield weight.path, ops.convert_to_numpy(weight)
        for batch in self._data:
            for leaf in keras.tree.flatten(batch):
                yield "data", np.asarray([] if leaf is None else leaf)

    def loss(self, group, amount):
        """Returns the loss with an amount of a group; the model as it is if that is None."""
        if group is None:
            return self._value()
        change = self._fewer_channels if group.kind == CHANNELS else self._lower_rank
        before = change(group, amount)
        try:
            return self._value()
        finally:
            for variable, value in before:
                variable.assign(value)

    def _fewer_channels(self, group, amount):
        choices = self._groups.choices
        numbers = choices.sizes.copy()
        numbers[group.place] = amount
        space = self._spaces[group.name]
        kept = np.zeros(space.size, bool)
        kept[choices.kept(numbers)[group.name]] = True
        before = {}
        for member in space.members:
            if member.role != "consumer":
                continue
            variable = member.variable
            value = np.array(ops.convert_to_numpy(variable))
            before.setdefault(id(variable), (variable, value.copy()))
            dropped = (member.index_map >= 0) & ~kept[member.index_map]
            np.moveaxis(value, member.axis, 0)[dropped] = 0
            variable.assign(value)
        return list(before.values())

    def _lower_rank(self, group, amount):
        target = self._kernels[group.name]
        before = np.array(ops.convert_to_numpy(target.read()))
        target.write(LowRank(rank=amount)(ops.convert_to_tensor(before), axes=target.axes))
        return [(target.variables[0], before)]

    def _outputs(self, x):
        return [np.asarray(y, "float64") for y in keras.tree.flatten(self._predicted(x))]

    def _predicted(self, x):
        weights = self._copy.trainable_variables, self._copy.non_trainable_variables
        with batch_statistics(self._copy):
            found, _ = self._call(*([v.value for v in of] for of in weights), x)
        return keras.tree.map_structure(ops.convert_to_numpy, found)

    def _value(self):
        if self._loss is None:
            changes = (
                float(np.sum(np.square(a - b)))
                for (x, _), whole in zip(self._data, self._whole, strict=True)
                for a, b in zip(self._outputs(x), whole, strict=True)
            )
            return -math.log(max(1.0 - sum(changes) / self._size, _NEARLY_NOTHING))
        total, number = 0.0, 0
        for x, y in self._data:
            found = self._loss(ops.convert_to_tensor(y), self._predicted(x))
            size = len(keras.tree.flatten(y)[0])
            total += size * float(np.mean(ops.convert_to_numpy(found)))
            number += size
        return total / number


class _FromWeights:
    """What is kept of the energy: of squared scores of channels, and of squared singular values."""

    name = "-log(energy kept)"

    def __init__(self, groups):
        self._groups = groups
        self._curves = {}

    def identity(self):
        """Yields what the losses depend on."""
        for group in self._groups.all:
            yield group.name, self._energies(group)

    def loss(self, group, amount):
        """Returns -log(energy kept) with an amount of a group."""
        if group is None:
            return 0.0
        return -math.log(max(1.0 - float(self._energies(group)[amount]), _NOTHING))

    def _energies(self, group):
        if group.name not in self._curves:
            of = self._groups
            self._curves[group.name] = (
                of.choices.lost_energies(group.place)
                if group.kind == CHANNELS
                else lost_energies(of.kernels[group.place], "channel")
            )
        return self._curves[group.name]
