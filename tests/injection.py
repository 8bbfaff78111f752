"""Raises an exception at a chosen moment of convtap's own code: before the n-th bytecode that runs there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import convtap

_OURS = str(Path(convtap.__file__).parent)


class Injector:
    """Counts the moments of what runs inside it, and raises at the n-th (never, if ``at`` is negative).

    A moment is the start of a function or a bytecode; Python itself raises KeyboardInterrupt at fewer places.
    """

    def __init__(self, at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at = at
        self.error = error
        self.moments = 0
        self.where = ""

    def run(self, action: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return action()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self._moment(frame)
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self._moment(frame)
        return self._inside

    def _moment(self, frame: FrameType) -> None:
        self.moments += 1
        if self.moments - 1 == self.at:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_qualname}"
            raise self.error
