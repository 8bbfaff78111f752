"""Finds where each sample of a store lies, from the headers of its shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convtap._dataset.column import Column
from convtap._dataset.layout import shard_files
from convtap._dataset.shard_reader import Shard
from convtap._errors import StoreError

# Note: [No saved index]
# Assumption: the headers of the shards tell where every sample lies.
# Failure: a saved index can contradict them.
# Choice: the index is not saved. Reading a header takes 0.1 ms on one core (8 layers, 1000 samples), so a store of 10^6
#   samples in 1000 shards opens in 0.1 s.


@dataclass
class LayerSummary:
    """The common properties of all rows of a layer.

    Attributes:
        dtype: their dtype, as text; several are joined by ``|``.
        shape: a row's shape, with None for an axis that varies; None if the number of axes varies.
        elements: the number of elements of all rows.
        time: the axis of a row that is time, counted from the end; None if no axis is.
        timed: whether ``time`` is known; None in shards of earlier versions, which do not store it.
    """

    dtype: str
    shape: list[int | None] | None
    elements: int = 0
    time: int | None = -1
    timed: bool | None = None

    @property
    def time_dim(self) -> int | None:
        """The axis of a row that is time, or None.

        It is the known axis, else the only one that varies, else the assumed one.
        """
        varying = [place for place, size in enumerate(self.shape or ()) if size is None]
        if self.timed or self.shape is None:
            return self.time
        if len(varying) == 1:
            return varying[0] - len(self.shape)
        return self.time if len(self.shape) > 1 else None

    @property
    def is_assumed(self) -> bool:
        """Whether neither the extraction nor the shapes of the rows tell the time axis."""
        shape = self.shape or ()
        return self.timed is False and len(shape) > 1 and sum(size is None for size in shape) != 1

    @property
    def time_note(self) -> str:
        """A note on the time axis that follows a shape; empty if it is the last axis."""
        if self.is_assumed:
            return f", axis {self.time_dim} taken as time"
        return "" if self.time_dim in (None, -1) else f", time is axis {self.time_dim}"

    def merge(self, other: LayerSummary) -> None:
        """Adds the rows of another shard."""
        dtype, shape = other.dtype, other.shape
        if dtype != self.dtype and dtype not in self.dtype.split("|"):
            self.dtype += f"|{dtype}"
        if shape == self.shape:
            pass
        elif self.shape is None or shape is None or len(self.shape) != len(shape):
            self.shape = None
        else:
            self.shape = [a if a == b else None for a, b in zip(self.shape, shape, strict=True)]
        self.elements += other.elements
        if self.timed is None:
            self.time, self.timed = other.time, other.timed
        elif other.timed is not None:
            self.timed = self.timed and other.timed and self.time == other.time


@dataclass
class Index:
    """The place of each sample in a store.

    Attributes:
        files: the size and time of each shard, by name.
        bad: why a shard cannot be read, by name.
        layers: the summary of each layer, by key.
        batches: one line a batch, in the order of their numbers: number, rows, shard, place in the shard.
        present: (batches, layers): whether the layer ran in the batch.
        ids: one for each sample, in the order of the batches.
        duplicates: (number, shard) of batches that another shard also holds.
        columns: for each shard, where the rows of each layer lie, by key.
        begins: for each batch, its first row among those of a layer that ran in every batch of the shard.
        others: the same for a layer that did not run in every batch, by key.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerSummary] = field(default_factory=dict)
    batches: Any = field(default_factory=lambda: _empty("int64", 0, 4))
    present: Any = field(default_factory=lambda: _empty("bool", 0, 0))
    ids: Any = field(default_factory=lambda: _empty("int64", 0))
    duplicates: Any = field(default_factory=lambda: _empty("int64", 0, 2))
    columns: list[dict[str, Column]] = field(default_factory=list)
    begins: Any = field(default_factory=lambda: _empty("int64", 0))
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import numpy as np

        self.names = list(self.files)
        self.starts = np.concatenate([[0], np.cumsum(self.batches[:, 1])])

    @property
    def numbers(self) -> set[int]:
        """The numbers of the stored batches."""
        return set(self.batches[:, 0].tolist())


def _empty(dtype: str, *shape: int) -> Any:
    import numpy as np

    return np.zeros(shape, dtype)


def read_index(path: Path) -> Index:
    """Reads the headers of all shards of a store. See Note: [No saved index]."""
    reading = _Reading()
    for name, state in shard_files(path).items():
        try:
            reading.add(name, state, Shard(f"{path}/{name}"))  # only the entries of the index stay in memory
        except StoreError as error:
            reading.bad[name] = str(error)
    return reading.ordered()


class _Reading:
    """Collects the contents of the shards read so far, in the order of the shards."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.bad: dict[str, str] = {}
        self._layers: dict[str, LayerSummary] = {}
        self._known: dict[str, Any] = {}
        self._columns: list[dict[str, Column]] = []
        self._lines = [_empty("int64", 0, 4)]
        self._ids: list[Any] = []
        self._begins = [_empty("int64", 0)]
        self._count = 0
        self._runs: dict[str, list[list[int]]] = {}  # by layer, the first line and the end of the lines in which it ran
        # a layer that ran in only some of a shard's batches, the shard's first line, and the begins of its batches
        self._others: list[tuple[str, int, list[int]]] = []

    def add(self, name: str, state: tuple[int, int], shard: Shard) -> None:
        """Adds a shard, or nothing of it if part of it cannot be read."""
        import numpy as np

        ids = shard.id_array()
        columns = {key: shard.column(key) for key in shard.columns}
        kinds = {
            key: (about.get("time", -1), about.get("timed"), "time" in about) for key, about in shard.columns.items()
        }
        new = {key: _summary(shard, key) for key in columns if not self._is_known(key, columns[key], kinds[key])}
        lines = np.empty((len(shard.batches), 4), np.int64)
        lines[:, :2] = np.array(shard.batches, np.int64).reshape(-1, 2)
        lines[:, 2], lines[:, 3] = len(self.files), np.arange(len(lines))
        self.files[name] = state
        self._columns.append(columns)
        self._lines.append(lines)
        self._begins.append(np.cumsum(lines[:, 1]) - lines[:, 1])
        if len(ids):
            self._ids.append(ids)
        first, self._count = self._count, self._count + len(lines)
        for key, about in shard.columns.items():
            if key not in new:  # most shards are like the one before, and this is faster than merging
                self._layers[key].elements += columns[key].elements
            elif key in self._layers:
                self._layers[key].merge(new[key])
            else:
                self._layers[key] = new[key]
            self._known[key] = (columns[key].dtype, columns[key].shape, kinds[key])
            runs = self._runs.setdefault(key, [])
            if "present" in about:
                self._others.append((key, first, shard.begins(key)))
            elif runs and runs[-1][1] == first:
                runs[-1][1] = self._count
            else:
                runs.append([first, self._count])

    def _is_known(self, key: str, column: Column, kind: Any) -> bool:
        """Whether a layer's rows have one shape and the same summary as in the last shard."""
        return column.length > 0 and not column.ends and self._known.get(key) == (column.dtype, column.shape, kind)

    def ordered(self) -> Index:
        """Returns the index with batches in order; the first of duplicate batches counts."""
        import numpy as np

        batches, begins, ids = np.concatenate(self._lines), np.concatenate(self._begins), _joined(self._ids)
        present, others = self._present(begins)
        order = np.argsort(batches[:, 0], kind="stable")
        first = np.ones(len(order), np.bool_)
        first[1:] = np.diff(batches[order, 0]) != 0
        duplicates = batches[order[~first]][:, [0, 2]]
        kept = order[first]
        if len(kept) != len(order) or (kept != np.arange(len(kept))).any():
            rows = batches[kept, 1]
            starts = np.cumsum(batches[:, 1]) - batches[:, 1]
            # the old place of each sample: its batch's old start, and its place in the batch
            ids = ids[np.repeat(starts[kept] - (np.cumsum(rows) - rows), rows) + np.arange(rows.sum())]
            batches, present, begins = batches[kept], present[kept], begins[kept]
            others = {key: rows[kept] for key, rows in others.items()}
        tables = (batches, present, ids, duplicates, self._columns, begins, others)
        return Index(self.files, self.bad, self._layers, *tables)

    def _present(self, begins: Any) -> tuple[Any, dict[str, Any]]:
        """Returns which layers ran in which lines, and the entries of ``Index.others``."""
        import numpy as np

        present = np.zeros((len(begins), len(self._layers)), np.bool_)
        places = {key: place for place, key in enumerate(self._layers)}
        for key, runs in self._runs.items():
            for first, end in runs:
                present[first:end, places[key]] = True
        others = {key: begins.copy() for key in dict.fromkeys(key for key, *_ in self._others)}
        for key, first, some in self._others:
            others[key][first : first + len(some)] = some
            present[first : first + len(some), places[key]] = np.array(some) >= 0
        return present, others


def _summary(shard: Shard, key: str) -> LayerSummary:
    about = shard.columns[key]
    timed = about.get("timed", True) if "time" in about else None
    return LayerSummary(about["dtype"], shard.shape(key), shard.elements(key), about.get("time", -1), timed)


def _joined(ids: list[Any]) -> Any:
    import numpy as np

    if len({array.dtype.kind for array in ids}) > 1:
        raise StoreError(
            "some shards have int ids and others str, so they belong to several extractions. Remove the rank folders of the "
            "other extractions."
        )
    return np.concatenate(ids) if ids else _empty("int64", 0)
