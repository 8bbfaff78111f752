"""Where pickles of version 0.1.0 look for what is now in ``convtap._result.log``."""

from __future__ import annotations

from convtap._result.log import Log

__all__ = ["Log"]
