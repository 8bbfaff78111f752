"""Where pickles of version 0.1.0 look for what is now in ``convtap._dataset.index``."""

from __future__ import annotations

from convtap._dataset.index import Index, LayerSummary

__all__ = ["Index", "LayerSummary"]
