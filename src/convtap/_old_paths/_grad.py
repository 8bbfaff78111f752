"""Where pickles of version 0.1.0 look for what is now in ``convtap._result.gradient``."""

from __future__ import annotations

from convtap._result.gradient import Gradient, _Place

__all__ = ["Gradient", "_Place"]
