"""Raises an exception at a chosen moment of convtap's own code, of those at which Python looks for signals."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import convtap

_OURS = str(Path(convtap.__file__).parent)


class Injector:
    """Counts the moments of what runs inside it, and raises at the n-th (never, if ``at`` is negative).

    A moment is the start of a function, and what follows a call or a jump back: there the interpreter looks for signals,
    and nowhere else. (So an exception in the middle of a lock's exit is impossible. See Note: [Locks and interrupts].)
    """

    def __init__(self, at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at = at
        self.error = error
        self.moments = 0
        self.where = ""
        self._last: dict[FrameType, int] = {}

    def run(self, action: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return action()
        finally:
            sys.settrace(before)
            self._last.clear()

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self._moment(frame)
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            last, self._last[frame] = self._last.get(frame), frame.f_lasti
            name = "" if last is None else dis.opname[frame.f_code.co_code[last]]
            if name.startswith("CALL") or "JUMP_BACKWARD" in name:
                self._moment(frame)
        elif event == "return":
            self._last.pop(frame, None)
        return self._inside

    def _moment(self, frame: FrameType) -> None:
        self.moments += 1
        if self.moments - 1 == self.at:
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.10 has no qualified name
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {name}"
            raise self.error
