"""Exact arithmetic on one axis: how many frames n samples make, and which of several ways of counting is the right one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


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

    def guesses(self) -> list[Guess]:
        """Returns the steps that were read off one length only, and so may be wrong at another."""
        found: list[Guess] = []
        for step in self.steps:
            if isinstance(step, Guess):
                found.append(step)
            for part in step.parts if isinstance(step, Sum) else ():
                found.extend(part.guesses())
        return found


@dataclass(frozen=True)
class Digit:
    """One axis of a tensor, or a part of one, that counts frames.

    Cutting time into segments gives two of them: the segment and the frame in it. Frame numbers are sums: position on
    the axis times ``weight``, over all digits.

    Attributes:
        dim: the tensor's axis.
        size: how many positions.
        inner: the size of what varies faster within the same axis (1 unless axes were merged).
        weight: frames from one position to the next.
        count: positions for a given number of input samples.
        stacked: whether the positions are tensors that were stacked, each with frames that see other samples.
    """

    dim: int
    size: int
    inner: int = 1
    weight: int = 1
    count: Count = Count()
    stacked: bool = False

    def frames(self, n: int) -> int:
        """How many frames the axis ends after, for an input of n samples."""
        return self.count(n) * self.weight

    @property
    def is_open(self) -> bool:
        """Whether the frames at other lengths than the example's are not known, so that nothing can be excluded."""
        return any(guess.is_open for guess in self.count.guesses())


#: In how many passes the plain step must explain what was seen, if others explain it too.
_CONVINCING = 4


class Guess:
    """A step with numbers in it that the program may have computed, so that they may move with the length.

    ``x[..., 2:98]`` of 100 frames either drops the last two or takes a window of 96. Passes over other lengths tell.

    Attributes:
        what: the operation, for a message.
        n: the frames it had.
        frames: the frames it made.
        moving: the step if its numbers move with the length.
        still: the step if they do not; by default, to the number of frames it made.
        given: the numbers as they were written, if there are any.
        chosen: the step that was found to be right, or None.
        is_input: whether it was found to make as many frames as the input has samples.
    """

    def __init__(
        self, what: str, n: int, moving: Any, still: Any = None, given: Any = None, *, pads: bool = False
    ) -> None:
        self.what = what
        self.n = n
        self.frames = int(moving(n))
        self.moving = moving
        self.still = still or Fixed(self.frames)
        self.given = given
        self.chosen: Any = None
        self.is_input = False
        self._seen = {(n, self.frames)}
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
        self._seen.add((other.n, other.frames))
        self._inputs.update({samples: self.frames, others: other.frames})
        self._choose(is_sure=len(self._seen) >= _CONVINCING)

    def conclude(self) -> None:
        """Takes the plain step if it explains all passes, though others do too: no length at hand tells them apart."""
        if self.is_open:
            self._choose(is_sure=True)

    def _choose(self, *, is_sure: bool) -> None:
        if len(self._seen) < 2:
            return
        plain = [step for step in (self.still, self.moving) if self._explains(step)]
        found = [*plain, *(step for step in self._fits() if self._explains(step))]
        self.chosen = found[0] if len(found) == 1 or (plain and is_sure) else None
        self.is_input = not found and all(length == frames for length, frames in self._inputs.items())

    def _explains(self, step: Any) -> bool:
        return all(step(n) == frames for n, frames in self._seen)

    def _fits(self) -> list[Any]:
        """The fillings up to whole windows, and the cuts down to a multiple, that may explain the passes."""
        if self._window is not None:
            extent, stride = self._window
            bases = {frames - n - i for n, frames in self._seen for i in range(stride)}
            return [Aligned(base, extent, stride) for base in sorted(bases)]
        if self.given is not None and self.given[0] == 0 and not self._pads:
            common = math.gcd(*(frames for _, frames in self._seen))
            return [Multiple(m) for m in range(2, self.frames // 2 + 1) if common % m == 0]
        return []
