"""Holds the kept input of each running layer until its output is recorded."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from convtap._record.keeper import are_fake
from convtap._tensors.nested import MISSING, Leaves
from convtap._torch.modes import outside_modes, tracing_state


class _Here(threading.local):
    def __init__(self) -> None:
        self.of: defaultdict[str, list[Any]] = defaultdict(list)  # a layer may run inside itself


class Inputs:
    """The inputs of the running layers, by thread and layer.

    Args:
        is_open: returns whether this thread records.
        keep: keeps the input of a layer.
        are_kept: whether the capture keeps inputs.
    """

    def __init__(self, is_open: Callable[[], bool], keep: Callable[[str, Any], Any], are_kept: bool) -> None:
        self.are_kept = are_kept
        self._is_open = is_open
        self._keep = keep
        self._here = _Here()

    def note(self, name: str, value: Any) -> None:
        """Keeps the input of a layer that is about to run."""
        if not self.are_kept:
            return
        kept = MISSING
        if self._is_open() and not are_fake(Leaves(value).tensors):
            with outside_modes() if tracing_state() is not None else nullcontext():
                kept = self._keep(name, value)
        self._here.of[name].append(kept)

    def forget(self, name: str) -> None:
        """Forgets the input of a layer that has run."""
        if self.are_kept and self._here.of[name]:
            self._here.of[name].pop()

    def of(self, name: str) -> Any:
        """Returns the input of the running layer, or ``MISSING``."""
        return self._here.of[name][-1] if self.are_kept and self._here.of[name] else MISSING
