"""Where pickles of version 0.1.0 look for what is now in ``convtap._capture.list_layers``."""

from __future__ import annotations

from convtap._capture.list_layers import LayerRow

__all__ = ["LayerRow"]
