"""Where pickles of version 0.1.0 look for what is now in ``convtap._result.coverage``."""

from __future__ import annotations

from convtap._result.coverage import Coverage, LayerCoverage

__all__ = ["Coverage", "LayerCoverage"]
