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
class Beyond:
    """An operation may look past the last frame: alone there is padding, and in a batch there are frames of padding."""

    count: Count
    weight: int
    what: str

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if _is_open(self.count) and at != NEVER:
            return 0, Cause(self.what, True)
        alone, there = self.count(n) * self.weight, self.count(padded) * self.weight
        if at >= there:
            at = NEVER
        if alone < there and alone < at:
            return alone, Cause(self.what, False)
        return at, cause if cause.mixes or at == NEVER else Cause(self.what, False)


@dataclass(frozen=True)
class Mixed:
    """Every frame gets something of every other one."""

    what: str

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if at == NEVER:
            return NEVER, cause
        return 0, cause if cause.mixes and at == 0 else Cause(self.what, True)


@dataclass(frozen=True)
class Masked:
    """Every frame gets something of every other one, but for the padding, which is masked."""

    count: Count
    weight: int
    what: str

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if not _is_open(self.count) and at >= self.count(n) * self.weight:
            return NEVER, cause
        return 0, cause if cause.mixes and at == 0 else Cause(self.what, True)


@dataclass(frozen=True)
class Zeroed:
    """An operation looks past the last frame: alone it finds zeros, and in a batch the zeros of a mask."""

    count: Count
    weight: int
    what: str

    def __call__(self, states: list[State], n: int, padded: int) -> State:
        at, cause = states[0]
        if _is_open(self.count) or at < self.count(n) * self.weight:
            return at, cause if cause.mixes else Cause(self.what, False)
        return NEVER, cause


def _is_open(count: Count) -> bool:
    """Whether the frames at other lengths than the example's are not known, so that nothing can be excluded."""
    return any(guess.is_open for guess in count.guesses())


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

    def of(self, times: int, plus: int, over: int = 1) -> Edge:
        """Returns the edge of frames t that see frames up to ⌊(times·t + plus) / over⌋."""
        return self if (times, plus, over) == (1, 0, 1) else Edge(Moved(times, plus, over), self)

    def beyond(self, count: Count, weight: int, what: str) -> Edge:
        """Returns the edge for an operation that may look past the last frame."""
        return Edge(Beyond(count, weight, what), self)

    def mixed(self, what: str) -> Edge:
        """Returns the edge after all frames were mixed."""
        return Edge(Mixed(what), self)


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
        return [guess for step, _ in self._steps if hasattr(step, "count") for guess in step.count.guesses()]

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


@dataclass(frozen=True)
class Tail:
    """The edge of one layer's output, for any length.

    Attributes:
        edges: the edges of the pass.
        place: which of them.
        numbers: the operations that had read a value of the signal as a Python number by then.
    """

    edges: Edges
    place: int | None
    numbers: tuple[str, ...] = ()

    def differs(self, count: Count | None, notes: Sequence[str], n: int, padded: int) -> Difference | None:
        """Compares the output of n samples padded to ``padded`` with that of the n samples alone.

        Args:
            count: the frames for a number of samples; None if the output has no time axis.
            notes: what holds for one length only.
        """
        if n >= padded or self.place is None or (count is not None and not count(n)):
            return None
        if self.numbers:
            return Difference(None, f"{self.numbers[0]}, read as a Python number")
        at, cause = self.edges.at(self.place, n, padded)
        if count is None:
            return None if at == NEVER else Difference(None, cause.what)
        if notes:
            return Difference(None, notes[0])
        frames = count(n)
        if at >= frames:
            return None
        return Difference(None if cause.mixes else frames - at, cause.what)
