"""What a capture returns: calls, the log they are in, coverage, samples, a file, and the mapping of all of it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Activations":  # pickles of version 0.1.0 look for it here
        from convtap._result.activations import Activations

        return Activations
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
