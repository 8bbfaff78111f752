"""Ends the workers of a data loader when the extracting process has ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

# Note: [Workers of a killed run]
# Assumption: a worker ends soon after the process that loads with it. torch's workers check every five seconds whether
#   the id of their parent has changed.
# Failure: a fork server starts the workers by default on Linux since Python 3.14. A worker's parent is then the server, which
#   lives as long as any of its children. After a SIGKILL of the extraction both stayed alive, with the pipes that they had
#   inherited.
# Choice: such a worker has a thread that waits for the end of the process that requested the worker (multiprocessing signals
#   it by a pipe) and then ends the worker. The server ends after it.


class EndingWorker:
    """The ``worker_init_fn`` of a loader. See Note: [Workers of a killed run].

    Args:
        then: the user's own ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        asked_for_by = multiprocessing.parent_process()
        is_process = threading.current_thread() is threading.main_thread()  # torch can also load in threads
        if asked_for_by is not None and is_process and asked_for_by.pid != os.getppid():
            watch = threading.Thread(
                target=_end_after, args=(asked_for_by.sentinel,), name="convtap-parent", daemon=True
            )
            watch.start()
        if self._then is not None:
            self._then(worker)


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
