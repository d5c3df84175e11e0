"""How a budget changes over the optimizer steps of a run: step -> value."""

import dataclasses
import math

from keras_compaware.base import Value, check_choice, check_integer, check_number, register


@register
@dataclasses.dataclass(frozen=True)
class Ramp(Value):
    """Drives a budget from `initial` to the value that its compressor or regularizer states.

    With p = clip((step - begin) / (end - begin), 0, 1) the value is

        polynomial:  final + (initial - final) * (1 - p) ** power
        cosine:      final + (initial - final) * (1 + cos(pi * p)) / 2

    The cubic polynomial is the gradual pruning schedule of Zhu & Gupta (2017, section 3). From
    step `end` on the value is `final` exactly, whatever the rounding before.

    Args:
        initial: Number: the value up to step `begin`, in the unit of the budget (a sparsity, a
            ratio, a strength).
        begin: Integer: optimizer step at which the ramp starts.
        end: Integer: optimizer step at which the final value is reached.
        shape: "polynomial" (default) or "cosine".
        power: Positive number: exponent of the polynomial. Default 3.

    Example:
    >>> ramp = Ramp(initial=0.0, begin=0, end=100, power=1)
    >>> ramp(50, final=0.8), ramp(100, final=0.8)
    (0.4, 0.8)
    """

    initial: float
    begin: int
    end: int
    shape: str = "polynomial"
    power: float = 3.0

    def __post_init__(self):
        check_number("Ramp", "initial", self.initial, 0.0, float("inf"))
        check_integer("Ramp", "begin", self.begin, 0)
        check_integer("Ramp", "end", self.end, 1)
        if self.end <= self.begin:
            raise ValueError(
                "Ramp: `end` must be greater than `begin`. "
                f"Received: begin={self.begin}, end={self.end}."
            )
        check_choice("Ramp", "shape", self.shape, tuple(_SHAPES))
        check_number("Ramp", "power", self.power, 0.0, float("inf"), low_open=True)

    def __call__(self, step, final):
        """Returns the budget at an optimizer step."""
        if step >= self.end:
            return final
        progress = max(0.0, (step - self.begin) / (self.end - self.begin))
        return final + (self.initial - final) * _SHAPES[self.shape](progress, self.power)


def _polynomial(progress, power):
    return (1.0 - progress) ** power


def _cosine(progress, power):
    del power
    return (1.0 + math.cos(math.pi * progress)) / 2.0


_SHAPES = {"polynomial": _polynomial, "cosine": _cosine}
