"""Where every sample of a store lies: gathered from the headers of all shards, and kept in a file that is only a shortcut."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convtap._atomic_write import write_whole
from convtap._dataset.layout import shard_files
from convtap._dataset.shard_reader import Shard
from convtap._errors import StoreError

_FILE = ".index.npz"
_VERSION = 2
_WORTH_KEEPING = 64  # shards whose headers are read in about ten milliseconds


@dataclass
class LayerSummary:
    """What all rows of a layer have in common.

    Attributes:
        dtype: their dtype, as text; several are joined by ``|``.
        shape: a row's shape, with None for an axis that varies; None if even the number of axes does.
        elements: how many numbers they have together.
        time: which axis of a row is time, counted from the end; None if there is none.
        timed: whether that is known; None if the shards do not say it (those of earlier versions).
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
        """What to say of the time axis after a shape; nothing where it is the last one, as usual."""
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
    """Reads the index of a store, takes in the shards that are newer, and keeps the result if that saves time."""
    files = shard_files(path)
    index = _load(path / _FILE)
    if any(files.get(name) != state for name, state in index.files.items()):
        index = Index()
    bad: dict[str, str] = {}
    fresh = [name for name in files if name not in index.files]
    if fresh:
        known = len(index.files)
        index = _extended(index, _opened(path, fresh, bad), files)
        if len(index.files) - known >= _WORTH_KEEPING:
            with contextlib.suppress(OSError):  # the store may be read-only
                write_whole(path / _FILE, lambda temporary: temporary.write_bytes(_dump(index)))
    index.bad = bad
    return index


def _opened(path: Path, names: list[str], bad: dict[str, str]) -> Iterator[tuple[str, Shard]]:
    """Opens shards one after the other, so that only one header is in memory; notes in ``bad`` what cannot be read."""
    for name in names:
        try:
            shard = Shard(path / name)
        except StoreError as error:
            bad[name] = str(error)
        else:
            yield name, shard


def _extended(old: Index, shards: Iterable[tuple[str, Shard]], files: dict[str, tuple[int, int]]) -> Index:
    import numpy as np

    layers = dict(old.layers)
    lines, ids = [old.batches], [old.ids] if len(old.ids) else []
    runs: list[tuple[slice | list[int], str]] = []  # which lines have which layer
    line, number = len(old.batches), len(old.names)
    known = dict(old.files)
    for name, shard in shards:
        known[name] = files[name]
        places = len(shard.batches)
        lines.append(_lines(shard, number))
        names = shard.id_array()
        if len(names):
            ids.append(names)
        for key, about in shard.columns.items():
            _merge(layers, key, shard)
            some = about.get("present")
            runs.append((slice(line, line + places) if some is None else [line + place for place in some], key))
        line, number = line + places, number + 1
    present = np.zeros((line, len(layers)), np.bool_)
    present[: old.present.shape[0], : old.present.shape[1]] = old.present
    place_of = {key: place for place, key in enumerate(layers)}
    for found, key in runs:
        present[found, place_of[key]] = True
    return _ordered(known, layers, np.concatenate(lines), present, _joined(ids), old.duplicates)


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
    shapes = shard.row_shapes(key)
    shape: list[int | None] | None = []
    if not shard.columns[key]["flat"] and len(shapes):
        shape = shapes[0].tolist()
    elif len(shapes) and shapes.numel():
        low, high = torch.aminmax(shapes, dim=0)
        shape = [a if a == b else None for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        shape = None if (low < 0).any() else shape
    about = shard.columns[key]
    timed = about.get("timed", True) if "time" in about else None
    found = LayerSummary(about["dtype"], shape, shard.elements(key), about.get("time", -1), timed)
    if key in layers:
        layers[key].merge(found)
    else:
        layers[key] = found


def _ordered(files: Any, layers: Any, batches: Any, present: Any, ids: Any, duplicates: Any) -> Index:
    """Brings batches into the order of their numbers; of those that are there twice, the first counts."""
    import numpy as np

    order = np.argsort(batches[:, 0], kind="stable")
    first = np.ones(len(order), np.bool_)
    first[1:] = np.diff(batches[order, 0]) != 0
    duplicates = np.concatenate([duplicates, batches[order[~first]][:, [0, 2]]])
    kept = order[first]
    if len(kept) != len(order) or (kept != np.arange(len(kept))).any():
        rows = batches[kept, 1]
        starts = np.cumsum(batches[:, 1]) - batches[:, 1]
        # of each sample, where it was: its batch's old start, and its place in the batch
        ids = ids[np.repeat(starts[kept] - (np.cumsum(rows) - rows), rows) + np.arange(rows.sum())]
        batches, present = batches[kept], present[kept]
    return Index(files, {}, layers, batches, present, ids, duplicates)


def _dump(index: Index) -> bytes:
    import numpy as np

    layers = [
        [key, layer.dtype, layer.shape, layer.elements, layer.time, layer.timed] for key, layer in index.layers.items()
    ]
    content = {"version": _VERSION, "files": list(index.files.items()), "layers": layers}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        content=np.frombuffer(json.dumps(content).encode(), np.uint8),
        batches=index.batches,
        present=index.present,
        ids=index.ids,
        duplicates=index.duplicates,
    )
    return buffer.getvalue()


def _load(file: Path) -> Index:
    """Reads the file, or returns an empty index: whatever is wrong with it, the shards know better."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as saved:
            content = json.loads(saved["content"].tobytes())
            if content["version"] != _VERSION:
                return Index()
            return Index(
                files={name: (size, time) for name, (size, time) in content["files"]},
                layers={key: LayerSummary(*rest) for key, *rest in content["layers"]},
                **{name: saved[name] for name in ("batches", "present", "ids", "duplicates")},
            )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return Index()
