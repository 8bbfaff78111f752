"""Gives public classes and functions the module name ``convtap``.

Tracebacks, pickles and ``help`` then show ``convtap``, and not the private module of the definition.
"""

from __future__ import annotations

from typing import TypeVar

Named = TypeVar("Named")


def public(named: Named) -> Named:
    """Sets the module of a public class or function to ``convtap``."""
    named.__module__ = "convtap"
    return named
