"""Finds the samples of a store by id and position, and keeps some of its shards open."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from convtap._dataset.index import read_index
from convtap._dataset.layout import read_description
from convtap._dataset.shard_format import Id
from convtap._dataset.shard_reader import Shard
from convtap._dataset.summary import missing, unreadable
from convtap._errors import OutOfRange, StoreError, listed

_OPEN_SHARDS = 64


class StoreReader:
    """What a store and its views read from.

    Attributes:
        path: the directory of the store.
        identity: what the store was made from.
        index: where every sample lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: dict[str, Any] = read_description(path)["identity"]
        self.index = read_index(path)
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._order: Any = None

    def __len__(self) -> int:
        return len(self.index.ids)

    def position(self, id: Id) -> int:
        """Returns where in the order of samples an id is.

        Raises:
            OutOfRange: no sample has this id.
            StoreError: several have it.
        """
        import numpy as np

        index = self.index
        if self._order is None:
            self._order = np.argsort(index.ids, kind="stable")
        if isinstance(id, (bool, float)) or not isinstance(
            id, str if index.ids.dtype.kind == "U" else (int, np.integer)
        ):
            raise OutOfRange(self._unknown(id))
        low = int(np.searchsorted(index.ids, id, "left", sorter=self._order))
        if low == len(index.ids) or index.ids[self._order[low]] != id:
            raise OutOfRange(self._unknown(id))
        if low + 1 < len(index.ids) and index.ids[self._order[low + 1]] == id:
            raise StoreError(f"several samples have the id {id!r}. Their positions can be read with view[a:b].")
        return int(self._order[low])

    def shard(self, name: str) -> Shard:
        """Returns a shard by its name; the last 64 stay open."""
        shard = self._open.get(name)
        if shard is None:
            try:
                shard = Shard(self.path / name)
            except StoreError as error:
                raise StoreError(f"{name!r} {error}. It was whole when the store was opened.") from error
            self._open[name] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _unknown(self, id: Any) -> str:
        some = listed([repr(known) for known in self.index.ids[:3].tolist()])
        hint = (
            f" {unreadable(self.index)}"
            if self.index.bad
            else " The extraction is incomplete."
            if missing(self.path, self.identity, self.index) != []
            else ""
        )
        return f"no sample has the id {id!r}. There are {len(self)}: {some}, … Positions are slices: view[0:10].{hint}"
