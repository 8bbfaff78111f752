"""Where every sample of a store lies: gathered from the headers of all shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convtap._dataset.layout import shard_files
from convtap._dataset.shard_reader import Shard
from convtap._errors import StoreError

# Note: [No saved index]
# Assumption: the headers of the shards hold where every sample lies.
# Failure: a file that saves the reading of them can contradict them.
# Choice: none is saved. A header is read in 0.2 ms on one core (8 layers, 1000 samples): a store of 10^5 samples in 100
#   shards opens in 0.03 s, and one of 10^6 in 1000 shards in 0.24 s, of which such a file would save all but 0.01 s.


@dataclass
class LayerSummary:
    """What all rows of a layer have in common.

    Attributes:
        dtype: their dtype, as text; several are joined by ``|``.
        shape: a row's shape, with None for an axis that varies; None if even the number of axes does.
        elements: how many numbers they have together.
        time: which axis of a row is time, counted from the end; None if there is none.
        timed: whether that is known; None in shards of earlier versions, which do not hold it.
    """

    dtype: str
    shape: list[int | None] | None
    elements: int = 0
    time: int | None = -1
    timed: bool | None = None

    @property
    def time_dim(self) -> int | None:
        """Which axis of a row is time: as it is known, else the only one that varies, else what is assumed; None for none."""
        varying = [place for place, size in enumerate(self.shape or ()) if size is None]
        if self.timed or self.shape is None:
            return self.time
        if len(varying) == 1:
            return varying[0] - len(self.shape)
        return self.time if len(self.shape) > 1 else None

    @property
    def is_assumed(self) -> bool:
        """Whether the time axis was not known when the rows were written, and they do not tell it either."""
        shape = self.shape or ()
        return self.timed is False and len(shape) > 1 and sum(size is None for size in shape) != 1

    @property
    def time_note(self) -> str:
        """A note on the time axis, to follow a shape; empty if it is the last one, as usual."""
        if self.is_assumed:
            return f", axis {self.time_dim} taken as time"
        return "" if self.time_dim in (None, -1) else f", time is axis {self.time_dim}"

    def merge(self, other: LayerSummary) -> None:
        """Takes another shard's rows in."""
        dtype, shape = other.dtype, other.shape
        if dtype not in self.dtype.split("|"):
            self.dtype += f"|{dtype}"
        if self.shape is None or shape is None or len(self.shape) != len(shape):
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
    """Where every sample lies.

    Attributes:
        files: by shard name, its size and time.
        bad: by shard name, why it cannot be read.
        layers: by key.
        batches: one line a batch, in the order of their numbers: number, rows, shard, place in the shard.
        present: (batches, layers): whether the layer ran in the batch.
        ids: one for each sample, in the order of the batches.
        duplicates: (number, shard) of batches that another shard holds already.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerSummary] = field(default_factory=dict)
    batches: Any = field(default_factory=lambda: _empty("int64", 0, 4))
    present: Any = field(default_factory=lambda: _empty("bool", 0, 0))
    ids: Any = field(default_factory=lambda: _empty("int64", 0))
    duplicates: Any = field(default_factory=lambda: _empty("int64", 0, 2))

    def __post_init__(self) -> None:
        import numpy as np

        self.names = list(self.files)
        self.starts = np.concatenate([[0], np.cumsum(self.batches[:, 1])])

    @property
    def numbers(self) -> set[int]:
        """The numbers of the batches that are here."""
        return set(self.batches[:, 0].tolist())

    def locate(self, position: int) -> tuple[int, str, int, int]:
        """Returns where a sample lies: line of its batch, shard, the batch's place in it, row in the batch."""
        line = int(self.starts.searchsorted(position, "right")) - 1
        _, _, shard, place = self.batches[line].tolist()
        return line, self.names[shard], place, position - int(self.starts[line])


def _empty(dtype: str, *shape: int) -> Any:
    import numpy as np

    return np.zeros(shape, dtype)


def read_index(path: Path) -> Index:
    """Reads the headers of all shards of a store. See Note: [No saved index]."""
    import numpy as np

    files: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}
    layers: dict[str, LayerSummary] = {}
    lines, ids = [_empty("int64", 0, 4)], []
    runs: list[tuple[slice | list[int], str]] = []  # which lines have which layer
    line = 0
    for name, state in shard_files(path).items():
        try:
            shard = Shard(path / name)  # dropped with the next one, so that a single header is in memory
        except StoreError as error:
            bad[name] = str(error)
            continue
        lines.append(_lines(shard, len(files)))
        files[name] = state
        if len(names := shard.id_array()):
            ids.append(names)
        for key, about in shard.columns.items():
            _merge(layers, key, shard)
            some = about.get("present")
            all_lines = slice(line, line + len(shard.batches))
            runs.append((all_lines if some is None else [line + place for place in some], key))
        line += len(shard.batches)
    place_of = {key: place for place, key in enumerate(layers)}
    present = np.zeros((line, len(layers)), np.bool_)
    for found, key in runs:
        present[found, place_of[key]] = True
    return _ordered(files, bad, layers, np.concatenate(lines), present, _joined(ids))


def _lines(shard: Shard, number: int) -> Any:
    """The batches of a shard, one line each: number, rows, shard, place in the shard."""
    import numpy as np

    lines = np.empty((len(shard.batches), 4), np.int64)
    lines[:, :2] = np.array(shard.batches, np.int64).reshape(-1, 2)
    lines[:, 2], lines[:, 3] = number, np.arange(len(lines))
    return lines


def _joined(ids: list[Any]) -> Any:
    import numpy as np

    if len({array.dtype.kind for array in ids}) > 1:
        raise StoreError(
            "some shards have int ids and others str, so they are not of one extraction. Remove the ranks that do not belong."
        )
    return np.concatenate(ids) if ids else _empty("int64", 0)


def _merge(layers: dict[str, LayerSummary], key: str, shard: Shard) -> None:
    about = shard.columns[key]
    timed = about.get("timed", True) if "time" in about else None
    found = LayerSummary(about["dtype"], shard.shape(key), shard.elements(key), about.get("time", -1), timed)
    if key in layers:
        layers[key].merge(found)
    else:
        layers[key] = found


def _ordered(files: Any, bad: Any, layers: Any, batches: Any, present: Any, ids: Any) -> Index:
    """Brings batches into the order of their numbers; of those that are there twice, the first counts."""
    import numpy as np

    order = np.argsort(batches[:, 0], kind="stable")
    first = np.ones(len(order), np.bool_)
    first[1:] = np.diff(batches[order, 0]) != 0
    duplicates = batches[order[~first]][:, [0, 2]]
    kept = order[first]
    if len(kept) != len(order) or (kept != np.arange(len(kept))).any():
        rows = batches[kept, 1]
        starts = np.cumsum(batches[:, 1]) - batches[:, 1]
        # of each sample, where it was: its batch's old start, and its place in the batch
        ids = ids[np.repeat(starts[kept] - (np.cumsum(rows) - rows), rows) + np.arange(rows.sum())]
        batches, present = batches[kept], present[kept]
    return Index(files, bad, layers, batches, present, ids, duplicates)
