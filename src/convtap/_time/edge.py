"""Finds the frames of a padded input that differ from those of the input alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from convtap._time.axis_count import Digit, Guess

# Note: [Padded inputs]
# Assumption: an input of n samples is padded on the right to N samples, and runs in a batch with others.
# Failure: for the input alone, a layer sees its own padding after the last frame. In the batch it sees values that earlier
#   layers computed from the padding. A statistic over time includes the padding. So valid frames may differ too.
# Choice: every tensor has an edge, which is the first frame that may differ. It is a chain of steps that is evaluated for
#   given n and N after the pass, when the frame counts are settled. It never lies after the first frame that differs.

#: The edge of a tensor in which no frame differs.
NEVER = 1 << 62


class State(NamedTuple):
    """The first frame of a padded input that differs, and the cause.

    Attributes:
        at: the frame.
        what: the operation, such as ``"native_group_norm in 'norm'"``, or the kind of padding.
        mixes: whether the operation changes every frame, and not only those near the end.
    """

    at: int
    what: str
    mixes: bool


@dataclass(frozen=True)
class Start:
    """The signal itself: frame n is the first one of the padding."""

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        return State(n if n < padded else NEVER, "padding", False)


@dataclass(frozen=True)
class Moved:
    """Frame t sees frames up to ⌊(times·t + plus) / over⌋."""

    times: int
    plus: int
    over: int

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at = states[0].at
        at = at if at == NEVER else max(0, -((self.plus - at * self.over) // self.times))
        return states[0]._replace(at=at)


@dataclass(frozen=True)
class PastEnd:
    """The step of an operation that may look past the last frame.

    For the input alone, the layer's own padding lies there. In a batch, frames of padding lie there.

    Attributes:
        axis: the axis that it looks along.
        zeros: whether the layer's own padding is zeros, and a mask has set the frames of padding to zero.
    """

    axis: Digit
    what: str
    zeros: bool = False

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        (state,) = states
        if self.zeros and not self.axis.is_open and state.at >= self.axis.frames(n):
            return state._replace(at=NEVER)
        if not self.zeros:
            if self.axis.is_open and state.at != NEVER:
                return State(0, self.what, True)
            alone, there = self.axis.frames(n), self.axis.frames(padded)
            state = state if state.at < there else state._replace(at=NEVER)
            if alone < min(there, state.at):
                return State(alone, self.what, False)
        return state if state.mixes or state.at == NEVER else state._replace(what=self.what)


@dataclass(frozen=True)
class Mixed:
    """The step of an operation in which every frame depends on all frames.

    Attributes:
        masked: the axis that is mixed, if its frames of padding are masked.
    """

    what: str
    masked: Digit | None = None

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        (state,) = states
        is_kept_out = self.masked is not None and not self.masked.is_open and state.at >= self.masked.frames(n)
        if state.at == NEVER or is_kept_out:
            return state._replace(at=NEVER)
        return state if state.mixes and state.at == 0 else State(0, self.what, True)


@dataclass(frozen=True)
class First:
    """The earliest of several edges."""

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        return min(states, key=lambda state: (state.at, not state.mixes))


class Edge:
    """One step of a chain, with the edges that it starts from."""

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
    """The edges of a whole pass as one flat list.

    The list can be pickled, and evaluated in one loop.

    Attributes:
        places: for each record, the place of its edge in the list, or None.
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
        """Returns the guesses that the edges rest on, in the order of the operations."""
        axes = (getattr(step, "axis", None) or getattr(step, "masked", None) for step, _ in self._steps)
        return [guess for axis in axes if axis is not None for guess in axis.count.guesses()]

    def at(self, place: int, n: int, padded: int) -> State:
        """Returns the state for an input of n samples that is padded to ``padded``."""
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
        last: the number of frames at the end that differ; None if all of them differ, or the output has no frames.
        what: the cause.
    """

    last: int | None
    what: str
