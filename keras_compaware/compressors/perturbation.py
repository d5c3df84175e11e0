"""Perturbations: maps that compress nothing, whose frequency matters in the same way."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_compaware.base import (
    MOST_SEEDS,
    Perturbation,
    as_kernel,
    check_choice,
    check_integer,
    check_number,
    register,
)


@register
@dataclasses.dataclass(frozen=True)
class WeightDecay(Perturbation):
    """Shrinks all weights by the same factor.

        w -> (1 - rate) * w

    Every p steps of size s along a direction of curvature h around w0, it makes training settle at
    w0 (1 - q) / (1 - q (1 - rate)) before the decay, with q = (1 - s h)^p: for small s h p an L2
    penalty of strength theta / p, where rate = s * theta; for large ones w0 again, so that rare
    and strong decay shrinks flat directions only (our derivation; Lee et al., 2021, report that
    frequency and strength of weight decay have to be chosen together).

    Args:
        rate: Number in [0, 1): fraction that is taken off every weight.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = np.array([[2.0, -4.0]], "float32")
    >>> np.asarray(keras.ops.convert_to_numpy(WeightDecay(0.25)(w)))
    array([[ 1.5, -3. ]], dtype=float32)
    """

    rate: float

    def __post_init__(self):
        check_number("WeightDecay", "rate", self.rate, 0.0, 1.0)
        if self.rate == 1.0:
            raise ValueError(
                "WeightDecay: `rate` must be below 1 (1 would set every weight to zero). "
                "Received: 1.0. It is the fraction taken off at once: learning rate times strength."
            )

    @property
    def budget(self):
        return "rate"

    def __call__(self, w, axes=None, budget=None, key=None):
        w, _, cast = as_kernel(w, axes)
        return cast(w * (1.0 - ops.cast(self.rate if budget is None else budget, "float32")))


@register
@dataclasses.dataclass(frozen=True)
class WeightNoise(Perturbation):
    """Adds independent noise of mean zero to all weights.

        w -> w + stddev * n,     n of mean 0 and variance 1

    Every p steps of size s along a direction of curvature h, the variance that is left before the
    next application is stddev^2 q^2 / (1 - q^2) with q = (1 - s h)^p, so stronger noise needs a
    longer period for the same loss (our derivation; Lee et al., 2021, study random weight noise at
    several frequencies, the distribution is our choice).

    The same `seed` and `key` give the same noise on one backend, different ones are independent.
    It is no `kernel_constraint=`: in a compiled step it would be the same noise every time.

    Args:
        stddev: Number of at least 0: standard deviation, in units of the weights.
        distribution: "uniform" (default), on +-sqrt(3) * stddev, or "normal".
        seed: Integer of at least 0. Default 0.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> w = keras.ops.convert_to_numpy(WeightNoise(0.1)(np.zeros((100, 100), "float32"), key=7))
    >>> round(float(w.std()), 2), bool(np.abs(w).max() < 0.18)
    (0.1, True)
    """

    stddev: float
    distribution: str = "uniform"
    seed: int = 0

    is_random = True

    def __post_init__(self):
        check_number("WeightNoise", "stddev", self.stddev, 0.0, float("inf"))
        check_choice("WeightNoise", "distribution", self.distribution, ("uniform", "normal"))
        check_integer("WeightNoise", "seed", self.seed, 0, high=MOST_SEEDS)

    @property
    def budget(self):
        return "stddev"

    def __call__(self, w, axes=None, budget=None, key=None):
        if isinstance(w, keras.Variable):
            raise ValueError(
                "WeightNoise cannot be a `kernel_constraint=`: inside the compiled training step "
                f"the noise would be the same every time. Received: the variable '{w.path}'. Use "
                "the callback `OccasionalCompression(WeightNoise(...), every=N)`; to apply the map "
                "by hand, pass a tensor and a key: `noise(layer.kernel.value, key=n)`."
            )
        check_integer("WeightNoise", "key", key, 0, high=MOST_SEEDS, optional=True)
        w, _, cast = as_kernel(w, axes)
        stddev = ops.cast(self.stddev if budget is None else budget, "float32")
        return cast(w + stddev * self._noise(w.shape, key or 0))

    def _noise(self, shape, key):
        # Neighbouring seeds need not give independent noise on every backend; mixed ones do.
        seed = int(np.random.SeedSequence((self.seed, key)).generate_state(1)[0] >> 1)
        if self.distribution == "normal":
            return keras.random.normal(shape, dtype="float32", seed=seed)
        bound = math.sqrt(3.0)
        return keras.random.uniform(shape, -bound, bound, dtype="float32", seed=seed)
