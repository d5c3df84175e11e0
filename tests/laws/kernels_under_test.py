"""The kernels that every method is tried on, with the axes that `find_targets` gives them.

They come from real, small Keras layers. All kernels have 48 or 144 entries on purpose: arrays of
equal shape share compiled operations, which is most of what these tests cost.
"""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import layers

from keras_compaware.base import KernelAxes
from keras_compaware.kernels import find_targets

# name -> (layer, shape of one input without the batch axis)
LAYERS = {
    "dense": (lambda: layers.Dense(6), (8,)),
    "conv1d": (lambda: layers.Conv1D(6, 2), (7, 4)),
    "conv2d": (lambda: layers.Conv2D(8, 3), (7, 7, 2)),
    "conv2d strided": (lambda: layers.Conv2D(8, 3, strides=2, padding="same"), (7, 7, 2)),
    "conv2d grouped": (lambda: layers.Conv2D(8, 3, groups=2), (7, 7, 4)),
    "conv3d": (lambda: layers.Conv3D(6, 2), (4, 4, 4, 3)),
    "depthwise conv1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (7, 8)),
    "depthwise conv2d": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (7, 7, 8)),
    "separable conv1d": (lambda: layers.SeparableConv1D(3, 3, depth_multiplier=2), (7, 8)),
    "separable conv2d": (lambda: layers.SeparableConv2D(3, 3, depth_multiplier=2), (7, 7, 8)),
    "conv1d transpose": (lambda: layers.Conv1DTranspose(4, 2), (7, 6)),
    "conv2d transpose": (lambda: layers.Conv2DTranspose(2, 3, strides=2), (7, 7, 8)),
    "conv3d transpose": (lambda: layers.Conv3DTranspose(3, 2), (4, 4, 4, 6)),
    "einsum heads": (lambda: layers.EinsumDense("abc,cde->abde", (None, 4, 6)), (5, 2)),
    "einsum merge": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 6)), (5, 2, 4)),
    "einsum batch": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 2)), (3, 8)),
    "einsum swapped": (lambda: layers.EinsumDense("...x,yx->...y", 8), (6,)),
    "embedding": (lambda: layers.Embedding(8, 6), (5,)),
}
SEPARABLE = ("depthwise_kernel", "pointwise_kernel")
NAMES = tuple(
    name if not name.startswith("separable") else f"{name} {attribute}"
    for name in LAYERS
    for attribute in (SEPARABLE if name.startswith("separable") else ("",))
)
# On JAX every operation is compiled anew for every shape, which takes minutes over all kernels; the
# others are left to the slow tests there. The other backends run all of them.
FAST_ON_JAX = ("conv2d grouped", "dense", "einsum batch")


def _fast(names):
    on_jax = keras.backend.backend() == "jax"
    slow = pytest.mark.slow
    return tuple(
        pytest.param(name, marks=slow) if on_jax and name not in FAST_ON_JAX else name
        for name in names
    )


# Blocks, batch axes, inputs last: for laws that are compiled and hardly depend on the layer.
FEW = _fast(("conv2d grouped", "depthwise conv2d", "conv2d transpose"))
EVERY = _fast(NAMES)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's name, shape and axes."""

    name: str
    shape: tuple
    axes: KernelAxes

    def random(self, seed=0):
        return np.random.default_rng(seed).normal(size=self.shape).astype("float32")


@functools.cache
def built(name):
    """A layer of the table, built."""
    make, shape = LAYERS[name]
    layer = make()
    layer.build((1, *shape))
    return layer


@functools.cache
def kernel(name):
    """The kernel of that name (one of `NAMES`)."""
    attribute = next((a for a in SEPARABLE if name.endswith(" " + a)), None)
    targets, skipped = find_targets(built(name.removesuffix(f" {attribute}")))
    assert not skipped
    target = next(t for t in targets if attribute is None or t.name == attribute)
    return Kernel(name, target.shape, target.axes)


def linear_maps(w, axes):
    """Yields the independent linear maps of a kernel as `(array, axes)`, views of `w`.

    One for every index along the axes without a role, and for every block of a grouped
    convolution: written with slices, so that nothing of the code under test is used.
    """
    batch = axes.batch(w.ndim)
    for index in np.ndindex(*(w.shape[axis] for axis in batch)):
        place = [slice(None)] * w.ndim
        for axis, i in zip(batch, index, strict=True):
            place[axis] = slice(i, i + 1)
        for block in range(axes.groups):
            if axes.groups > 1:
                out = axes.outputs[0]
                size = w.shape[out] // axes.groups
                place[out] = slice(block * size, (block + 1) * size)
            yield w[tuple(place)]


def matrices(w, axes, split="channel"):
    """Returns pairs of a linear map's view into `w` and a function that writes a matrix back."""
    first = (*axes.spatial, *axes.inputs)
    if split == "spatial":
        first = (*axes.spatial[:1], *axes.inputs)
    found = []
    for part in linear_maps(w, axes):
        rest = tuple(axis for axis in range(w.ndim) if axis not in first)
        moved = np.transpose(part, (*first, *rest))
        rows = int(np.prod([part.shape[axis] for axis in first]))
        matrix = moved.reshape(rows, -1)

        def write(values, moved=moved):
            moved[...] = values.reshape(moved.shape)

        found.append((matrix, write))
    return found


def unit_groups(shape, axes, role):
    """Returns a list of masks of the kernel's shape: the weights of every unit of a role."""
    number = np.arange(int(np.prod(shape))).reshape(shape)
    masks = []
    roles = axes.inputs if role == "inputs" else axes.outputs
    for part in linear_maps(number, axes):
        for index in np.ndindex(*(part.shape[axis] for axis in roles)):
            place = [slice(None)] * part.ndim
            for axis, i in zip(roles, index, strict=True):
                place[axis] = slice(i, i + 1)
            masks.append(np.isin(number, part[tuple(place)]))
    return masks
