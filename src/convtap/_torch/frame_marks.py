"""Attaches values to running Python frames."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

# Note: [Frame marks]
# Assumption: a frame has one writable attribute, ``f_trace``, which Python calls only while a debugger traces the thread.
# Failure: a later frame may have the same address, and a reference to a frame keeps its variables alive.
# Choice: the mark is stored in ``f_trace`` and is freed with its frame. It passes a debugger's events on to the previous
#   trace function. A debugger that attaches later replaces the marks of the frames that run then.


class _Mark:
    __slots__ = ("previous", "values")

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.values: dict[object, Any] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self.previous is not None:
            self.previous = self.previous(frame, event, arg) or self.previous
        return self


class Marks:
    """The values that one owner attaches to running frames."""

    __slots__ = ("_is_used",)

    def __init__(self) -> None:
        self._is_used = False

    def set(self, frame: FrameType, value: Any) -> None:
        """Attaches a value to a frame."""
        self._is_used = True
        found = frame.f_trace
        if type(found) is not _Mark:
            frame.f_trace = found = _Mark(found)
        found.values[self] = value

    def of(self, frame: FrameType) -> Any:
        """Returns the value that was attached to a frame, or None."""
        found = frame.f_trace
        return found.values.get(self) if type(found) is _Mark else None

    def clear(self) -> None:
        """Removes the values from the frames that run in this thread."""
        frame: FrameType | None = sys._getframe(1) if self._is_used else None
        while frame is not None:
            found = frame.f_trace
            if type(found) is _Mark and found.values.pop(self, None) is not None and not found.values:
                frame.f_trace = found.previous
            frame = frame.f_back
        self._is_used = False
