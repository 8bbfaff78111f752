"""What is known of one tensor in a pass, shared between a tensor and its views."""

from __future__ import annotations

from typing import Any

from convtap._time.axis import TooFine
from convtap._time.axis_table import apply, apply_pieces
from convtap._time.axis_views import COVERING, base_after
from convtap._time.mark import Mark, unknown


class Node:
    """What is known of one tensor. A view asks its base, so that a write through either is seen by both."""

    __slots__ = ("_index", "_mark", "_op", "_parent")

    def __init__(self, mark: Mark | None = None, parent: Node | None = None, op: Any = None, index: int | None = None):
        self._mark = mark
        self._parent = parent
        self._op = op
        self._index = index

    def get(self) -> Mark | None:
        """Returns the mark, or None if the tensor does not depend on the input."""
        if self._parent is None:
            return self._mark
        base = self._parent.get()
        if base is None:
            return None
        func, op = self._op
        op = op.seen_as(lambda value: base)
        try:
            return apply(func, op) if self._index is None else apply_pieces(op)[self._index]
        except TooFine:
            return unknown(f"{op.what}: the rate of frames is too fine")

    def put(self, mark: Mark | None) -> None:
        """Notes that the tensor was written to."""
        if self._parent is None:
            self._mark = mark
            return
        _, op = self._op
        if mark is None:
            if op.name in COVERING:
                self._parent.put(None)
            return
        self._parent.put(base_after(op, self._parent.get(), mark, self._index))
