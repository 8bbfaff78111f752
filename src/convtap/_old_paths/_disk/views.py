"""Loads the views of a store from pickles of version 0.1.0."""

from __future__ import annotations

from typing import Any

from convtap._dataset import views as _now
from convtap._dataset.store_reader import StoreReader


class LayerView(_now.LayerView):
    """A layer's view of version 0.1.0, whose store is reopened by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.LayerView  # type: ignore[assignment]
        self.__init__(StoreReader(state["_store"].path), state["name"], state["_key"])  # type: ignore[misc]


class StoreDataset(_now.StoreDataset):
    """A data set of version 0.1.0, whose store is reopened by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.StoreDataset  # type: ignore[assignment]
        self.__init__(StoreReader(state["_store"].path), state["_views"], state["_labels"])  # type: ignore[misc]
