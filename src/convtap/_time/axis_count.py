"""Exact arithmetic on one axis: how many frames n samples make."""

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
    """The step of a pooling with ``ceil_mode``.

    A last window that would begin in the right padding is skipped.
    """

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
    """The step of a slice ``start:stop:step`` whose ends do not move with the length."""

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
    """The step of a padding by ``base``, then up to a whole number of windows."""

    base: int
    extent: int
    stride: int

    def __call__(self, n: int) -> int:
        return n + self.base + (self.extent - n - self.base) % self.stride


@dataclass(frozen=True)
class Multiple:
    """The step of a cut to a multiple of a number of frames."""

    of: int

    def __call__(self, n: int) -> int:
        return n // self.of * self.of


@dataclass(frozen=True)
class Sum:
    """The first step of a count that is a sum, such as that of joined chunks."""

    parts: tuple[Count, ...]

    def __call__(self, n: int) -> int:
        return sum(part(n) for part in self.parts)


@dataclass(frozen=True)
class Count:
    """The number of frames of an input of n samples, as a chain of steps.

    Attributes:
        steps: functions from a number of frames to the next number, in the order of the operations.
    """

    steps: tuple[Any, ...] = ()

    def __call__(self, n: int) -> int:
        """Returns the number of frames, or 0 if a step has none."""
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
        """Returns the steps that one length shows and that may be wrong at another."""
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

    Time that is cut into segments has two digits: the segment, and the frame in it. The number of a frame is the sum of
    position times ``weight`` over all digits.

    Attributes:
        dim: the tensor's axis.
        size: the number of positions.
        inner: the size of the axes that were merged into this one and vary faster (1 unless axes were merged).
        weight: frames from one position to the next.
        count: the number of positions for a given number of input samples.
        stacked: whether the positions are stacked tensors whose frames see different samples.
    """

    dim: int
    size: int
    inner: int = 1
    weight: int = 1
    count: Count = Count()
    stacked: bool = False

    def frames(self, n: int) -> int:
        """Returns the number of frames on the axis for an input of n samples."""
        return self.count(n) * self.weight

    @property
    def is_open(self) -> bool:
        """Whether the number of frames is known for the example's length only."""
        return any(guess.is_open for guess in self.count.guesses())


#: The number of passes that the plain step must explain to be chosen, if other steps explain them too.
_CONVINCING = 4


class Guess:
    """A step whose numbers the model may compute from the input's length.

    ``x[..., 2:98]`` of 100 frames either drops the last two or takes a window of 96. Passes over other lengths show which.

    Attributes:
        what: the operation, for a message.
        n: the number of frames before it.
        frames: the number of frames after it.
        moving: the step if its numbers move with the length.
        still: the step if they do not move; by default, a fixed number of frames.
        given: the numbers in the operation's arguments, or None.
        chosen: the step that explains all passes, or None.
        is_input: whether the operation makes as many frames as the input has samples.
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
        """Notes the window that comes next, since a padding may have filled up for it."""
        if self._pads and stride > 1:
            self._window = (extent, stride)

    def __call__(self, n: int) -> int:
        step = self.moving if self.chosen is None else self.chosen
        return int(step(n))

    @property
    def is_open(self) -> bool:
        """Whether no step explains all passes yet."""
        return self.chosen is None and not self.is_input

    def settle(self, other: Guess, samples: int, others: int) -> None:
        """Adds the same operation of another pass, and chooses a step that explains all.

        Args:
            other: the same operation in the other pass.
            samples: the length of the input in this pass.
            others: the length of the input in the other pass.
        """
        self._seen.add((other.n, other.frames))
        self._inputs.update({samples: self.frames, others: other.frames})
        self._choose(is_sure=len(self._seen) >= _CONVINCING)

    def conclude(self) -> None:
        """Chooses the plain step if it explains all passes.

        Other steps may explain them too, but no length of the passes tells them apart.
        """
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
        """Returns the steps to whole windows or to a multiple that may explain all passes."""
        if self._window is not None:
            extent, stride = self._window
            bases = {frames - n - i for n, frames in self._seen for i in range(stride)}
            return [Aligned(base, extent, stride) for base in sorted(bases)]
        if self.given is not None and self.given[0] == 0 and not self._pads:
            common = math.gcd(*(frames for _, frames in self._seen))
            return [Multiple(m) for m in range(2, self.frames // 2 + 1) if common % m == 0]
        return []
