"""Where pickles of version 0.1.0 look for what is now in ``convtap._dataset.store``."""

from __future__ import annotations

from convtap._dataset.store import Store

__all__ = ["Store"]
