"""A lock that stays usable after an interrupt."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

# Note: [Locks and interrupts]
# Assumption: ``with lock`` releases the lock whenever Ctrl-C comes.
# Failure: since Python 3.14, a signal handler may run after a built-in ``__enter__`` has returned and before the ``with``
#   statement is in force. KeyboardInterrupt then leaves the lock locked, and the next capture waits for it forever. With
#   interrupts at random moments of a loop of such statements, one in four did.
# Choice: an ``__enter__`` in Python. Python runs no handler after it, and it releases the lock if a handler interrupts it. The
#   ``__exit__`` stays built in: a handler would run before the first line of a Python ``__exit__``, but runs only after a
#   built-in one has ended.

_Base: Any = object if TYPE_CHECKING else type(threading.RLock())


class Lock(_Base):  # type: ignore[misc]
    """A reentrant lock for ``with`` statements. See Note: [Locks and interrupts]."""

    def __enter__(self) -> None:
        try:
            self.acquire()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # interrupted while waiting, so another thread holds it
                self.release()
            raise

    if TYPE_CHECKING:

        def __exit__(self, *error: object) -> None: ...

        def acquire(self) -> bool: ...

        def release(self) -> None: ...
