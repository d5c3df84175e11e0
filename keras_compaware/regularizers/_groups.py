"""What the lassos of groups share: the groups of a kernel, their penalty and its proximal map."""

import math

import numpy as np
from keras import ops

from keras_compaware._math import shrinkage, views
from keras_compaware._math.axes import matricise, matrix_shape, tile, tile_shape, unit_layout
from keras_compaware.base import (
    ProximalRegularizer,
    as_kernel,
    check_bool,
    check_choice,
    check_number,
    check_pair,
)

_HUGE = 1e18
_HALVINGS = 26  # as many as float32 resolves


class GroupPenalty(ProximalRegularizer):
    """A lasso of groups and of entries, over all or some of them.

        R(w) = strength * sum_g c_g ||w_g||_2 + l1_strength * sum_g ||w_g||_1

    Subclasses are frozen dataclasses with the fields `strength`, `axis`, `weighted`, `block` and,
    if there is one, `l1_strength`; they say which groups and entries are penalised.
    """

    def __call__(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        view, _ = self._arrange(w, axes)
        _, units = self._layout(w.shape, axes)
        selected = self._selected(w.shape, axes)
        view = _where(selected, view, ops.zeros_like(view))
        norms, _ = views.groups(view, units)
        penalties = self.strength * self._weights(w.shape, axes, selected) * norms
        if self._l1_strength:
            penalties = penalties + self._l1_strength * _sums(magnitude(view), units)
        spared = self._num_spared(w.shape, axes)
        if spared:
            mask = shrinkage.largest(ops.stop_gradient(penalties), spared)
            penalties = ops.where(mask, 0.0, penalties)
        return ops.sum(penalties)

    def prox(self, w, step_size, axes=None, budget=None):
        w, axes, cast = as_kernel(w, axes)
        view, restore = self._arrange(w, axes)
        _, units = self._layout(w.shape, axes)
        selected = self._selected(w.shape, axes)
        step = ops.cast(step_size, "float32")
        strength = self.strength if budget is None else ops.cast(budget, "float32")
        threshold = step * (strength * self._weights(w.shape, axes, selected))
        entry_threshold = 0.0
        if self._l1_strength:
            entry_threshold = step * in_proportion(self._l1_strength, self.strength, budget)

        result = _where(selected, view, ops.zeros_like(view))
        if self._l1_strength:
            magnitudes, rebuild = views.entries(result)
            result = rebuild(shrinkage.soft(magnitudes, entry_threshold))
        norms, rebuild = views.groups(result, units)
        norms = shrinkage.soft(norms, threshold)
        result = rebuild(norms)
        spared = self._num_spared(w.shape, axes)
        if spared:
            costs = _costs(view, result, norms, threshold, entry_threshold, units)
            places = [size if axis in units else 1 for axis, size in enumerate(view.shape)]
            spared = ops.reshape(shrinkage.largest(costs, spared), places)
            result = ops.where(spared, view, result)
        return cast(restore(_where(selected, result, view)))

    def num_groups(self, shape, axes):
        """Returns the number of groups of a kernel of this shape."""
        shape, units = self._layout(shape, axes)
        return math.prod(shape[axis] for axis in units)

    def critical_thresholds(self, w, axes=None):
        w, axes, _ = as_kernel(w, axes)
        view, _ = self._arrange(w, axes)
        _, units = self._layout(w.shape, axes)
        selected = self._selected(w.shape, axes)
        weights = self._weights(w.shape, axes, selected)
        view = _where(selected, view, ops.zeros_like(view))
        norms, _ = views.groups(view, units)
        # Of a group in which nothing is penalised the weight is 0.
        thresholds = ops.where(weights > 0, norms / ops.maximum(weights, 1e-30), math.inf)
        if self._l1_strength:
            thresholds = self._with_entries(thresholds, weights, view, units)
        spared = shrinkage.largest(thresholds, self._num_spared(w.shape, axes))
        return ops.reshape(ops.where(spared, math.inf, thresholds), (-1,))

    def prune(self, w, stays, axes=None):
        w, axes, cast = as_kernel(w, axes)
        view, restore = self._arrange(w, axes)
        _, units = self._layout(w.shape, axes)
        places = [size if axis in units else 1 for axis, size in enumerate(view.shape)]
        rest = _where(self._selected(w.shape, axes), ops.zeros_like(view), view)
        return cast(restore(ops.where(ops.reshape(stays, places), view, rest)))

    # ---- for subclasses -----------------------------------------------------------------------

    def _with_entries(self, thresholds, weights, view, units):
        """The critical thresholds where entries are penalised as well, by bisection.

        With r = l1_strength / strength, the root of ||max(|w_g| - r t, 0)||_2 - c_g t, which falls.
        """
        rate = self._l1_strength / self.strength
        places = [size if axis in units else 1 for axis, size in enumerate(view.shape)]
        finite = ops.where(thresholds < math.inf, thresholds, 0.0)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            left = shrinkage.soft(ops.abs(view), rate * ops.reshape(middle, places))
            vanishes = views.groups(left, units)[0] <= weights * middle
            return ops.where(vanishes, low, middle), ops.where(vanishes, middle, high)

        _, high = ops.fori_loop(0, _HALVINGS, halve, (ops.zeros_like(finite), finite))
        return ops.where(thresholds < math.inf, high, thresholds)

    def _check(self):
        """Checks the fields that all of these have."""
        name = type(self).__name__
        check_number(name, "strength", self.strength, 0.0, math.inf)
        instead = "for the entries alone use L1"
        check_further_strength(name, "l1_strength", self._l1_strength, self.strength, instead)
        check_choice(name, "axis", self.axis, ("inputs", "outputs"))
        check_bool(name, "weighted", self.weighted)
        if self.block is not None:
            block = check_pair(name, "block", self.block, 1, "rows and columns of a tile")
            object.__setattr__(self, "block", block)
            if self.axis == "outputs":
                raise ValueError(
                    f"{name}: give `axis` (groups are units) or `block` (groups are tiles), not "
                    f"both. Received: axis={self.axis!r}, block={self.block!r}."
                )

    def _penalised(self, shape, axes):
        """Which places of the layout are penalised: a mask that broadcasts to it; None for all."""
        return None

    def _num_spared(self, shape, axes):
        """How many groups are free because they are the largest."""
        return 0

    # ---- the groups ---------------------------------------------------------------------------

    @property
    def _l1_strength(self):
        return getattr(self, "l1_strength", 0.0)

    def _layout(self, shape, axes):
        """`(shape in which the groups lie apart, axes of it along which they stand)`."""
        if self.block is None:
            return unit_layout(shape, axes, self.axis)
        return tile_shape(matrix_shape(shape, axes), self.block), (0,)

    def _arrange(self, w, axes):
        """Returns `(the kernel in that layout, function that undoes it)`."""
        if self.block is None:
            shape, _ = self._layout(w.shape, axes)
            if shape == tuple(w.shape):
                return w, lambda view: view
            return ops.reshape(w, shape), lambda view: ops.reshape(view, w.shape)
        matrix, fold = matricise(w, axes)
        tiles, join = tile(matrix, self.block)
        return tiles, lambda view: fold(join(view))

    def _selected(self, shape, axes):
        """`_penalised` without the padding of tiles, a NumPy mask or None."""
        penalised = self._penalised(shape, axes)
        if self.block is None:
            return penalised
        inside = _inside_tiles(matrix_shape(shape, axes), self.block)
        if inside is None or penalised is None:
            return penalised if inside is None else inside
        return inside & penalised

    def _weights(self, shape, axes, selected):
        """Weight c_g of every group: a tensor (1, number of groups), or a float for all of them."""
        if not self.weighted:
            return 1.0
        shape, units = self._layout(shape, axes)
        if selected is None:
            return math.sqrt(views.group_size(shape, units))
        rest = tuple(axis for axis in range(len(shape)) if axis not in units)
        places = [shape[a] if a in units else size for a, size in enumerate(selected.shape)]
        sizes = np.broadcast_to(selected, places).sum(axis=rest).reshape(1, -1)
        sizes = sizes * math.prod(shape[axis] for axis in rest if selected.shape[axis] == 1)
        return ops.convert_to_tensor(np.sqrt(sizes).astype("float32"))


def magnitude(w):
    """The absolute values, with gradient 0 at 0 on every backend."""
    return w * ops.stop_gradient(ops.sign(w))


def in_proportion(further, strength, budget):
    """Returns a further strength, scaled as a budget scales `strength`."""
    if budget is None or not further:
        return ops.cast(further, "float32")
    return (further / strength) * ops.cast(budget, "float32")


def check_further_strength(owner, name, value, strength, instead):
    """Raises unless `value` is a strength that can be driven in proportion to `strength`."""
    check_number(owner, name, value, 0.0, math.inf)
    if value > 0 and strength == 0:
        raise ValueError(
            f"{owner}: `strength` must be above 0, since a ramp drives it and `{name}` in "
            f"proportion; {instead}. Received: strength={strength!r}, {name}={value!r}."
        )


def _where(mask, w, otherwise):
    return w if mask is None else ops.where(mask, w, otherwise)


def _sums(magnitudes, units):
    rest = tuple(axis for axis in range(len(magnitudes.shape)) if axis not in units)
    return ops.reshape(ops.sum(magnitudes, axis=rest), (1, -1))


def _costs(w, shrunk, norms, threshold, entry_threshold, units):
    """What shrinking costs each group, min_z ||z - w_g||^2 / 2 + t R_g(z), up to one factor.

    Args:
        w: Kernel with its groups apart.
        shrunk: Where these minima are reached.
        norms: The norms of its groups, (1, number of groups).
        threshold: Threshold of the groups.
        entry_threshold: Threshold of the entries.
        units: Axes along which the groups stand.
    """
    scale = ops.max(ops.abs(w))
    scale = ops.where(scale > 0, scale, 1.0)
    costs = 0.5 * _sums(ops.square((w - shrunk) / scale), units)
    costs = costs + ops.minimum(threshold / scale, _HUGE) * (norms / scale)
    rate = ops.minimum(entry_threshold / scale, _HUGE)
    return costs + rate * _sums(ops.abs(shrunk / scale), units)


def _inside_tiles(stacked, block):
    """Which entries of tiles (number, rows, columns) are no padding; None if all."""
    stack, *whole = stacked
    number, *size = tile_shape(stacked, block)
    down, across = (
        np.arange(-(-extent // step) * step).reshape(-1, step) < extent
        for extent, step in zip(whole, size, strict=True)
    )
    if down.all() and across.all():
        return None
    inside = down[:, None, :, None] & across[None, :, None, :]
    return np.broadcast_to(inside, (stack, *inside.shape)).reshape(number, *size)
