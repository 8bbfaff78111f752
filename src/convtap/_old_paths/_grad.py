"""Old path of ``convtap._result.gradient``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._result.gradient import Gradient, _Place

__all__ = ["Gradient", "_Place"]
