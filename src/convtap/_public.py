"""Marks what users can name: its module is ``convtap``, in tracebacks, in pickles and in ``help``."""

from __future__ import annotations

from typing import TypeVar

Named = TypeVar("Named")


def public(named: Named) -> Named:
    """Decorates a class or function that ``convtap`` exports, wherever it is defined."""
    named.__module__ = "convtap"
    return named
