"""Finds the frames of a thread that run some code, without a full stack walk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FrameType

from convtap._torch.frame_marks import Marks

# Note: [Long stacks]
# Assumption: the caller of a function stays the same while the function runs, and so do all outer frames. A generator or a
#   coroutine is different, since another caller may resume it.
# Failure: a training framework, a notebook or a test runner adds a hundred frames or more. Walking through them for each
#   convolution costs more than the convolution.
# Choice: a walk to the end of the stack marks the frames at steps 16, 32, 64, … with the frames that it found beyond them.
#   The next walk stops at the first mark. It passes at most twice the number of new frames, plus 16.

_NEAR = 16
_RESUMED = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


class FrameSearch:
    """Finds the frames that run some code. See Note: [Long stacks].

    Attributes:
        wanted: the code objects to find, by their ``id``.
        steps: the number of frames that walks have visited.
    """

    def __init__(self, wanted: Mapping[int, CodeType]) -> None:
        self.wanted = wanted
        self.steps = 0
        self._beyond = Marks()

    def frames(self, frame: FrameType | None) -> Iterator[FrameType]:
        """Yields the frames that run the code, from a frame outwards."""
        wanted, beyond = self.wanted, self._beyond
        only = next(iter(wanted.values())) if len(wanted) == 1 else None
        found: list[FrameType] = []
        passed: list[tuple[FrameType, int]] = []
        steps, next_mark = 0, _NEAR
        while frame is not None:
            steps += 1
            code = frame.f_code
            if code is only or (only is None and id(code) in wanted):
                found.append(frame)
                yield frame
            if steps >= _NEAR:
                known = beyond.of(frame) if frame.f_trace is not None else None
                if known is not None:
                    found.extend(known)
                    yield from known
                    break
                if steps >= next_mark and not code.co_flags & _RESUMED:
                    passed.append((frame, len(found)))
                    next_mark *= 2
            frame = frame.f_back
        self.steps += steps
        for frame, count in passed:
            beyond.set(frame, tuple(found[count:]))

    def forget(self) -> None:
        """Removes the marks from the frames of this thread."""
        self._beyond.clear()
