"""Where pickles of version 0.1.0 look for what is now in ``convtap._time.top``."""

from __future__ import annotations

from convtap._time.top import Hit, Window

__all__ = ["Hit", "Window"]
