"""Old path of ``convtap._capture.list_layers``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._capture.list_layers import LayerRow

__all__ = ["LayerRow"]
