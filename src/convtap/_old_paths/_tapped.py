"""Old path of ``convtap._capture.tapped``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._capture.tapped import Tapped, _blank

__all__ = ["Tapped", "_blank"]
