"""Exact arithmetic on one axis: which samples frame t reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

# Note: [Exact intervals]
# Assumption: along time, a frame reaches an interval of samples whose ends grow with the frame at a constant rate.
# Failure: a rate and an offset alone are not exact. After a transposed convolution of stride 2, the first samples of frames
#   0, 1, 2, 3 are 0, 0, 1, 1: half a sample per frame, and never a half sample.
# Choice: each end is a whole-number function that repeats itself after ``period`` frames, ``rise`` samples later. Such
#   functions are closed under all operations here: shift, floor division, minimum and maximum.

#: The function t ↦ ⌊(times·t + plus) / over⌋, as its three numbers.
Floor = tuple[int, int, int]

#: The longest period that is followed.
LONGEST = 1 << 16


class TooFine(Exception):
    """A rate of frames needs a longer period than ``LONGEST``."""


@dataclass(frozen=True)
class Line:
    """A whole-number function with ``f(t + period) = f(t) + rise``.

    See Note: [Exact intervals].

    Attributes:
        values: f(0), …, f(period - 1).
        rise: the increase over one period.
    """

    values: tuple[int, ...]
    rise: int

    @property
    def period(self) -> int:
        """The number of frames after which the function repeats itself."""
        return len(self.values)

    @property
    def slope(self) -> Fraction:
        """Samples per frame, on average."""
        return Fraction(self.rise, self.period)

    @cached_property
    def grows(self) -> bool:
        """Whether the function never falls."""
        ahead = (*self.values[1:], self.values[0] + self.rise)
        return all(a <= b for a, b in zip(self.values, ahead, strict=True))

    def __call__(self, t: int) -> int:
        turns, rest = divmod(t, len(self.values))
        return self.values[rest] + self.rise * turns

    def of(self, times: int, plus: int, over: int = 1) -> Line:
        """Returns t ↦ f(⌊(times·t + plus) / over⌋).

        Raises:
            TooFine: the period would be too long.
        """
        if self.period == over == 1:
            return Line((self.values[0] + self.rise * plus,), self.rise * times)
        span = over * self.period
        period = span // math.gcd(times, span)
        if period > LONGEST:
            raise TooFine
        rise = self.rise * (times * period // span)
        return line([self((times * t + plus) // over) for t in range(period)], rise)

    def with_(self, other: Line, pick: Callable[..., int]) -> Line:
        """Returns t ↦ pick(f(t), g(t)), for two functions of one slope.

        Raises:
            TooFine: the period would be too long.
        """
        if self == other:
            return self
        period = math.lcm(self.period, other.period)
        if period > LONGEST:
            raise TooFine
        return line([pick(self(t), other(t)) for t in range(period)], self.rise * period // self.period)


def line(values: list[int], rise: int) -> Line:
    """Returns a Line with the shortest period."""
    size = len(values)
    for period in range(1, size):
        step, rest = divmod(rise * period, size)
        if not rest and not size % period and all(values[i] + step == values[i + period] for i in range(size - period)):
            return Line(tuple(values[:period]), step)
    return Line(tuple(values), rise)


IDENTITY = Line((0,), 1)
