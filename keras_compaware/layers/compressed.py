"""A layer that runs with compressed kernels and learns the latent ones."""

import functools

import keras
from keras import ops

from keras_compaware._math.backend import compiled, compiled_outside_graphs
from keras_compaware.base import Chain, Compressor, check_alpha, check_integer, register
from keras_compaware.kernels import find_targets, reason_to_skip

_CLEARLY = 0.1  # less of the squared error, for which a basis that follows its kernel is given up


@register
class Compressed(keras.layers.Wrapper):
    """Runs a layer with `C(w)` in place of each kernel w and passes the gradient straight to w.

    The forward pass uses the compressed kernel bit for bit; the gradient with respect to it is
    handed to the latent kernel unchanged (the straight-through estimator of Bengio et al., 2013).

    What would take too long in every step is kept as a variable, the basis of the kernel, which
    `CompressionCallback` (every `Recipe` brings one) fits when training begins. Of `LowRank` and
    `Tucker2` it is V, fitted again every so many steps, and in the training step the kernel is
    W V V^T, matrix products only; without a basis the kernel is used as it is. Of a quantizer it is
    the codebook or the scale, which follows the kernel: two rounds of its fit in every training
    step, from where the step before has left it. Every so many steps it is fitted from nothing as
    well, which counts only if the squared error is a tenth less. Without a basis it is fitted from
    nothing, as by C(w) itself. Once `fit` ends with that callback, the latent kernel itself becomes
    the kernel that the forward pass has used, and the basis is dropped; `compact` replaces the
    wrapper by the plain layer.

    Args:
        layer: Any layer with kernels that `register_kernels` knows, built or not.
        compressor: A `Compressor`. Of a `Chain`, only the first may need a decomposition, and it
            must state its rank or ratio: by energy it would depend on the kernel's values.
        every: Integer: optimizer steps between two refreshments of the basis, or changes of alpha.
            Default 100.
        alpha: `Ramp` for the share of the latent kernel, from 1 or less to 0: for example
            Ramp(1.0, begin=0, end=2000, power=1). Default None: C(w) from the beginning.
        **kwargs: As for any layer; the default name is that of the layer.

    Raises:
        ValueError: When the layer is built, if it has no kernel that can be compressed.

    Example:
    >>> import numpy as np
    >>> from keras_compaware import MagnitudePruning
    >>> layer = Compressed(keras.layers.Dense(4, use_bias=False), MagnitudePruning(0.5))
    >>> y = layer(np.eye(4, dtype="float32"))
    >>> int(np.sum(keras.ops.convert_to_numpy(y) != 0))
    8
    """

    def __init__(self, layer, compressor, every=100, alpha=None, **kwargs):
        if not isinstance(compressor, Compressor):
            raise TypeError(
                f"Compressed: `compressor` must be a Compressor. Received: {compressor!r}."
            )
        check_integer("Compressed", "every", every, 1)
        check_alpha("Compressed", alpha)
        _refuse_unsuitable(compressor)
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(f"Compressed: `layer` must be a Keras layer. Received: {layer!r}.")
        kwargs.setdefault("name", layer.name)
        super().__init__(layer, **kwargs)
        self.compressor = compressor
        self.every = every
        self.alpha = alpha
        self.share = None
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
        """Builds the inner layer if it has not built itself when this one was called."""
        if not self.layer.built and input_shape is not None:
            self.layer.build(input_shape)
        if self.layer.built and self.targets is None:
            self._find_kernels()

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(self, *args, **kwargs):
        # From the call, whatever its signature, and not from `compute_output_shape`.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_build_config(self):
        return {"layer": self.layer.get_build_config()} if self.layer.built else None

    def build_from_config(self, config):
        if not self.layer.built:
            self.layer.build_from_config(config["layer"])
        if self.targets is None:
            self._find_kernels()
        super().build_from_config({})

    def call(self, *args, training=None, **kwargs):
        # The inner layer takes `training` from the context of the call.
        state = {id(v): (v, v.value) for v in self.layer.variables}
        for target, compressed in self._forward_kernels(training):
            variable = target.variables[0]
            w = variable.value
            # The bracket is exactly zero, so that the forward kernel is C(w) to the bit.
            kernel = ops.stop_gradient(compressed) + (w - ops.stop_gradient(w))
            state[id(variable)] = (variable, kernel)
        kernels = {id(target.variables[0]) for target in self.targets}
        # All variables are carried in and the changed ones out: a scope hides the outer one.
        with keras.StatelessScope(
            list(state.values()), collect_losses=True, initialize_variables=False
        ) as scope:
            outputs = self.layer(*args, **kwargs)
        for variable in self.layer.non_trainable_variables:
            if id(variable) not in kernels:  # a frozen kernel stays the latent one
                variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss + 0.0)  # a new tensor: the same one would be counted twice on JAX
        return outputs

    def compute_mask(self, inputs, previous_mask=None):
        if isinstance(inputs, tuple):  # of `call(*args)` Keras hands on all arguments as one
            inputs, previous_mask = inputs[0], previous_mask and previous_mask[0]
        return self.layer.compute_mask(inputs, previous_mask)

    def forward_kernels(self):
        """Returns `[(target, kernel that the forward pass uses for it), ...]`."""
        return self._forward_kernels(training=False)

    def _forward_kernels(self, training):
        bases = self.bases or [None] * len(self.targets)
        return [
            (target, self._blended(target.read(), target.axes, basis, training))
            for target, basis in zip(self.targets, bases, strict=True)
        ]

    @property
    def is_fitted(self):
        """Whether every basis has been fitted; True of a compressor that has none."""
        return all(bool(ops.convert_to_numpy(ops.any(basis.value != 0))) for basis in self.bases)

    @property
    def auxiliary(self):
        """The variables that serve training only."""
        return [*self.bases, *([self.share] if self.share is not None else [])]

    def refresh(self):
        """Fits the bases to the present kernels. Not inside a training step.

        One that follows its kernel stays unless the new fit is clearly better, as every other fit
        moves many weights at once for little.
        """
        stays = self.is_fitted and not self.compressor.needs_decomposition
        for target, basis in zip(self.targets or [], self.bases, strict=False):
            if stays:
                following = _better_basis_map(self.compressor, target.axes)
                basis.assign(following(target.read(), ops.cast(basis.value, "float32")))
            else:
                basis.assign(_basis_map(self.compressor, target.axes)(target.read()))

    def blend(self, step):
        """Sets the share of the latent kernel to what the ramp says after an optimizer step."""
        if self.share is not None:
            self.share.assign(self.alpha.within(0, None)(step, 0.0))

    def release(self):
        """Drops the bases, so that the kernels, compressed by now, are used as they are."""
        for basis in self.bases:
            basis.assign(ops.zeros(basis.shape, basis.dtype))
        if self.share is not None:
            self.share.assign(0.0)

    def get_config(self):
        config = {
            "compressor": keras.saving.serialize_keras_object(self.compressor),
            "every": self.every,
            "alpha": keras.saving.serialize_keras_object(self.alpha),
        }
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["compressor"] = keras.saving.deserialize_keras_object(config["compressor"])
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        config["alpha"] = keras.saving.deserialize_keras_object(config.get("alpha"))
        return cls(**config)

    def _find_kernels(self):
        targets, skipped = find_targets(self.layer)
        targets = [t for t in targets if reason_to_skip(self.compressor, t) is None]
        if not targets:
            reasons = "; ".join(
                f"{entry.name or self.layer.name}: {entry.reason}" for entry in skipped
            )
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
                    aggregation="only_first_replica",  # they are equal
                )
                self.bases.append(basis)
        if self.alpha is not None:
            self.share = self.add_weight(
                shape=(),
                initializer=keras.initializers.Constant(self.alpha.initial),
                trainable=False,
                name="alpha",
                autocast=False,
            )

    def _blended(self, w, axes, basis, training):
        compressed = self._compressed(w, axes, basis, training)
        if self.share is None:
            return compressed
        alpha = ops.cast(self.share, w.dtype)
        return alpha * ops.convert_to_tensor(w) + (1.0 - alpha) * compressed

    def _compressed(self, w, axes, variable, training):
        compressor = self.compressor
        w = ops.stop_gradient(w)  # the gradient goes around the compressor
        if variable is None:
            return _kernel_map(compressor, axes)(w)
        basis = ops.cast(variable, "float32")
        if compressor.needs_decomposition:
            projected = compressor.decode(compressor.encode_on(basis, w, axes))
            return ops.where(ops.any(basis != 0), projected, w)
        compressed, following = _following_map(compressor, axes)(w, basis)
        if training:
            variable.assign(ops.stop_gradient(following))
        return compressed


def _refuse_unsuitable(compressor):
    first, *rest = compressor.compressors if isinstance(compressor, Chain) else (compressor,)
    for late in rest:
        if late.needs_decomposition:
            raise ValueError(
                f"Compressed: {late} needs a matrix decomposition, which must not run inside the "
                f"training step, and has no basis unless it comes first. Received: {compressor}. "
                "Put it first in the Chain, or compress by Every(...)."
            )
    if first.settles:
        raise ValueError(
            f"Compressed: {first} takes its rank from the kernel's values, so that it would change "
            "from one refreshment to the next. Give a rank or a ratio, or compress by Every(...), "
            "which keeps the rank of its first firing."
        )


@functools.lru_cache(maxsize=256)
def _kernel_map(compressor, axes):
    return compiled_outside_graphs(lambda w: compressor(w, axes=axes))


@functools.lru_cache(maxsize=256)
def _following_map(compressor, axes):
    """The kernel on a basis, and the basis after it; without one, what is fitted from nothing."""

    def following(w, basis):
        def on_basis():
            code, after = compressor.follow(basis, w, axes)
            return compressor.decode(code), after

        fitted = ops.any(basis != 0)
        return ops.cond(fitted, on_basis, lambda: (compressor(w, axes=axes), basis))

    return compiled_outside_graphs(following)


@functools.lru_cache(maxsize=256)
def _basis_map(compressor, axes):
    """The whole fit, compiled once: on JAX, loops are compiled at each call otherwise."""
    return compiled(lambda kernel: compressor.basis(kernel, axes))


@functools.lru_cache(maxsize=256)
def _better_basis_map(compressor, axes):
    """The basis that is kept, or the whole fit where it errs by a tenth less, compiled once."""

    def error_on(basis, kernel):
        difference = compressor.decode(compressor.encode_on(basis, kernel, axes)) - kernel
        return ops.sum(ops.square(ops.cast(difference, "float32")))

    def better(kernel, basis):
        found = compressor.basis(kernel, axes)
        is_better = error_on(found, kernel) < (1 - _CLEARLY) * error_on(basis, kernel)
        return ops.where(is_better, found, basis)

    return compiled(better)


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
