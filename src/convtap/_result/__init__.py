"""The results of a capture: calls, log, coverage, samples, files, statistics."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Activations":  # pickles of version 0.1.0 import it from here
        from convtap._result.activations import Activations

        return Activations
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
