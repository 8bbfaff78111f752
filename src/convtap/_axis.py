"""Exact arithmetic on one axis: which samples frame t reaches, and how many frames n samples make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

# Note: [Exact intervals]
# Assumption: along time, a frame reaches an interval of samples whose ends grow with the frame at a constant rate.
# Failure: a rate and an offset alone are not exact. A transposed convolution of stride 2 gives frames 0, 1, 2, 3 the first
#   samples 0, 0, 1, 1: half a sample a frame, and never a half sample.
# Choice: each end is a whole-number function that repeats itself after ``period`` frames, ``rise`` samples later. Such
#   functions are closed under everything that is done here: shift, floor division, minimum and maximum.

#: The longest period that is followed.
LONGEST = 1 << 16


class TooFine(Exception):
    """A rate of frames needs a longer period than is followed."""


@dataclass(frozen=True)
class Line:
    """A whole-number function with ``f(t + period) = f(t) + rise``. See Note: [Exact intervals].

    Attributes:
        values: f(0), …, f(period - 1).
        rise: what a period adds.
    """

    values: tuple[int, ...]
    rise: int

    @property
    def period(self) -> int:
        """After how many frames it repeats itself."""
        return len(self.values)

    @property
    def slope(self) -> Fraction:
        """Samples a frame, on average."""
        return Fraction(self.rise, self.period)

    @cached_property
    def grows(self) -> bool:
        """Whether it never falls."""
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
    """Makes a Line with the shortest period."""
    prime = 2
    rest = len(values)
    while rest > 1:
        while rest % prime:
            prime += 1
        rest //= prime
        while len(values) % prime == 0 and rise % prime == 0:
            part = len(values) // prime
            step = rise // prime
            if any(values[i + part] != values[i] + step for i in range(len(values) - part)):
                break
            values, rise = values[:part], step
    return Line(tuple(values), rise)


IDENTITY = Line((0,), 1)


@dataclass(frozen=True)
class Affine:
    """The step n ↦ ⌊(times·n + plus) / over⌋ of a count."""

    times: int
    plus: int
    over: int

    def __call__(self, n: int) -> int:
        return (self.times * n + self.plus) // self.over


@dataclass(frozen=True)
class CeilPool:
    """The step of a pooling with ``ceil_mode``: a last window that would begin in the right padding is left out."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def __call__(self, n: int) -> int:
        reach = n + 2 * self.padding - self.dilation * (self.kernel - 1) - 1
        frames = -(-reach // self.stride) + 1
        return frames - 1 if (frames - 1) * self.stride >= n + self.padding else frames


@dataclass(frozen=True)
class Window:
    """The step of a slice whose ends do not move with the length: frames ``start`` to ``stop``, every ``step``-th."""

    start: int
    stop: int
    step: int = 1

    def __call__(self, n: int) -> int:
        return max(0, -((self.start - min(self.stop, n)) // self.step))


@dataclass(frozen=True)
class Fixed:
    """The step to a number of frames that does not depend on the length."""

    frames: int

    def __call__(self, n: int) -> int:
        return self.frames


@dataclass(frozen=True)
class Aligned:
    """The step of a padding by ``base``, and by as much more as makes a whole number of windows."""

    base: int
    extent: int
    stride: int

    def __call__(self, n: int) -> int:
        return n + self.base + (self.extent - n - self.base) % self.stride


@dataclass(frozen=True)
class Multiple:
    """The step of a cut down to a multiple of a number of frames."""

    of: int

    def __call__(self, n: int) -> int:
        return n // self.of * self.of


@dataclass(frozen=True)
class Sum:
    """The first step of a count that is the sum of others, such as that of chunks joined again."""

    parts: tuple[Count, ...]

    def __call__(self, n: int) -> int:
        return sum(part(n) for part in self.parts)


@dataclass(frozen=True)
class Count:
    """How many frames an input of n samples makes: a chain of steps, in the order in which the operations ran.

    Attributes:
        steps: each takes a number of frames and gives the next one.
    """

    steps: tuple[Any, ...] = ()

    def __call__(self, n: int) -> int:
        """Returns the number of frames; 0 if a step on the way has none."""
        samples = n
        for step in self.steps:
            n = samples if getattr(step, "is_input", False) else step(n)
            if n <= 0:
                return 0
        return n

    def then(self, step: Any) -> Count:
        """Returns the count after one more operation."""
        last = self.steps[-1] if self.steps else None
        if isinstance(step, Affine) and step.times == step.over == 1:
            if not step.plus:
                return self
            if isinstance(last, Affine) and last.times == last.over == 1:
                return Count((*self.steps[:-1], Affine(1, last.plus + step.plus, 1)))
        return Count((*self.steps, step))

    def plus(self, frames: int) -> Count:
        """Returns the count with a number of frames more, or fewer."""
        return self.then(Affine(1, frames, 1))

    def guesses(self) -> list[Guess]:
        """Returns the steps that were read off one length only, and so may be wrong at another."""
        found: list[Guess] = []
        for step in self.steps:
            if isinstance(step, Guess):
                found.append(step)
            for part in step.parts if isinstance(step, Sum) else ():
                found.extend(part.guesses())
        return found


NO_STEPS = Count()


class Guess:
    """A step with numbers in it that the program may have computed, so that they may move with the length.

    ``x[..., 2:98]`` of 100 frames either drops the last two or takes a window of 96. Passes over other lengths tell.

    Attributes:
        what: the operation, for a message.
        n: the frames it was given.
        frames: the frames it made.
        moving: the step if its numbers move with the length.
        still: the step if they do not.
        given: the numbers as they were given to the operation, if there are any.
        chosen: the step that was found to be right, or None.
        is_input: whether it was found to make as many frames as the input has samples.
    """

    def __init__(
        self, what: str, n: int, frames: int, moving: Any, still: Any, given: Any = None, *, pads: bool = False
    ) -> None:
        self.what = what
        self.n = n
        self.frames = frames
        self.moving = moving
        self.still = still
        self.given = given
        self.chosen: Any = None
        self.is_input = False
        self._seen = {n: frames}
        self._inputs: dict[int, int] = {}
        self._pads = pads
        self._window: tuple[int, int] | None = None

    def aligns(self, extent: int, stride: int) -> None:
        """Notes that a window slides over the frames next, which a padding may have filled up for."""
        if self._pads and stride > 1:
            self._window = (extent, stride)

    def __call__(self, n: int) -> int:
        step = self.moving if self.chosen is None else self.chosen
        return int(step(n))

    @property
    def is_open(self) -> bool:
        """Whether nothing is known yet that explains all passes."""
        return self.chosen is None and not self.is_input

    def settle(self, other: Guess, samples: int, others: int) -> None:
        """Adds what the same operation did in a pass over another length, and chooses what explains all passes.

        Args:
            other: the same operation in the other pass.
            samples: the length of the input in this pass.
            others: the length in the other one.
        """
        self._seen[other.n] = other.frames
        self._inputs.update({samples: self.frames, others: other.frames})
        if len(self._seen) > 1:
            found = [step for step in (self.still, self.moving, *self._fits()) if self._explains(step)]
            self.chosen = found[0] if len(found) == 1 else None
            self.is_input = not found and all(length == frames for length, frames in self._inputs.items())

    def conclude(self) -> None:
        """Takes the plain step if it explains all passes, though others do too: no length at hand tells them apart."""
        if self.is_open and len(self._seen) > 1:
            plain = [step for step in (self.still, self.moving) if self._explains(step)]
            self.chosen = plain[0] if plain else None

    def _explains(self, step: Any) -> bool:
        return all(step(n) == frames for n, frames in self._seen.items())

    def _fits(self) -> list[Any]:
        """The fillings up to whole windows, and the cuts down to a multiple, that may explain the passes."""
        if self._window is not None:
            extent, stride = self._window
            bases = {frames - n - i for n, frames in self._seen.items() for i in range(stride)}
            return [Aligned(base, extent, stride) for base in sorted(bases)]
        if self.given is not None and self.given[0] == 0 and not self._pads:
            common = math.gcd(*self._seen.values())
            return [Multiple(m) for m in range(2, self.frames // 2 + 1) if common % m == 0]
        return []
