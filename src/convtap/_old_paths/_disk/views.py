"""Loads the views of a store from pickles of version 0.1.0."""

from __future__ import annotations

from typing import Any

from convtap._dataset import store_dataset as _data
from convtap._dataset import views as _now
from convtap._dataset.layer_rows import LayerRows
from convtap._dataset.store import Store
from convtap._dataset.store_reader import StoreReader


class LayerView(_now.LayerView):
    """A layer's view of version 0.1.0, whose store is reopened by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.LayerView  # type: ignore[assignment]
        reader = StoreReader(state["_store"].path)
        self.__init__(reader, LayerRows(reader, state["name"], state["_key"]))  # type: ignore[misc]


class StoreDataset(_data.StoreDataset):
    """A data set of version 0.1.0, whose store is reopened by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _data.StoreDataset  # type: ignore[assignment]
        names = [view.name for view in state["_views"]]
        self.__dict__.update(Store(state["_store"].path).dataset(names, state["_labels"]).__dict__)
