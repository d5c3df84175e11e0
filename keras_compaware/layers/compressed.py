"""A layer that runs with compressed kernels and learns the latent ones."""

import keras
from keras import ops

from keras_compaware.base import Compressor, check_integer, register
from keras_compaware.kernels import find_targets, reason_to_skip


@register
class Compressed(keras.layers.Wrapper):
    """Runs a layer with `C(w)` in place of each kernel w and passes the gradient straight to w.

    The forward pass uses the compressed kernel bit for bit; the gradient with respect to it is
    handed to the latent kernel unchanged (the straight-through estimator of Bengio et al., 2013).
    A compressor that needs a decomposition (`LowRank`) keeps the basis V of its kernel as a
    variable: in the training step the kernel is W V V^T, matrix products only, and
    `CompressionCallback` (every `Recipe` brings one) refreshes the basis. Until it is fitted, the
    kernel is used as it is. Once `fit` ends with that callback, the latent kernel itself is
    compressed; `compact` replaces the wrapper by the plain layer.

    Args:
        layer: Any layer with kernels that `register_kernels` knows, built or not.
        compressor: A `Compressor`.
        every: Integer: optimizer steps between two refreshments of the basis. Default 100.
        **kwargs: As for any layer; the default name is that of the layer.

    Raises:
        ValueError: When the layer is built, if it has no kernel that can be compressed.

    Example:

    >>> import numpy as np
    >>> layer = Compressed(keras.layers.Dense(4, use_bias=False), keras_compaware.MagnitudePruning(0.5))
    >>> y = layer(np.eye(4, dtype="float32"))
    >>> int(np.sum(keras.ops.convert_to_numpy(y) != 0))
    8
    """

    def __init__(self, layer, compressor, every=100, **kwargs):
        if not isinstance(compressor, Compressor):
            raise TypeError(f"Compressed: `compressor` must be a Compressor. Received: {compressor!r}.")
        check_integer("Compressed", "every", every, 1)
        kwargs.setdefault("name", layer.name)
        super().__init__(layer, **kwargs)
        self.compressor = compressor
        self.every = every
        self.supports_masking = layer.supports_masking
        self.targets = None
        self.bases = []
        if layer.built:
            self._find_kernels()

    def __call__(self, *args, **kwargs):
        if not self.layer.built:
            self.layer(*_specs(args), **_specs(kwargs))  # builds it, for any signature
        if self.targets is None:
            self._find_kernels()
        return super().__call__(*args, **kwargs)

    def build(self, input_shape=None):
        """The inner layer builds itself; nothing is left to build."""

    def call(self, *args, **kwargs):
        state = {id(v): (v, v.value) for v in self.layer.variables}
        bases = self.bases or [None] * len(self.targets)
        for target, basis in zip(self.targets, bases, strict=True):
            variable = target.variables[0]
            w = variable.value
            compressed = ops.stop_gradient(self._compressed(w, target.axes, basis))
            # The bracket is exactly zero, so that the forward kernel is C(w) to the bit.
            state[id(variable)] = (variable, compressed + (w - ops.stop_gradient(w)))
        # All variables are carried in and the changed ones out: a scope hides the outer one.
        with keras.StatelessScope(
            list(state.values()), collect_losses=True, initialize_variables=False
        ) as scope:
            outputs = self.layer(*args, **kwargs)
        for variable in self.layer.non_trainable_variables:
            variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss + 0.0)  # a new tensor: the same one would be counted twice on JAX
        return outputs

    def compute_mask(self, *args, **kwargs):
        return self.layer.compute_mask(*args, **kwargs)

    def refresh(self):
        """Fits the bases to the present kernels. Not inside a training step."""
        for target, basis in zip(self.targets or [], self.bases, strict=False):
            basis.assign(self.compressor.basis(target.read(), target.axes))

    def get_config(self):
        config = {
            "compressor": keras.saving.serialize_keras_object(self.compressor),
            "every": self.every,
        }
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["compressor"] = keras.saving.deserialize_keras_object(config["compressor"])
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config)

    def _find_kernels(self):
        targets, skipped = find_targets(self.layer)
        targets = [t for t in targets if reason_to_skip(self.compressor, t) is None]
        if not targets:
            reasons = "; ".join(f"{entry.name or self.layer.name}: {entry.reason}" for entry in skipped)
            raise ValueError(
                f"Compressed: the layer '{self.layer.name}' ({type(self.layer).__name__}) has no "
                f"kernel that {self.compressor} can compress. {reasons}"
            )
        self.targets = targets
        for number, target in enumerate(targets):
            shape = self.compressor.basis_shape(target.shape, target.axes)
            if shape is not None:
                basis = self.add_weight(
                    shape=shape,
                    initializer="zeros",
                    trainable=False,
                    name=f"basis_{number}",
                    autocast=False,
                )
                self.bases.append(basis)

    def _compressed(self, w, axes, basis):
        if basis is None:
            return self.compressor(w, axes=axes)
        basis = ops.convert_to_tensor(basis)
        fitted = ops.any(basis != 0)
        code = self.compressor.encode_on(basis, w, axes)
        return ops.where(fitted, self.compressor.decode(code), w)


def compressed_layers(model):
    """Returns all `Compressed` layers of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, Compressed)]


def _specs(arguments):
    """Symbolic stand-ins for the tensors among a layer's arguments."""

    def spec(value):
        if isinstance(value, keras.KerasTensor) or not hasattr(value, "shape"):
            return value
        return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))

    return keras.tree.map_structure(spec, arguments)
