"""The vocabulary: compressors, proximal regularizers, codes, targets and actions.

Everything this package does to a kernel is one of two things that Keras users know already: a map
`kernel -> kernel` (a `keras.constraints.Constraint`) or a penalty `kernel -> scalar` (a
`keras.regularizers.Regularizer`) that also has a proximal map. *What* it is done to is a `Target`,
*when* it is done is an action. This module defines these words and imports nothing of the package.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

PACKAGE = "keras_compaware"
_MOST = float(np.finfo("float32").max)
_MOST_STEPS = 2**31 - 1  # what an optimizer counts on every backend
MOST_SEEDS = 2**64 - 1


def register(cls):
    """Registers a class for `keras.saving` under this package's name."""
    return keras.saving.register_keras_serializable(package=PACKAGE)(cls)


class Value:
    """Mixin for frozen dataclasses: the configuration is exactly the constructor's arguments.

    Values are immutable, hashable and compare by their fields, so that compiled functions can be
    cached by value, and `from_config(get_config())` is an equal value for every class.
    """

    def get_config(self):
        """Returns the constructor's arguments by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config):
        """Builds the value from `get_config()`'s result, nested Keras objects included."""
        check_keys(cls.__name__, config, [field.name for field in dataclasses.fields(cls)])
        return cls(**{name: _deserialize(value) for name, value in config.items()})

    def replace(self, **changes):
        """Returns a copy with some arguments changed."""
        return dataclasses.replace(self, **changes)


def _deserialize(value):
    if isinstance(value, Mapping) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    if isinstance(value, (list, tuple)):
        return tuple(_deserialize(item) for item in value)
    return value


def check_keys(owner, config, known):
    """Raises unless `config` is a mapping whose keys are all among `known`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"{owner}: a configuration must be a mapping. Received: {config!r}.")
    unknown = [key for key in config if key not in known]
    if unknown:
        raise ValueError(
            f"{owner}: a configuration may have the keys {', '.join(known)}. "
            f"Received: {', '.join(map(repr, unknown))}."
        )


def check_number(owner, name, value, low, high, *, low_open=False, optional=False):
    """Raises unless `value` is a number in [low, high] (or (low, high]), finite in float32."""
    if optional and value is None:
        return
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(
            f"{owner}: `{name}` must be a number in {interval}. "
            f"Received: {value!r} (of type {type(value).__name__})."
        )
    inside = (low < value if low_open else low <= value) and value <= high
    if not inside or value > _MOST:
        finite = " and finite in float32" if _MOST < value < math.inf else ""
        raise ValueError(f"{owner}: `{name}` must be in {interval}{finite}. Received: {value!r}.")


def check_integer(owner, name, value, low, *, high=_MOST_STEPS, optional=False):
    """Raises unless `value` is an integer of at least `low`, and of at most 31 bits or `high`."""
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(
            f"{owner}: `{name}` must be an integer of at least {low}. "
            f"Received: {value!r} (of type {type(value).__name__})."
        )
    if value < low:
        raise ValueError(f"{owner}: `{name}` must be at least {low}. Received: {value!r}.")
    if value > high:
        raise ValueError(f"{owner}: `{name}` must be at most {high}. Received: {value!r}.")


def check_bool(owner, name, value):
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{owner}: `{name}` must be True or False. "
            f"Received: {value!r} (of type {type(value).__name__})."
        )


def check_pair(owner, name, value, low, meaning):
    """Returns `value` as a tuple; raises unless it is a pair of integers of at least `low`."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(
            f"{owner}: `{name}` must be a pair of integers, {meaning}. Received: {value!r}."
        )
    for item in value:
        check_integer(owner, name, item, low)
    return tuple(value)


def check_choice(owner, name, value, choices):
    """Raises unless `value` is one of `choices`: texts, or None."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(
            f"{owner}: `{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {value!r}."
        )


@register
@dataclasses.dataclass(frozen=True)
class KernelAxes(Value):
    """Which axes of a kernel are which.

    Axes that are named nowhere are batch axes: the kernel is a stack of independent linear maps
    along them (the channels of a depthwise convolution).

    Args:
        inputs: Tuple of axes that run over input units (reduced by the layer).
        outputs: Tuple of axes that run over output units.
        spatial: Tuple of axes of the convolution window (reduced by the layer as well).
        groups: Number of blocks into which the output axis falls, each of which reads its own
            input channels (grouped convolution). Default 1.

    Example:
    >>> KernelAxes(inputs=(2,), outputs=(3,), spatial=(0, 1)).batch(4)
    ()
    """

    inputs: tuple = ()
    outputs: tuple = ()
    spatial: tuple = ()
    groups: int = 1

    def __post_init__(self):
        for name in ("inputs", "outputs", "spatial"):
            axes = getattr(self, name)
            if not isinstance(axes, (list, tuple)):
                raise TypeError(
                    f"KernelAxes: `{name}` must be a tuple of axes. Received: {axes!r}."
                )
            for axis in axes:
                check_integer("KernelAxes", name, axis, 0)
            object.__setattr__(self, name, tuple(map(int, axes)))
        named = self.inputs + self.outputs + self.spatial
        if len(set(named)) != len(named):
            raise ValueError(
                "KernelAxes: every axis may have one role only. Received: "
                f"inputs={self.inputs}, outputs={self.outputs}, spatial={self.spatial}."
            )
        check_integer("KernelAxes", "groups", self.groups, 1)
        if self.groups > 1 and len(self.outputs) != 1:
            raise ValueError(
                "KernelAxes: groups > 1 needs exactly one output axis. "
                f"Received: outputs={self.outputs}."
            )

    def batch(self, ndim):
        """Returns the axes of a kernel of `ndim` dimensions that have no role."""
        named = self.inputs + self.outputs + self.spatial
        if any(axis >= ndim for axis in named):
            raise ValueError(f"{self} does not fit a kernel of {ndim} dimensions.")
        return tuple(axis for axis in range(ndim) if axis not in named)


def axes_by_rank(ndim):
    """Returns the axes of a plain Keras kernel of `ndim` dimensions.

    Two dimensions are a Dense kernel (inputs, outputs); three to five are a Conv1D, Conv2D or
    Conv3D kernel (window..., inputs, outputs); one dimension is a vector of units.

    >>> axes_by_rank(4)
    KernelAxes(inputs=(2,), outputs=(3,), spatial=(0, 1), groups=1)
    """
    if ndim == 0:
        return KernelAxes()
    if ndim == 1:
        return KernelAxes(inputs=(0,))
    if ndim > 5:
        raise ValueError(
            f"The axes of a kernel of {ndim} dimensions are not known; pass `axes=KernelAxes(...)`."
        )
    return KernelAxes((ndim - 2,), (ndim - 1,), tuple(range(ndim - 2)))


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """What is stored of a compressed tensor.

    Args:
        parts: Arrays by name; a part that has been compressed further is itself a `Code`.
        bits: Bits that one stored element of a part takes, by name of the part.
        payload: Parts that a next compressor may compress, with their axes by name.
        shape: Shape of the tensor that `decode` restores.
        dtype: Its dtype, a string.
        axes: Its axes.
        counts: Number of stored elements, for parts of which only some are stored (the values
            that pruning keeps). Default: all elements of the part.
        mask: Name of the part that tells which payload elements are stored, if not all are.
        entrywise: Names of parts of shape (..., *shape), which hold something of every entry of the
            tensor; of a tensor that is stored in part (see `mask`) they are stored in part too.
        split: For factors that layers can take over, what they multiply to: the "channel" or the
            "spatial" matrices ("left" and "right"), or a "tucker" form ("input", "core" and
            "output"); else None.
        compressor: Of a code that is a part of another one, the compressor that decodes it.
    """

    parts: Mapping
    bits: Mapping
    payload: Mapping
    shape: tuple
    dtype: str
    axes: KernelAxes
    counts: Mapping = dataclasses.field(default_factory=dict)
    mask: str | None = None
    entrywise: tuple = ()
    split: str | None = None
    compressor: object = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", keras.backend.standardize_dtype(self.dtype))

    @property
    def num_bits(self):
        """Bits of all parts together: what a bit-packed file would hold, without its header."""
        total = 0
        for name, part in self.parts.items():
            if isinstance(part, Code):
                total += part.num_bits
            else:
                count = self.counts.get(name, math.prod(part.shape))
                total += math.ceil(int(count) * self.bits[name])
        return total

    def plain(self, compressor=None):
        """Returns the code with those parts decoded that are codes themselves.

        Args:
            compressor: What decodes parts that do not name their compressor.
        """
        parts = {
            name: (part.compressor or compressor).decode(part) if isinstance(part, Code) else part
            for name, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def arrays(self):
        """Returns the arrays of all parts, as nested dictionaries."""
        return {
            name: part.arrays() if isinstance(part, Code) else part
            for name, part in self.parts.items()
        }

    def with_arrays(self, arrays):
        """Returns this code with other arrays in its parts, given as `arrays()` gives them."""
        parts = {
            name: part.with_arrays(arrays[name]) if isinstance(part, Code) else arrays[name]
            for name, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)


class Compressor(Value, keras.constraints.Constraint):
    """A lossy codec for one tensor; as a Keras constraint, the map `w -> decode(encode(w))`.

    Subclasses are frozen dataclasses that hold hyper-parameters only: no variables, no masks, no
    step. They implement `__call__`, `encode` and `decode`; the law
    `decode(encode(w)) == self(w)` is tested for every one of them (equal bits for selections,
    1e-6 for factors).
    """

    needs_decomposition = False
    """Whether the map needs an SVD or the like and so must stay out of a compiled training step."""

    selects = False
    """Whether the map keeps some entries as they are and sets the others to zero."""

    warm_starts = False
    """Whether `encode` makes use of `previous`."""

    settles = False
    """Whether the budget is chosen from the kernel's values, see `settle`."""

    repeats = True
    """Whether encoding a decoded kernel finds the code again."""

    keeps_zeros = True
    """Whether zeros stay zero where they fill a slice, such as all that reads some input."""

    @property
    def budget(self):
        """Name of the argument that a `Ramp` drives, or None."""
        return None

    def __call__(self, w, axes=None, budget=None):
        """Returns the compressed kernel, in `w`'s shape and dtype.

        Args:
            w: Kernel, any float dtype; computed in float32.
            axes: `KernelAxes`; default: by the kernel's number of dimensions.
            budget: Scalar (may be traced) that stands in for the argument named by `budget`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")

    def encode(self, w, previous=None, axes=None, mask=None):
        """Returns the `Code` of a kernel.

        Args:
            w: Kernel.
            previous: The code of an earlier state of the same kernel, from which an iterative fit
                may start. It changes speed and the local optimum found, never the kind of result.
            axes: `KernelAxes`; default: by the kernel's number of dimensions.
            mask: Boolean tensor of `w`'s shape: the entries that are stored (others are zero).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define encode.")

    def decode(self, code):
        """Returns the kernel of a code, in its original shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not define decode.")

    def settle(self, w, axes=None):
        """Returns a compressor that repeats on later kernels the budget chosen on this one.

        A rank chosen by energy would fall at every application; the callback settles it once.
        """
        return self

    def reason_to_skip(self, shape, axes):
        """Returns why there is nothing to gain on kernels of this shape, or None.

        Raises:
            ValueError: If the arguments do not fit the shape (a rank above the kernel's).
        """
        return None

    def rank_of(self, shape, axes):
        """Returns the rank that compressed kernels of this shape have, where there is one."""
        return None

    def basis_shape(self, shape, axes):
        """Returns the shape of the basis that serves the map inside a training step, or None."""
        return None

    def basis(self, w, axes=None):
        """Returns the basis fitted to a kernel (outside the training step).

        What is worth keeping for the kernels of the next steps: the singular vectors of a low-rank
        kernel, the codebook or the scale of a quantized one.
        """
        raise ValueError(f"{self} has no basis.")

    def encode_on(self, basis, w, axes=None):
        """Returns the code of a kernel that is near the one to which a basis was fitted.

        Cheap enough for every training step, without decompositions or sorting: a low-rank kernel
        is projected; a codebook or a scale is fitted again for two rounds, starting from the basis.
        """
        raise ValueError(f"{self} has no basis.")

    def follow(self, basis, w, axes=None):
        """Returns `(code, basis)`: as `encode_on`, and the basis for the kernel of the next step.

        A codebook or a scale follows its kernel, by the rounds of every step; singular vectors
        stay.
        """
        return self.encode_on(basis, w, axes), basis

    def refuse_variable(self, w):
        """Raises if called by Keras as `kernel_constraint=` although a decomposition is needed."""
        if self.needs_decomposition and isinstance(w, keras.Variable):
            name = type(self).__name__
            raise ValueError(
                f"{name} needs a matrix decomposition, which must not run inside the compiled "
                f"training step, so it cannot be a `kernel_constraint=`. Received: the variable "
                f"'{w.path}'. Use the callback `OccasionalCompression({name}(...), every=N)`; to "
                f"apply the map by hand, pass a tensor: `compressor(layer.kernel.value)`."
            )


@register
@dataclasses.dataclass(frozen=True)
class Chain(Compressor):
    """Compresses the payload of each compressor by the next one.

    Codes are composed, not kernels: quantizing a kernel of rank r would destroy its rank, so
    `Chain([LowRank(ratio=0.25), UniformQuantization(8)])` quantizes the two factors, and
    `Chain([MagnitudePruning(0.9), UniformQuantization(4)])` quantizes the values that pruning
    keeps. The stored bits are counted accordingly.

    Args:
        compressors: Sequence of at least one `Compressor`, in the order in which they act.

    Example:
    >>> from keras_compaware import Chain, MagnitudePruning, UniformQuantization
    >>> import numpy as np
    >>> chain = Chain([MagnitudePruning(0.5), UniformQuantization(8)])
    >>> chain.encode(np.ones((4, 4), "float32")).num_bits  # mask, 8 codes of 8 bits, a scale
    112
    """

    compressors: tuple

    def __post_init__(self):
        if not isinstance(self.compressors, (list, tuple)) or not self.compressors:
            raise TypeError(
                "Chain: `compressors` must be a sequence of at least one Compressor. "
                f"Received: {self.compressors!r}."
            )
        for compressor in self.compressors:
            if not isinstance(compressor, Compressor):
                raise TypeError(
                    "Chain: every member must be a Compressor (constraints that compress nothing "
                    f"have no code to hand on). Received: {compressor!r}."
                )
        object.__setattr__(self, "compressors", tuple(self.compressors))

    @property
    def needs_decomposition(self):
        return any(compressor.needs_decomposition for compressor in self.compressors)

    repeats = False  # a decomposition does not find quantized factors again

    @property
    def selects(self):
        return self._first.selects

    @property
    def warm_starts(self):
        return any(compressor.warm_starts for compressor in self.compressors)

    @property
    def keeps_zeros(self):
        return all(compressor.keeps_zeros for compressor in self.compressors)

    @property
    def _first(self):
        return self.compressors[0]

    def __call__(self, w, axes=None, budget=None):
        self.refuse_variable(w)
        return self.decode(self.encode(w, axes=axes))

    def encode(self, w, previous=None, axes=None, mask=None):
        earlier = None if previous is None else previous.plain(self._rest)
        code = self._first.encode(w, axes=axes, previous=earlier, mask=mask)
        return self._compress_payload(code, previous)

    def encode_on(self, basis, w, axes=None):
        return self.follow(basis, w, axes)[0]

    def follow(self, basis, w, axes=None):
        code, basis = self._first.follow(basis, w, axes)
        return self._compress_payload(code, None), basis

    def decode(self, code):
        return self._first.decode(code.plain(self._rest))

    def settle(self, w, axes=None):
        first = self._first.settle(w, axes)
        rest = self.compressors[1:]
        if rest:
            code = first.encode(w, axes=axes)
            name, payload_axes = next(iter(code.payload.items()))
            settled = self._rest.settle(code.parts[name], payload_axes)
            rest = settled.compressors if isinstance(settled, Chain) else (settled,)
        return Chain((first, *rest))

    def reason_to_skip(self, shape, axes):
        return self._first.reason_to_skip(shape, axes)

    def rank_of(self, shape, axes):
        return self._first.rank_of(shape, axes)

    def basis_shape(self, shape, axes):
        return self._first.basis_shape(shape, axes)

    def basis(self, w, axes=None):
        return self._first.basis(w, axes)

    @property
    def _rest(self):
        if len(self.compressors) == 1:
            return None
        return self.compressors[1] if len(self.compressors) == 2 else Chain(self.compressors[1:])

    def _compress_payload(self, code, previous):
        rest = self._rest
        if rest is None:
            return code
        mask = None if code.mask is None else code.parts[code.mask]
        compressed = {}
        for name, axes in code.payload.items():
            earlier = None if previous is None else previous.parts[name]
            part = rest.encode(code.parts[name], previous=earlier, axes=axes, mask=mask)
            part = dataclasses.replace(part, compressor=rest)
            if name in code.counts:
                part = _store_only(part, code.counts[name])
            compressed[name] = part
        return dataclasses.replace(code, parts={**code.parts, **compressed})


def _store_only(code, count):
    """Counts only so many entries of the tensor in the parts that hold something of every entry."""
    counts, parts = dict(code.counts), dict(code.parts)
    for name in code.entrywise:
        part = parts[name]
        if isinstance(part, Code):
            parts[name] = _store_only(part, count)
        else:
            counts[name] = count * (math.prod(part.shape) // max(1, math.prod(code.shape)))
    return dataclasses.replace(code, counts=counts, parts=parts)


class Perturbation(Value, keras.constraints.Constraint):
    """A map of one tensor that compresses nothing: weight decay, weight noise.

    Subclasses are frozen dataclasses. An action applies them like a compressor, except that they
    have no code and are not applied once more at the end of training.
    """

    is_random = False
    """Whether `key` makes a difference."""

    @property
    def budget(self):
        """Name of the argument that a `Ramp` drives, or None."""
        return None

    def __call__(self, w, axes=None, budget=None, key=None):
        """Returns the perturbed kernel, in `w`'s shape and dtype.

        Args:
            w: Kernel, any float dtype; computed in float32.
            axes: `KernelAxes`; default: by the kernel's number of dimensions.
            budget: Scalar (may be traced) that stands in for the argument named by `budget`.
            key: Integer that tells one application from another; the callback derives it from the
                optimizer step and the target's name. Not traced.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")


class ProximalRegularizer(Value, keras.regularizers.Regularizer):
    """A penalty on one tensor together with its proximal map.

    As a Keras regularizer (`kernel_regularizer=`) it adds `self(w)` to the loss. Through `prox` it
    acts after the optimizer's update instead, which is what gives exact zeros. On one kernel it
    should act in one of the two ways, never in both.
    """

    needs_decomposition = False
    """Whether `prox` needs an SVD and so must stay out of a compiled training step."""

    @property
    def budget(self):
        """Name of the argument that a `Ramp` drives."""
        return "strength"

    def __call__(self, w, axes=None):
        """Returns the penalty, a float32 scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__.")

    def prox(self, w, step_size, axes=None, budget=None):
        """Returns `argmin_z 1/2 ||z - w||^2 + step_size * self(z)`.

        Args:
            w: Kernel.
            step_size: Scalar of at least 0, the optimizer's learning rate or its sum over the
                steps since the last application.
            axes: `KernelAxes`; default: by the kernel's number of dimensions.
            budget: Scalar (may be traced) that stands in for `strength`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define prox.")

    def rank(self, w, axes=None):
        """Returns the numerical rank of a kernel, where the penalty lowers it, else None."""
        return None

    def critical_thresholds(self, w, axes=None):
        """Returns the least `step_size * strength` at which `prox` makes each group zero.

        Groups are what the penalty makes zero as a whole: entries, groups of them, singular values.

        Returns:
            A float32 tensor, one-dimensional: 0 for groups that are zero, infinity for groups that
            are not penalised.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define critical_thresholds.")

    def prune(self, w, stays, axes=None):
        """Returns the kernel with some groups set to zero and the others as they are.

        Args:
            w: Kernel.
            stays: Boolean tensor: which groups stay, in the order of `critical_thresholds`.
            axes: `KernelAxes`; default: by the kernel's number of dimensions.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define prune.")

    def reason_to_skip(self, shape, axes):
        """Returns why there is nothing to gain on kernels of this shape, or None."""
        return None


@register
@dataclasses.dataclass(frozen=True)
class ChannelLayout(Value):
    """How slices of several weights stand together as one tensor (channels, parameters).

    Row c of the tensor holds all entries of the weights that belong to channel c. Where channels
    have different numbers of entries, the rows are filled up with zeros.

    Args:
        shapes: Tuple with the shape of every weight.
        axes: Tuple with the axis of every weight along which the channels stand.
        index_maps: Tuple with a tuple for every weight: the channel of each entry along that axis,
            -1 for entries that belong to none.
        size: Integer: number of channels.

    Example:
    >>> import numpy as np
    >>> layout = ChannelLayout(((3, 2), (2,)), axes=(1, 0), index_maps=((0, 1), (0, 1)), size=2)
    >>> kernel, bias = np.arange(6.0).reshape(3, 2), np.array([7.0, 8.0])
    >>> rows = layout.gather([kernel, bias])
    >>> np.asarray(keras.ops.convert_to_numpy(rows)).tolist()
    [[0.0, 2.0, 4.0, 7.0], [1.0, 3.0, 5.0, 8.0]]
    """

    shapes: tuple
    axes: tuple
    index_maps: tuple
    size: int

    def __post_init__(self):
        for name in ("shapes", "axes", "index_maps"):
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))

    @property
    def shape(self):
        """Shape of the tensor."""
        widths = [
            order.shape[1] * _rest(shape, axis)
            for shape, axis, (order, _) in zip(self.shapes, self.axes, self._places, strict=True)
        ]
        return (self.size, sum(widths))

    @property
    def num_parameters(self):
        """Number of entries of the weights that belong to channels."""
        return sum(
            sum(place >= 0 for place in index_map) * _rest(shape, axis)
            for shape, axis, index_map in zip(self.shapes, self.axes, self.index_maps, strict=True)
        )

    def gather(self, weights):
        """Returns the tensor (channels, parameters) of weights, which have the layout's shapes."""
        rows = []
        for weight, axis, (order, _) in zip(weights, self.axes, self._places, strict=True):
            entries = ops.moveaxis(weight, axis, 0)
            entries = ops.reshape(entries, (entries.shape[0], -1))
            if order.max() == entries.shape[0]:  # stands for entries that some channels do not have
                entries = ops.pad(entries, ((0, 1), (0, 0)))
            if not _is_in_order(order.reshape(-1), entries.shape[0]):
                entries = ops.take(entries, order.reshape(-1), axis=0)
            rows.append(ops.reshape(entries, (self.size, -1)))
        return ops.concatenate(rows, axis=1)

    def scatter(self, tensor, weights):
        """Returns the weights with the entries that belong to channels taken from a tensor."""
        results, begin = [], 0
        for weight, shape, axis, (order, places) in zip(
            weights, self.shapes, self.axes, self._places, strict=True
        ):
            rest = _rest(shape, axis)
            end = begin + order.shape[1] * rest
            entries = ops.reshape(tensor[:, begin:end], (order.size, rest))
            if not _is_in_order(places, order.size):
                entries = ops.take(entries, np.maximum(places, 0), axis=0)
            entries = ops.cast(entries, weight.dtype)
            others = (*shape[:axis], *shape[axis + 1 :])
            entries = ops.moveaxis(ops.reshape(entries, (shape[axis], *others)), 0, axis)
            if (places < 0).any():
                inside = (places >= 0).reshape([-1 if i == axis else 1 for i in range(len(shape))])
                entries = ops.where(inside, entries, weight)
            results.append(entries)
            begin = end
        return results

    @functools.cached_property
    def _places(self):
        """For every weight `(entries of each channel (channels, most), place of each entry)`.

        Where a channel has fewer entries than others, its row ends in the number of all entries.
        """
        found = []
        for index_map in map(np.asarray, self.index_maps):
            order = np.argsort(index_map, kind="stable")[np.count_nonzero(index_map < 0) :]
            channel = index_map[order]
            counts = np.bincount(channel, minlength=self.size)
            slot = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            table = np.full((self.size, counts.max()), len(index_map))
            table[channel, slot] = order
            places = np.full(len(index_map), -1)
            places[order] = channel * table.shape[1] + slot
            found.append((table, places))
        return found


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else int(value)


def _is_in_order(places, number):
    """Whether places are those of so many entries as they stand."""
    return np.array_equal(places, np.arange(number))


def _rest(shape, axis):
    """Number of entries for each place along an axis."""
    return math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What a map is applied to: one kernel, or slices of several weights that share their fate.

    Args:
        name: Unique path of layer names and the kernel's attribute: `backbone/conv1/kernel`.
        variables: The `keras.Variable`s that `read` and `write` touch.
        axes: Axes of the tensor that `read` returns.
        layer: The layer that owns the kernel (of several weights, the first).
        aliases: Further names under which the same variable is found (tied weights).
        is_head: Whether the kernel produces an output of the model (the classifier).
        layout: None for one kernel as it is; or a `ChannelLayout`: the target is the tensor
            (channels, parameters) of the variables' slices.
    """

    name: str
    variables: tuple
    axes: KernelAxes
    layer: object = None
    aliases: tuple = ()
    is_head: bool = False
    layout: ChannelLayout | None = None

    @property
    def shape(self):
        """Shape of the tensor that `read` returns."""
        return tuple(self.variables[0].shape) if self.layout is None else self.layout.shape

    @property
    def dtype(self):
        """Dtype of the tensor that `read` returns, a string."""
        dtypes = {keras.backend.standardize_dtype(v.dtype) for v in self.variables}
        return dtypes.pop() if len(dtypes) == 1 else keras.backend.result_type(*dtypes)

    @property
    def num_parameters(self):
        """Number of entries."""
        return math.prod(self.shape) if self.layout is None else self.layout.num_parameters

    def read(self):
        """Returns the tensor."""
        if self.layout is None:
            return self.variables[0].value
        return self.layout.gather(map(ops.convert_to_tensor, self.variables))

    def write(self, value):
        """Overwrites the tensor."""
        parts = [value]
        if self.layout is not None:
            parts = self.layout.scatter(value, map(ops.convert_to_tensor, self.variables))
        for variable, part in zip(self.variables, parts, strict=True):
            variable.assign(part)  # casts


def _check_window(owner, every, begin, end):
    check_integer(owner, "every", every, 1)
    check_integer(owner, "begin", begin, 0)
    check_integer(owner, "end", end, 0, optional=True)
    if end is not None and end <= begin:
        raise ValueError(
            f"{owner}: `end` must be greater than `begin` (steps in (begin, end] are regularized). "
            f"Received: begin={begin}, end={end}."
        )


def _check_is_ramp(owner, name, ramp):
    if not (callable(ramp) and hasattr(ramp, "initial") and hasattr(ramp, "within")):
        raise TypeError(f"{owner}: `{name}` must be a Ramp or None. Received: {ramp!r}.")


def _check_ramp(owner, ramp, subject, begin, end):
    if ramp is None:
        return
    _check_is_ramp(owner, "ramp", ramp)
    if getattr(subject, "budget", None) is None:
        raise ValueError(
            f"{owner}: {subject} has no budget that a ramp could drive; leave out `ramp`."
        )
    ramp.within(begin, end)


@register
@dataclasses.dataclass(frozen=True)
class Every(Value):
    """Action: overwrite the kernel by `constraint(kernel)` every `every` optimizer steps.

    This is the regularization frequency of Lee et al. (2021): nothing else in training changes,
    and between two firings the weights move freely. With t the number of optimizer steps done, it
    fires whenever `(t - begin) // every` has grown, for `begin < t <= end`, and at `end`. At the
    end of training a `Compressor` is applied once more; other constraints are not.

    With `hold=True` what a firing has set to zero stays zero until the next one, as in gradual
    pruning with a mask (Zhu & Gupta, 2017), and after the last one for good. That acts inside the
    training step, so the model is compiled with `recipe.optimizer(...)`.

    Args:
        every: Integer of at least 1: the period pNR in optimizer steps.
        constraint: Any `keras.constraints.Constraint`; a `Compressor` ends exactly compressed.
        begin: Integer: the last step of the warm-up without compression. Default 0.
        end: Integer or None: the last step at which it fires. Default None: no end.
        ramp: `Ramp` that drives the constraint's budget, or None.
        hold: Whether zeros stay zero between firings. Default False. Only for compressors that
            select the entries which they keep (pruning).

    Example:
    >>> Every(200, keras.constraints.MaxNorm(2.0)).every
    200
    """

    every: int
    constraint: keras.constraints.Constraint
    begin: int = 0
    end: int | None = None
    ramp: object = None
    hold: bool = False

    def __post_init__(self):
        _check_window("Every", self.every, self.begin, self.end)
        if not isinstance(self.constraint, keras.constraints.Constraint):
            raise TypeError(
                "Every: `constraint` must be a keras.constraints.Constraint, for example "
                f"MagnitudePruning(sparsity=0.9). Received: {self.constraint!r}."
            )
        _check_ramp("Every", self.ramp, self.constraint, self.begin, self.end)
        check_bool("Every", "hold", self.hold)
        if self.hold and not getattr(self.constraint, "selects", False):
            raise ValueError(
                "Every: `hold=True` keeps the zeros of a compressor that selects entries, such as "
                f"MagnitudePruning(0.9). Received: {self.constraint!r}."
            )

    @property
    def schedule(self):
        """The ramp with its steps filled in, or None."""
        return None if self.ramp is None else self.ramp.within(self.begin, self.end)


@register
@dataclasses.dataclass(frozen=True)
class Proximal(Value):
    """Action: apply the regularizer's proximal map every `every` optimizer steps.

    The step size is the learning rate summed over the steps since the last application, so that
    the objective does not depend on `every`.

    Args:
        regularizer: A `ProximalRegularizer`.
        every: Integer of at least 1, in optimizer steps. Default 1.
        begin: Integer: the last step without it. Default 0.
        end: Integer or None: the last step at which it acts. Default None: no end.
        ramp: `Ramp` that drives the regularizer's strength, or None.
        controller: `StrengthController` that finds the strength which reaches a target, or None.
            Like a ramp it changes the regularizer's strength, so give one of the two.
    """

    regularizer: ProximalRegularizer
    every: int = 1
    begin: int = 0
    end: int | None = None
    ramp: object = None
    controller: object = None

    def __post_init__(self):
        _check_window("Proximal", self.every, self.begin, self.end)
        _check_regularizer("Proximal", self.regularizer)
        _check_ramp("Proximal", self.ramp, self.regularizer, self.begin, self.end)
        _check_controller(self)

    @property
    def schedule(self):
        """The ramp with its steps filled in, or None."""
        return None if self.ramp is None else self.ramp.within(self.begin, self.end)


def _check_controller(action):
    controller = action.controller
    if controller is None:
        return
    if not hasattr(controller, "dead_groups"):
        raise TypeError(
            "Proximal: `controller` must be a StrengthController or None. "
            f"Received: {controller!r}."
        )
    if action.ramp is not None:
        raise ValueError("Proximal: `ramp` and `controller` both drive the strength: give one.")
    controller.within(action.begin, action.end)


def _check_regularizer(owner, regularizer):
    if not isinstance(regularizer, ProximalRegularizer):
        raise TypeError(
            f"{owner}: `regularizer` must be a ProximalRegularizer, for example GroupLasso(1e-4). "
            f"Received: {regularizer!r}."
        )


@register
@dataclasses.dataclass(frozen=True)
class Penalty(Value):
    """Action: add the regularizer to the loss, as `kernel_regularizer=` does.

    Args:
        regularizer: Any `keras.regularizers.Regularizer`.
    """

    regularizer: keras.regularizers.Regularizer

    def __post_init__(self):
        if not isinstance(self.regularizer, keras.regularizers.Regularizer):
            raise TypeError(
                "Penalty: `regularizer` must be a keras.regularizers.Regularizer. "
                f"Received: {self.regularizer!r}."
            )


@register
@dataclasses.dataclass(frozen=True)
class StraightThrough(Value):
    """Action: run the layer with the compressed kernel and pass the gradient to the latent one.

    Args:
        compressor: A `Compressor`.
        every: Integer: number of optimizer steps after which the callback refreshes the basis, if
            the compressor has one, and alpha. Default 100.
        alpha: `Ramp` from 1 or less to 0 for the share of the latent kernel in the forward pass,
            alpha * w + (1 - alpha) * C(w); or None: C(w) from the beginning.
    """

    compressor: Compressor
    every: int = 100
    alpha: object = None

    def __post_init__(self):
        check_integer("StraightThrough", "every", self.every, 1)
        _check_compressor("StraightThrough", self.compressor)
        check_alpha("StraightThrough", self.alpha)


def check_alpha(owner, alpha):
    """Raises unless `alpha` is None or a ramp that starts at no more than 1 and has an end."""
    if alpha is None:
        return
    _check_is_ramp(owner, "alpha", alpha)
    alpha.within(0, None)
    check_number(owner, "alpha.initial", alpha.initial, 0.0, 1.0)


@register
@dataclasses.dataclass(frozen=True)
class AtEnd(Value):
    """Action: compress once, at the end of training.

    After other compressors of the same rule it compresses their payload (see `Chain`): low rank
    every 100 steps and 8 bits at the end leave two factors of 8 bits.

    Args:
        compressor: A `Compressor`.
    """

    compressor: Compressor

    def __post_init__(self):
        _check_compressor("AtEnd", self.compressor)


def _check_compressor(owner, compressor):
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"{owner}: `compressor` must be a Compressor, for example LowRank(ratio=0.25). "
            f"Received: {compressor!r}."
        )


@register
@dataclasses.dataclass(frozen=True)
class Skip(Value):
    """Action: leave the kernel alone.

    Args:
        reason: Text that the plan shows. Default "left alone by a rule".
    """

    reason: str = "left alone by a rule"

    def __post_init__(self):
        if not isinstance(self.reason, str):
            raise TypeError(f"Skip: `reason` must be a text. Received: {self.reason!r}.")


ACTIONS = (Every, Proximal, Penalty, StraightThrough, AtEnd, Skip)


def as_kernel(w, axes):
    """Returns `(w as float32 tensor, axes, function that casts a result back to w's dtype)`."""
    tensor = ops.convert_to_tensor(w)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if "float" not in dtype:
        raise TypeError(f"A kernel must have a float dtype. Received: {dtype}.")
    if 0 in tensor.shape:
        raise ValueError(f"A kernel must have entries. Received: shape {tuple(tensor.shape)}.")
    axes = axes_by_rank(len(tensor.shape)) if axes is None else axes
    axes.batch(len(tensor.shape))
    if dtype == "float32":
        return tensor, axes, lambda result: result
    return ops.cast(tensor, "float32"), axes, lambda result: ops.cast(result, dtype)
