"""Where pickles of version 0.1.0 look for what is now in ``convtap._dataset.views``."""

from __future__ import annotations

from convtap._dataset.views import LayerView, StoreDataset

__all__ = ["LayerView", "StoreDataset"]
