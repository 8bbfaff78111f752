"""The rows of one layer in all shards of a store, read by the positions of their samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.store_reader import StoreReader
from convtap._errors import NotCaptured, plural


class LayerRows:
    """Reads the rows of one layer.

    Args:
        reader: the store.
        name: what the store calls the layer.
        key: what its shards call it.

    Attributes:
        name: as above.
        about: what all rows have in common.
        here: of each batch, whether the layer ran in it; None if it ran in all.
    """

    def __init__(self, reader: StoreReader, name: str, key: str) -> None:
        index = reader.index
        self._reader, self.name, self._key = reader, name, key
        here = index.present[:, list(index.layers).index(key)]
        self.here = None if here.all() else here
        begins = index.others.get(key, index.begins)
        self._tables = (index.starts, index.batches[:, 2], begins)
        # of a memoryview a single item comes as an int, at once
        self._starts, self._shards, self._begins = (table.data for table in self._tables)
        self.about = index.layers[key]
        shape = self.about.shape
        self._are_alike = shape is not None and None not in shape and "|" not in self.about.dtype

    def __reduce__(self) -> Any:
        return LayerRows, (self._reader, self.name, self._key)

    def at(self, position: int) -> Tensor:
        """Returns the row of a sample.

        Raises:
            NotCaptured: the layer did not run for it.
            StoreError: its shard has changed since the store was opened, or cannot be read.
        """
        line = bisect_right(self._starts, position) - 1
        if self.here is not None and not self.here[line]:
            raise self._absent(position)
        column = self._reader.column(self._shards[line], self._key)
        return column.row(self._begins[line] + position - self._starts[line])

    def each(self, positions: Any) -> list[Tensor]:
        """Returns the rows of many samples, each as ``at`` does; those of one shard are read together.

        Args:
            positions: an array of ints, in any order.
        """
        found: list[Any] = [None] * len(positions)

        def read(shard: int, places: Any, rows: Any) -> None:
            column = self._reader.column(shard, self._key)
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                found[place] = column.row(row)

        self._by_shard(positions, read)
        return found

    def together(self, positions: Any) -> list[Tensor]:
        """Returns the rows of many samples as ``each`` does, but those of one shape in one piece of memory."""
        if self._are_alike and self._reader.copies:
            return list(self.block(positions).unbind(0))
        return self.each(positions)

    def block(self, positions: Any) -> Tensor:
        """Returns the rows of many samples as one tensor: a layer's whose rows have one shape and dtype."""
        first: Any = None
        block: Any = None

        def read(shard: int, places: Any, rows: Any) -> None:
            nonlocal first, block
            column = self._reader.column(shard, self._key)
            if first is None:
                first, block = column, column.block(len(positions))
            column.fill(block, places, rows)

        self._by_shard(positions, read)
        if first is None:
            shape: Any = self.about.shape
            return torch.empty((0, *shape), dtype=getattr(torch, self.about.dtype))
        restored: Tensor = first.restored(block)
        return restored

    def _by_shard(self, positions: Any, read: Callable[[int, Any, Any], None]) -> None:
        """Calls ``read`` once for each shard: its number, places among the positions, and rows in ascending order."""
        import numpy as np

        starts, shards, begins = self._tables
        lines = starts.searchsorted(positions, "right") - 1
        if self.here is not None and not self.here[lines].all():
            raise self._absent(int(positions[~self.here[lines]][0]))
        shards, rows = shards[lines], begins[lines] + positions - starts[lines]
        order = np.lexsort((rows, shards))
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for places in np.split(order, cuts) if len(order) else ():
            read(int(shards[places[0]]), places, rows[places])

    def _absent(self, position: int) -> NotCaptured:
        index = self._reader.index
        ran = int(index.batches[self.here, 1].sum())
        return NotCaptured(
            f"layer {self.name!r} did not run for the sample {index.ids[position].item()!r}: it ran for "
            f"{ran} of {plural(len(self._reader), 'sample')}. view.ids are those, view.absent the others."
        )
