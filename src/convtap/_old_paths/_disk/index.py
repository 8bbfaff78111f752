"""Old path of ``convtap._dataset.index``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._dataset.index import Index, LayerSummary

__all__ = ["Index", "LayerSummary"]
