"""Refuses to run on Python without the global interpreter lock."""

from __future__ import annotations

import sys

# Note: [The global lock]
# Assumption: only one thread runs Python code at a time.
# Failure: torch may run branches of a model in its own threads, and a recorder counts a layer's calls with ``+= 1``, without
#   a lock. Without the global lock, two calls could get the same number, and one would be lost silently. Reference counts,
#   which tell whether a layer keeps its output, also mean something else, since other threads than an object's owner count
#   separately.
# Choice: raise an error. PYTHON_GIL=1 enables the lock for one process.


def refuse_free_threading() -> None:
    """Checks that the global interpreter lock is enabled. See Note: [The global lock].

    Raises:
        ImportError: it is disabled.
    """
    is_enabled = getattr(sys, "_is_gil_enabled", None)  # since Python 3.13
    if is_enabled is not None and not is_enabled():
        raise ImportError(
            "this Python runs without its global interpreter lock, and convtap needs it to count calls. Set PYTHON_GIL=1 in "
            "the environment, or start python -X gil=1."
        )
