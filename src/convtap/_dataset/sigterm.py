"""Ends a run between two batches when SIGTERM arrives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived.

    It does not derive from Exception, so an ``except Exception`` of the data set or the model does not catch it.
    """


class Termination:
    """Delays SIGTERM until the computed batches are on the disk, then raises it again.

    A scheduler sends it half a minute before SIGKILL, which would lose the open shard and the one being written: all samples
    of a run that has not filled its first shard. It interrupts only code inside ``interruptible``, where no computed batch is
    lost. Outside the main thread, where Python does not allow handlers, it does nothing.
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
            # the handler is None if it was not set from Python
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
        """Raises ``Terminated`` inside the context if SIGTERM arrives or has arrived."""
        self._exposed = True
        try:
            if self._asked:
                raise Terminated
            yield
        finally:
            self._exposed = False
