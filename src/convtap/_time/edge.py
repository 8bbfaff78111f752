"""Which frames of a padded input are those of the input alone, and what makes the others differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from convtap._time.axis_count import Count, Guess

# Note: [Padded inputs]
# Assumption: an input of n samples is padded on the right to N samples, and runs in a batch with others.
# Failure: alone, a layer finds its own padding after the last frame; in the batch it finds what earlier layers made of
#   the padding. A statistic over time counts the padding in. So frames differ though each of them is "real".
# Choice: every tensor has an edge: the first frame that may differ, as a chain of steps that is evaluated for given n and
#   N after the pass, when the frame counts are settled. It never lies behind the first frame that really differs.

#: The edge of a tensor in which no frame differs.
NEVER = 1 << 62


@dataclass(frozen=True)
class Cause:
    """What makes frames of a padded input differ from those of the input alone.

    Attributes:
        what: the operation, such as ``"native_group_norm in 'norm'"``, or the kind of padding.
        mixes: whether it changes every frame, and not only those near the end.
    """

    what: str
    mixes: bool


#: The first frame that differs, and why.
State = tuple[int, Cause]


@dataclass(frozen=True)
class End:
    """The end of a tensor's time axis: a number of frames that grows with the input.

    Attributes:
        count: positions on the axis for a number of samples.
        weight: frames from one position to the next.
    """

    count: Count
    weight: int

    def __call__(self, n: int) -> int:
        return self.count(n) * self.weight

    @property
    def is_open(self) -> bool:
        """Whether the frames at other lengths than the example's are not known, so that nothing can be excluded."""
        return any(guess.is_open for guess in self.count.guesses())


@dataclass(frozen=True)
class Start:
    """The signal itself: frame n is the first one of the padding."""

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        return (n if n < padded else NEVER), Cause("padding", False)


@dataclass(frozen=True)
class Moved:
    """Frame t sees frames up to ⌊(times·t + plus) / over⌋."""

    times: int
    plus: int
    over: int

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        return (at if at == NEVER else max(0, -((self.plus - at * self.over) // self.times))), cause


@dataclass(frozen=True)
class PastEnd:
    """An operation may look past the last frame: alone there is padding, and in a batch there are frames of padding.

    Attributes:
        zeros: whether alone there are zeros, and in the batch a mask has set the frames of padding to zero.
    """

    end: End
    what: str
    zeros: bool = False

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if self.zeros and not self.end.is_open and at >= self.end(n):
            return NEVER, cause
        if not self.zeros:
            if self.end.is_open and at != NEVER:
                return 0, Cause(self.what, True)
            alone, there = self.end(n), self.end(padded)
            at = at if at < there else NEVER
            if alone < min(there, at):
                return alone, Cause(self.what, False)
        return at, cause if cause.mixes or at == NEVER else Cause(self.what, False)


@dataclass(frozen=True)
class Mixed:
    """Every frame gets something of every other one.

    Attributes:
        masked: where the frames of padding begin, if these are masked.
    """

    what: str
    masked: End | None = None

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if at == NEVER or (self.masked is not None and not self.masked.is_open and at >= self.masked(n)):
            return NEVER, cause
        return 0, cause if cause.mixes and at == 0 else Cause(self.what, True)


@dataclass(frozen=True)
class First:
    """The earliest of several edges."""

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        return min(states, key=lambda state: (state[0], not state[1].mixes))


class Edge:
    """One step of the chain, and the edges that it starts from."""

    __slots__ = ("before", "step")

    def __init__(self, step: Any, *before: Edge) -> None:
        self.step = step
        self.before = before


def earliest(edges: Iterable[Edge | None]) -> Edge | None:
    """Returns the edge of frames that are computed from several tensors."""
    found = list(dict.fromkeys(edge for edge in edges if edge is not None))
    if len(found) < 2:
        return found[0] if found else None
    return Edge(First(), *found)


class Edges:
    """The edges of a whole pass as one flat list, so that it can be pickled, and evaluated in one go.

    Attributes:
        places: by number of the record, where its edge is in the list; None if it has none.
    """

    def __init__(self, edges: Sequence[Edge | None]) -> None:
        self._steps: list[tuple[Any, tuple[int, ...]]] = []
        numbers: dict[int, int] = {}
        for edge in edges:
            stack = [] if edge is None else [edge]
            while stack:
                top = stack[-1]
                missing = [one for one in top.before if id(one) not in numbers]
                if missing:
                    stack.extend(missing)
                    continue
                stack.pop()
                if id(top) not in numbers:
                    numbers[id(top)] = len(self._steps)
                    self._steps.append((top.step, tuple(numbers[id(one)] for one in top.before)))
        self.places = [None if edge is None else numbers[id(edge)] for edge in edges]
        self._cache: dict[tuple[int, int], list[State]] = {}

    def guesses(self) -> list[Guess]:
        """Returns the guessed steps of the counts that the edges rest on, in the order of the operations."""
        ends = (getattr(step, "end", None) or getattr(step, "masked", None) for step, _ in self._steps)
        return [guess for end in ends if end is not None for guess in end.count.guesses()]

    def at(self, place: int, n: int, padded: int) -> State:
        """Returns the first frame that differs for an input of n samples, padded to ``padded``, and why."""
        found = self._cache.get((n, padded))
        if found is None:
            if len(self._cache) > 64:
                self._cache.clear()
            found = self._cache[n, padded] = []
            for step, before in self._steps:
                found.append(step([found[one] for one in before], n, padded))
        return found[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


@dataclass(frozen=True)
class Difference:
    """How an output of a padded input differs from that of the input alone.

    Attributes:
        last: how many frames at the end differ; None if all of them do, or there are no frames.
        what: what makes them differ.
    """

    last: int | None
    what: str
