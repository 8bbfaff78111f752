"""Where every sample of a store lies: gathered from the headers of all shards, and kept in a file that is only a shortcut."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from convtap._errors import StoreError
from convtap._place import shard_files, write_whole
from convtap._reading import Shard

_FILE = ".index.npz"
_VERSION = 1
_WORTH_KEEPING = 64  # shards whose headers are read in about ten milliseconds


@dataclass
class LayerSummary:
    """What all rows of a layer have in common.

    Attributes:
        dtype: their dtype, as text; several are joined by ``|``.
        shape: a row's shape, with None for an axis that varies; None if even the number of axes does.
        elements: how many numbers they have together.
    """

    dtype: str
    shape: list[int | None] | None
    elements: int = 0

    def merge(self, dtype: str, shape: list[int | None] | None, elements: int) -> None:
        """Takes another shard's rows in."""
        if dtype not in self.dtype.split("|"):
            self.dtype += f"|{dtype}"
        if self.shape is None or shape is None or len(self.shape) != len(shape):
            self.shape = None
        else:
            self.shape = [a if a == b else None for a, b in zip(self.shape, shape, strict=True)]
        self.elements += elements


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
    shards, bad = {}, {}
    for name in files:
        if name not in index.files:
            try:
                shards[name] = Shard(path / name)
            except StoreError as error:
                bad[name] = str(error)
    if shards:
        index = _extended(index, shards, files)
        if len(shards) >= _WORTH_KEEPING:
            with contextlib.suppress(OSError):  # the store may be read-only
                write_whole(path / _FILE, _dump(index))
    index.bad = bad
    return index


def _extended(old: Index, shards: dict[str, Shard], files: dict[str, tuple[int, int]]) -> Index:
    import numpy as np

    layers = dict(old.layers)
    lines, ids = [old.batches], [old.ids] if len(old.ids) else []
    runs: list[tuple[int, str, list[int]]] = []  # which lines have which layer
    line, number = len(old.batches), len(old.names)
    for shard in shards.values():
        places = len(shard.batches)
        lines.append(np.array([(n, rows, number, place) for place, (n, rows) in enumerate(shard.batches)], np.int64))
        if names := shard.ids():
            ids.append(np.array(names))
        for key, about in shard.columns.items():
            _merge(layers, key, shard)
            runs.append((line, key, about.get("present") or list(range(places))))
        line, number = line + places, number + 1
    present = np.zeros((line, len(layers)), np.bool_)
    present[: old.present.shape[0], : old.present.shape[1]] = old.present
    place_of = {key: place for place, key in enumerate(layers)}
    for first, key, places_present in runs:
        present[[first + place for place in places_present], place_of[key]] = True
    known = {**old.files, **{name: files[name] for name in shards}}
    return _ordered(known, layers, np.concatenate(lines), present, _joined(ids), old.duplicates)


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
    if len(shapes) and shapes.numel():
        low, high = torch.aminmax(shapes, dim=0)
        shape = [a if a == b else None for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        shape = None if (low < 0).any() else shape
    dtype = shard.columns[key]["dtype"]
    if key in layers:
        layers[key].merge(dtype, shape, shard.elements(key))
    else:
        layers[key] = LayerSummary(dtype, shape, shard.elements(key))


def _ordered(files: Any, layers: Any, batches: Any, present: Any, ids: Any, duplicates: Any) -> Index:
    """Brings batches into the order of their numbers; of those that are there twice, the first counts."""
    import numpy as np

    order = np.argsort(batches[:, 0], kind="stable")
    first = np.ones(len(order), np.bool_)
    first[1:] = np.diff(batches[order, 0]) != 0
    duplicates = np.concatenate([duplicates, batches[order[~first]][:, [0, 2]]])
    kept = order[first]
    if len(kept) != len(order) or (kept != np.arange(len(kept))).any():
        starts = np.array(list(accumulate(batches[:, 1].tolist(), initial=0)))
        ids = np.concatenate([ids[starts[line] : starts[line + 1]] for line in kept.tolist()])
        batches, present = batches[kept], present[kept]
    return Index(files, {}, layers, batches, present, ids, duplicates)


def _dump(index: Index) -> bytes:
    import numpy as np

    layers = [[key, layer.dtype, layer.shape, layer.elements] for key, layer in index.layers.items()]
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
