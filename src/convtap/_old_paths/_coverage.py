"""Old path of ``convtap._result.coverage``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._result.coverage import Coverage, LayerCoverage

__all__ = ["Coverage", "LayerCoverage"]
