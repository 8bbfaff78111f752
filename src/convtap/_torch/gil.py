"""Refuses a Python that runs without its global interpreter lock."""

from __future__ import annotations

import sys

# Note: [The global lock]
# Assumption: only one thread runs Python code at a time.
# Failure: torch runs branches of a model in threads of its own, and a recorder counts a layer's calls with ``+= 1``, without
#   a lock of its own. Without the global lock two calls could get one number, and one would be lost without a word. A
#   reference count, which tells whether a layer keeps its output, also means something else there: a thread that does not
#   own the object counts elsewhere.
# Choice: refuse. Python turns the lock on again for one process with PYTHON_GIL=1.


def refuse_free_threading() -> None:
    """Checks that Python has its global lock. See Note: [The global lock].

    Raises:
        ImportError: it has not.
    """
    is_enabled = getattr(sys, "_is_gil_enabled", None)  # since Python 3.13
    if is_enabled is not None and not is_enabled():
        raise ImportError(
            "this Python runs without its global interpreter lock, and convtap needs it to count calls. Set PYTHON_GIL=1 in "
            "the environment, or start python -X gil=1."
        )
