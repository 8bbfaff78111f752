"""Where pickles of version 0.1.0 look for ``Store``."""

from __future__ import annotations

from typing import Any

from convtap._dataset import store as _now


class Store(_now.Store):
    """A store, which is opened anew by its path."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = _now.Store  # type: ignore[assignment]
        self.__init__(state["path"])  # type: ignore[misc]
