"""Checksums of the contents of each batch: stored with its rows, and compared by a later run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from convtap._dataset.fingerprint import raw_bytes
from convtap._dataset.index import Index
from convtap._dataset.layout import read_note, write_first
from convtap._dataset.shard_reader import Shard
from convtap._errors import StoreError, listed
from convtap._tensors.nested import walk_tensors

#: The compared parts of a batch: the arguments of the model, and the results of the user's functions.
PARTS = ("inputs", "ids", "lengths", "labels")

_FIRST_BATCH = ".beginning.json"

#: A checksum for each of ``PARTS``; 0 for one that is not there.
Contents: TypeAlias = "tuple[int, ...]"

# Note: [Other data]
# Assumption: rows are stored under the numbers of their batches, so a later run must get the same batches.
# Failure: another data set of equal length passes for the same one, and its samples get the rows of the first.
# Choice: each batch is stored with a checksum of its contents. A later run reads the first, the middle and the last batch
#   that is stored and compares them before it writes: enough for another data set, another order or another tail, and
#   cheap. What has no random access is compared as it passes; if nothing is missing, its first batch only. Every process
#   also compares batch 0 with the process that wrote the first shard.
# Data that are others each time they are read (random augmentation) cannot be told from other data by one look. Where a
#   batch can be read again, and then differs from itself, nothing is compared.

# Note: [The whole iterable]
# Assumption: every process gets the same iterable, of which it takes its part of the batches.
# Failure: loaders that know the ranks themselves (a node splitter, split_dataset_by_node) give each process other samples, and
#   a part of a part is computed: the batches are all there, by their numbers, and half of the samples is not.
# Choice: the process that writes the first shard notes batch 0. One that finds another batch there stops before it writes.


def contents_of(inputs: Any, ids: Any, lengths: Any, labels: Any) -> Contents:
    """Returns the checksums of a batch: of the model's arguments, and of what ids=, lengths= and labels= returned."""
    return tuple(0 if part is None else 1 + _checksum(part) for part in (inputs, ids, lengths, labels))


def _checksum(value: Any) -> int:
    checksum = 0
    for piece in _pieces(value):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(value: Any) -> Iterator[Any]:
    """Yields the bytes of tensors, arrays and plain values in a structure; of other objects, the type."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield raw_bytes(value) or type(value).__name__.encode()
    elif hasattr(value, "__array__") and hasattr(value, "dtype") and value.dtype != object:
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping) or (hasattr(value, "items") and not isinstance(value, type)):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
    elif isinstance(value, (tuple, list)):
        yield f"{len(value)} items".encode()
        for item in value:
            yield from _pieces(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _pieces({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, (str, bytes, bool, int, float, complex, type(None))):
        yield repr(value).encode()
    elif hasattr(value, "tolist"):
        yield from _pieces(value.tolist())
    else:
        yield type(value).__qualname__.encode()


def shapes_in(inputs: Any) -> str:
    """Writes what kinds of tensors a model is called with: ``float32 (4, 1, 16000)``."""
    tensors = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for _, t in walk_tensors(inputs)]
    return listed(tensors, 3)


class SameData:
    """Compares batches with those that the stored rows were computed from. See Note: [Other data], [The whole iterable].

    Args:
        path: the store.
        index: where its batches lie.
        rank: which rank this is, to begin a message with; empty if there is one only.
        again: reads a batch once more and returns its contents; None where that is not possible.

    Attributes:
        refused: whether the data were refused, so that nothing of them is to be written.
    """

    def __init__(self, path: Path, index: Index, rank: str, again: Callable[[int], Contents | None]) -> None:
        self._path = path
        self._index = index
        self._rank = rank
        self._again = again
        self._first: dict[str, Any] | None = None
        self._random = False
        self.refused = False

    def numbers(self) -> list[int]:
        """Returns which batches to look at: 0, and the first, the middle and the last that are stored."""
        stored = self._index.batches[:, 0]
        some = stored[[0, len(stored) // 2, len(stored) - 1]].tolist() if len(stored) else []
        return sorted({0, *some})

    def look(self, number: int, contents: Contents, inputs: Any, ids: Iterable[Any] | None) -> None:
        """Compares a batch.

        Args:
            number: which batch it is.
            contents: its checksums.
            inputs: the arguments of the model.
            ids: the ids of its samples, if the data are an iterable and the user names them.

        Raises:
            StoreError: it is not the one that the store has rows of.
        """
        if number == 0:
            self._first = {"contents": contents, "shapes": shapes_in(inputs), **({} if ids is None else _ids_seen(ids))}
            self._compare_first()
        self._compare(number, contents, self._stored(number))

    def note_first(self) -> None:
        """Notes the first batch in the store, unless it has one; to be called before a shard is written.

        Raises:
            StoreError: it has another one: another process was first.
        """
        begun_before = len(self._index.batches) and not self._noted()  # by an earlier version
        if self._first is not None and not begun_before:
            write_first(self._path / _FIRST_BATCH, json.dumps(self._first).encode())
            self._compare_first()
            self._first = None

    def _compare_first(self) -> None:
        seen, first = self._first, self._noted()
        if seen is None:
            return
        if "digest" in first and "digest" in seen and first["digest"] != seen["digest"]:
            self._refuse(
                f"{self._rank}the data begins with the samples {_shown(seen)}, and for the process that began this store it "
                f"began with {_shown(first)}. Every process must be given the whole iterable, in the same order: extract deals "
                "its batches to the ranks itself. Leave out what splits or shuffles it (a node splitter, "
                "split_dataset_by_node)."
            )
        shapes = (first.get("shapes"), seen["shapes"])
        self._compare(0, seen["contents"], first.get("contents"), shapes)

    def _noted(self) -> dict[str, Any]:
        """Returns the first batch as the first process saw it."""
        return read_note(self._path / _FIRST_BATCH)

    def _compare(self, number: int, now: Contents, then: Any, shapes: tuple[Any, Any] = ("", "")) -> None:
        if then is None or self._random:
            return
        other = [part for part, a, b in zip(PARTS, then, now, strict=True) if a and b and a != b]
        if not other:
            return
        again = self._again(number)
        if again is not None and again != now:
            self._random = True
            return
        how = (
            f": {shapes[0]} then, {shapes[1]} now"
            if "inputs" in other and shapes[0] != shapes[1]
            else " in their values"
        )
        self._refuse(
            f"{self._rank}{str(self._path)!r} was begun with other data, so its samples would not go together. The "
            f"{' and the '.join(other)} of batch {number} differ{how}. Give another directory, or the data of before in the "
            "same order."
        )

    def _refuse(self, message: str) -> NoReturn:
        self.refused = True
        raise StoreError(message)

    def _stored(self, number: int) -> Contents | None:
        batches = self._index.batches
        line = int(batches[:, 0].searchsorted(number))
        if line == len(batches) or batches[line, 0] != number:
            return None
        _, _, shard, place = batches[line].tolist()
        return Shard(self._path / self._index.names[shard]).contents(place)


def _ids_seen(ids: Iterable[Any]) -> dict[str, Any]:
    """Writes the ids of a batch in short."""
    names = [repr(name) for name in ids] if hasattr(ids, "__iter__") else [repr(ids)]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:24]
    return {"ids": names[:3], "count": len(names), "digest": digest}


def _shown(first: dict[str, Any]) -> str:
    more = f", … ({first['count']})" if first["count"] > len(first["ids"]) else ""
    return ", ".join(first["ids"]) + more
