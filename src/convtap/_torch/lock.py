"""A lock that an interrupt does not leave locked."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

# Note: [Locks and interrupts]
# Assumption: ``with lock`` unlocks what it locked, whenever Ctrl-C comes.
# Failure: since Python 3.14 a signal's handler may run after a built-in ``__enter__`` has returned and before its ``with``
#   is in force. KeyboardInterrupt then leaves the lock locked, and the next capture waits for it without an end: with
#   interrupts at random moments of a loop of such statements, one in four did.
# Choice: an ``__enter__`` in Python, after which no handler runs, and which unlocks what it locked when one interrupts it. The
#   ``__exit__`` stays built in: a handler runs before the first line of one in Python, and after the last of a built-in one.

_Base: Any = object if TYPE_CHECKING else type(threading.RLock())


class Lock(_Base):  # type: ignore[misc]
    """Is locked inside of ``with``, by one thread at a time. See Note: [Locks and interrupts]."""

    def __enter__(self) -> None:
        try:
            self.acquire()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # interrupted while it waited: it is another thread's
                self.release()
            raise

    if TYPE_CHECKING:

        def __exit__(self, *error: object) -> None: ...

        def acquire(self) -> bool: ...

        def release(self) -> None: ...
