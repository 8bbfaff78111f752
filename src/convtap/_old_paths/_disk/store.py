"""Loads ``Store`` from pickles of version 0.1.0."""

from __future__ import annotations

from typing import Any

from convtap._dataset import store as _now


class Store(_now.Store):
    """A store of version 0.1.0, which is reopened by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.Store  # type: ignore[assignment]
        self.__init__(state["path"])  # type: ignore[misc]
