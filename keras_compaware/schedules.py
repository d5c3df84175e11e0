"""How a budget changes over the optimizer steps of a run: step -> value."""

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
