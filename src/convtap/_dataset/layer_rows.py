"""Reads one layer's rows from all shards of a store, by the samples' positions."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.store_reader import StoreReader
from convtap._errors import NotCaptured, plural


class LayerRows:
    """Reads the rows of one layer.

    Args:
        reader: the store.
        name: the layer's name in the store.
        key: the layer's key in the shards.

    Attributes:
        name: as above.
        about: the common properties of all rows.
        here: whether the layer ran, for each batch; None if it ran in all.
    """

    def __init__(self, reader: StoreReader, name: str, key: str) -> None:
        index = reader.index
        self._reader, self.name, self._key = reader, name, key
        here = index.present[:, list(index.layers).index(key)]
        self.here = None if here.all() else here
        begins = index.others.get(key, index.begins)
        self._tables = (index.starts, index.batches[:, 2], begins)
        # an item of a memoryview is an int, without a conversion
        self._starts, self._shards, self._begins = (table.data for table in self._tables)
        self.about = index.layers[key]
        shape = self.about.shape
        self._are_alike = shape is not None and None not in shape and "|" not in self.about.dtype

    def __reduce__(self) -> Any:
        return LayerRows, (self._reader, self.name, self._key)

    def at(self, position: int) -> Tensor:
        """Returns the row of a sample.

        Raises:
            NotCaptured: the layer did not run for the sample.
            StoreError: the shard has changed since the store was opened, or cannot be read.
        """
        line = bisect_right(self._starts, position) - 1
        if self.here is not None and not self.here[line]:
            raise self._absent(position)
        column = self._reader.column(self._shards[line], self._key)
        return column.row(self._begins[line] + position - self._starts[line])

    def each(self, positions: Any) -> list[Tensor]:
        """Returns the rows of many samples, and reads those of one shard together.

        Args:
            positions: an array of ints, in any order.
        """
        found: list[Any] = [None] * len(positions)
        order, parts = self._by_shard(positions)
        places = iter(order.tolist())
        for shard, rows in parts:
            column = self._reader.column(shard, self._key)
            for row in rows.tolist():
                found[next(places)] = column.row(row)
        return found

    def together(self, positions: Any) -> list[Tensor]:
        """Returns the rows of many samples; those of one shape share one block of memory."""
        if not self._are_alike or not self._reader.copies:
            return self.each(positions)
        found: list[Any] = [None] * len(positions)
        order, parts = self._by_shard(positions)
        for place, row in zip(order.tolist(), self._stacked(parts, len(positions)).unbind(0), strict=True):
            found[place] = row
        return found

    def block(self, positions: Any) -> Tensor:
        """Returns many rows of one shape and dtype as one tensor."""
        order, parts = self._by_shard(positions)
        stacked = self._stacked(parts, len(positions))
        return stacked if (order[1:] > order[:-1]).all() else stacked[torch.from_numpy(order.argsort())]

    def _stacked(self, parts: list[tuple[int, Any]], count: int) -> Tensor:
        """Reads the rows of several shards into one tensor."""
        if not parts:
            shape: Any = self.about.shape
            return torch.empty((0, *shape), dtype=getattr(torch, self.about.dtype))
        column = self._reader.column(parts[0][0], self._key)
        block, first = column.block(count), 0
        for shard, rows in parts:
            self._reader.column(shard, self._key).fill(block[first : first + len(rows)], rows)
            first += len(rows)
        return column.restored(block)

    def _by_shard(self, positions: Any) -> tuple[Any, list[tuple[int, Any]]]:
        """Returns the order of reading, and each shard's number and rows."""
        import numpy as np

        starts, shards, begins = self._tables
        lines = starts.searchsorted(positions, "right") - 1
        if self.here is not None and not self.here[lines].all():
            raise self._absent(int(positions[~self.here[lines]][0]))
        shards, rows = shards[lines], begins[lines] + positions - starts[lines]
        order = np.lexsort((rows, shards))
        shards, rows = shards[order], rows[order]
        cuts = (np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist()
        ends = pairwise([0, *cuts, len(order)] if len(order) else ())
        return order, [(int(shards[first]), rows[first:end]) for first, end in ends]

    def _absent(self, position: int) -> NotCaptured:
        index = self._reader.index
        ran = int(index.batches[self.here, 1].sum())
        return NotCaptured(
            f"layer {self.name!r} did not run for the sample {index.ids[position].item()!r}, only for "
            f"{ran} of {plural(len(self._reader), 'sample')}. Read one of view.ids; view.absent lists the others."
        )
