"""How a budget changes over the optimizer steps of a run: by a ramp, or towards a target."""

import dataclasses
import math
import numbers

from keras import ops

from keras_compaware.base import Value, check_choice, check_integer, check_number, register


@register
@dataclasses.dataclass(frozen=True)
class Ramp(Value):
    """Drives a budget from `initial` to the value that its compressor or regularizer states.

    With p = clip((step - begin) / (end - begin), 0, 1) and k = power the value is
    final + (initial - final) * r(p), where

        polynomial:   r(p) = (1 - p) ** k
        cosine:       r(p) = (1 + cos(pi * p)) / 2
        exponential:  r(p) = (exp(-k * p) - exp(-k)) / (1 - exp(-k))
        one_shot:     r(p) = 1 for p < 1

    and 0 at p = 1: from step `end` on the value is `final` exactly, whatever the rounding before.
    The cubic polynomial is the gradual pruning schedule of Zhu & Gupta (2017, section 3).

    An action with a window gives the three phases of training: steps up to its `begin` warm up,
    between `begin` and `end` the ramp compresses more and more, the action fires for the last time
    at `end` with the budget that was asked for, and afterwards the network heals.

    Args:
        initial: Number: the value up to step `begin`, in the unit of the budget (a sparsity, a
            ratio, a strength).
        begin: Integer: optimizer step at which the ramp starts. Default None: that of the action.
        end: Integer: optimizer step at which the final value is reached. Default None: that of the
            action.
        shape: "polynomial" (default), "cosine", "exponential" or "one_shot".
        power: Positive number: exponent of the polynomial, rate of the exponential. Default 3.

    Example:
    >>> ramp = Ramp(initial=0.0, begin=0, end=100, power=1)
    >>> ramp(50, final=0.8), ramp(100, final=0.8)
    (0.4, 0.8)
    """

    initial: float
    begin: int | None = None
    end: int | None = None
    shape: str = "polynomial"
    power: float = 3.0

    def __post_init__(self):
        check_number("Ramp", "initial", self.initial, 0.0, float("inf"))
        check_integer("Ramp", "begin", self.begin, 0, optional=True)
        check_integer("Ramp", "end", self.end, 1, optional=True)
        if self.end is not None and self.begin is not None and self.end <= self.begin:
            raise ValueError(
                "Ramp: `end` must be greater than `begin`. "
                f"Received: begin={self.begin}, end={self.end}."
            )
        check_choice("Ramp", "shape", self.shape, tuple(_SHAPES))
        check_number("Ramp", "power", self.power, 0.0, float("inf"), low_open=True)

    def within(self, begin, end):
        """Returns the ramp with the given steps in place of those that it does not state."""
        begin = self.begin if self.begin is not None else begin
        end = self.end if self.end is not None else end
        if end is None:
            raise ValueError(
                f"{self} does not know when the final value is reached. Give it an `end`, or give "
                "one to its action."
            )
        return self.replace(begin=begin, end=end)

    def __call__(self, step, final):
        """Returns the budget at an optimizer step.

        Args:
            step: Integer, or an integer scalar tensor (may be traced); then the result is a
                float32 tensor.
            final: Number: the value from step `end` on.
        """
        if self.begin is None or self.end is None:
            raise ValueError(
                f"{self} states no `begin` or no `end`; it takes them from an action: "
                "Every(100, ..., begin=500, end=5000, ramp=Ramp(0.0))."
            )
        if isinstance(step, numbers.Integral):
            if step >= self.end:
                return final
            progress = max(0.0, (step - self.begin) / (self.end - self.begin))
            return final + (self.initial - final) * _SHAPES[self.shape](progress, self.power, math)
        progress = (ops.cast(step, "float32") - self.begin) / (self.end - self.begin)
        rest = _SHAPES[self.shape](ops.clip(progress, 0.0, 1.0), self.power, ops)
        final = ops.cast(final, "float32")
        return ops.where(step >= self.end, final, final + (self.initial - final) * rest)


@register
@dataclasses.dataclass(frozen=True)
class StrengthController(Value):
    """Steers the strength of a regularizer so that a target is met at a given step.

    The strength that leaves half of the neurons is not known beforehand and differs from network to
    network; the threshold that removes the right number of groups now is known: every group has a
    product of step size and strength from which on the proximal map makes it zero (the norm of a
    group over its weight, a singular value). With tau that of the last group that has to go, the
    strength after optimizer step t is, until step `end`,

        strength(t) = tau(t) / (sum of the learning rates of the steps t + 1 .. end)

    so that the groups would vanish in time if training did not resist; as far as it does, the
    strength rises (towards the end the sum is taken over five corrections, lest more vanish than
    asked for). At `end` the groups up to tau, and no others, are set to zero, and the penalty is
    over. What acts inside the training step holds its zeros from there on, and what is left is
    trained without a bias. What the callback does every N steps (a nuclear norm) goes on to set to
    zero, at each firing, as much as the target needs.

    All targets of a rule share one strength. The number that the regularizer states counts only in
    proportion to its second strength, if it has one. This controller is ours: Alvarez & Salzmann
    (2017) and E & Gao (2019) take fixed strengths.

    Args:
        dead_groups: Number in (0, 1), or None: the fraction of groups that are zero, over all
            targets of a rule: channels or units, entries (`L1`), singular values (`NuclearNorm`).
        parameters: Number in (0, 1), or None: parameters that are left when dead channels are
            removed, or kernels factorised by their rank, over those of the model. For rules for
            channels, and for regularizers of singular values.
        end: Integer: optimizer step at which the target is met. Default None: that of the action.
        every: Integer of at least 1: optimizer steps after which the strength of what acts inside
            the training step is found anew, less if there would not be ten of them. Default 20.

    Exactly one of `dead_groups` and `parameters` must be given.

    Example:
    >>> from keras_compaware import GroupLasso, Proximal, Recipe, Rule
    >>> half = StrengthController(dead_groups=0.5, end=2000)
    >>> recipe = Recipe(channels=[Rule(None, Proximal(GroupLasso(1.0), controller=half))])
    """

    dead_groups: float | None = None
    parameters: float | None = None
    end: int | None = None
    every: int = 20

    def __post_init__(self):
        name = "StrengthController"
        if (self.dead_groups is None) == (self.parameters is None):
            raise ValueError(
                f"{name}: give exactly one of `dead_groups` and `parameters`. Received: "
                f"dead_groups={self.dead_groups!r}, parameters={self.parameters!r}."
            )
        for key in ("dead_groups", "parameters"):
            value = getattr(self, key)
            check_number(name, key, value, 0.0, 1.0, low_open=True, optional=True)
            if value == 1:
                raise ValueError(f"{name}: `{key}` must be below 1. Received: {value!r}.")
        check_integer(name, "end", self.end, 1, optional=True)
        check_integer(name, "every", self.every, 1)

    def within(self, begin, end):
        """Returns the controller with an end, that of an action if it states none."""
        controller = self if self.end is not None else self.replace(end=end)
        if controller.end is None:
            raise ValueError(
                f"{self} does not know by which step the target is to be met. Give it an `end`, or "
                "give one to its action."
            )
        if controller.end <= begin or (end is not None and controller.end > end):
            raise ValueError(
                "StrengthController: `end` must be a step at which the action acts. Received: "
                f"end={controller.end}, and an action from begin={begin} to end={end}."
            )
        return controller


def _polynomial(progress, power, functions):
    del functions
    return (1.0 - progress) ** power


def _cosine(progress, power, functions):
    del power
    return (1.0 + functions.cos(math.pi * progress)) / 2.0


def _exponential(progress, power, functions):
    end = math.exp(-power)
    return (functions.exp(-power * progress) - end) / (1.0 - end)


def _one_shot(progress, power, functions):
    del progress, power, functions
    return 1.0


_SHAPES = {
    "polynomial": _polynomial,
    "cosine": _cosine,
    "exponential": _exponential,
    "one_shot": _one_shot,
}
