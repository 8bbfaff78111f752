"""Where pickles of version 0.1.0 look for what is now in ``convtap._capture.tapped``."""

from __future__ import annotations

from convtap._capture.tapped import Tapped, _blank

__all__ = ["Tapped", "_blank"]
