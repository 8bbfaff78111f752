"""Ends a run between two batches when the process is told to terminate."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM came. No Exception, so that a data set's or model's own ``except Exception`` lets it through."""


class Termination:
    """Holds SIGTERM back until the computed batches are on the disk, then passes it on to the handler of before.

    A scheduler sends it half a minute before SIGKILL, which loses the open shard and the one being written: all samples
    of a run that has not filled its first shard. It interrupts only where a lost batch costs nothing: see
    ``interruptible``. Outside the main thread, where Python allows no handler, it does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._exposed = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            # a handler that was not set from Python reads as None
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
            if self._asked:
                signal.raise_signal(signal.SIGTERM)  # on Windows, os.kill would end the process without the handler

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._exposed:
            self._exposed = False
            raise Terminated

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, SIGTERM raises ``Terminated``; one that came before raises it now."""
        self._exposed = True
        try:
            if self._asked:
                raise Terminated
            yield
        finally:
            self._exposed = False
