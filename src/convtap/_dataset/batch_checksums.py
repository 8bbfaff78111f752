"""Checksums of each batch, by which a later run recognizes its data."""

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

#: A checksum for each of ``PARTS``; 0 for a missing one.
Contents: TypeAlias = "tuple[int, ...]"

# Note: [Other data]
# Assumption: rows are stored under the numbers of their batches, so a later run must read the same batches.
# Failure: another data set of equal length passes for the same one, and its samples get the rows of the first.
# Choice: each batch is stored with a checksum of its contents. Before a later run writes, it reads the first, the middle and
#   the last stored batch and compares them. This is cheap, and finds another data set, another order or another tail. Data
#   without random access are compared as they pass, or by their first batch only if nothing is missing. Every process also
#   compares its batch 0 with that of the process that wrote the first shard.
# Data that change each time they are read (random augmentation) look like other data. If a batch can be read again and then
#   differs from itself, nothing is compared.

# Note: [The whole iterable]
# Assumption: every process gets the same iterable and takes its part of the batches.
# Failure: loaders that know the ranks (a node splitter, split_dataset_by_node) yield other samples in each process, which
#   then computes a part of a part. Every batch number is stored, but half of the samples are missing.
# Choice: the process that writes the first shard notes batch 0. A process whose batch 0 differs stops before it writes.


def contents_of(inputs: Any, ids: Any, lengths: Any, labels: Any) -> Contents:
    """Returns the checksums of the model's arguments, ids, lengths and labels."""
    return tuple(0 if part is None else 1 + _checksum(part) for part in (inputs, ids, lengths, labels))


def _checksum(value: Any) -> int:
    checksum = 0
    for piece in _pieces(value):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(value: Any) -> Iterator[Any]:
    """Yields the bytes of the values in a structure; for other objects, the type."""
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
    """Describes the tensors in a model's arguments: ``float32 (4, 1, 16000)``."""
    tensors = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for _, t in walk_tensors(inputs)]
    return listed(tensors, 3)


class SameData:
    """Compares batches with those that the stored rows were computed from.

    See Note: [Other data], [The whole iterable].

    Args:
        path: the directory of the store.
        index: where its batches lie.
        rank: the beginning of each message, such as ``"rank 1 of 2: "``; empty for a single rank.
        again: reads a batch again and returns its contents; returns None if that is not possible.

    Attributes:
        refused: whether the data differ, so that none of their outputs may be written.
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
        """Returns the batches to compare: 0, and the first, middle and last stored."""
        stored = self._index.batches[:, 0]
        some = stored[[0, len(stored) // 2, len(stored) - 1]].tolist() if len(stored) else []
        return sorted({0, *some})

    def look(self, number: int, contents: Contents, inputs: Any, ids: Iterable[Any] | None) -> None:
        """Compares a batch.

        Args:
            number: the number of the batch.
            contents: its checksums.
            inputs: the arguments of the model.
            ids: the ids of its samples, if the data are an iterable and the user passed ``ids``.

        Raises:
            StoreError: the stored rows were computed from another batch.
        """
        if number == 0:
            self._first = {"contents": contents, "shapes": shapes_in(inputs), **({} if ids is None else _ids_seen(ids))}
            self._compare_first()
        self._compare(number, contents, self._stored(number))

    def note_first(self) -> None:
        """Notes the first batch in the store, unless one is noted.

        It must run before a shard is written.

        Raises:
            StoreError: another process has noted another batch.
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
                f"{self._rank}the data begins with the samples {_shown(seen)}, but the process that began this store read "
                f"{_shown(first)} first. Pass every process the whole iterable in the same order, without a node splitter or "
                "split_dataset_by_node, since extract divides the batches among the ranks itself."
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
            f"{self._rank}{str(self._path)!r} was begun with other data. The {' and the '.join(other)} of batch {number} "
            f"differ{how}. Pass another directory, or the same data in the same order."
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
    """Returns the first ids of a batch, their number and their digest."""
    names = [repr(name) for name in ids] if hasattr(ids, "__iter__") else [repr(ids)]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:24]
    return {"ids": names[:3], "count": len(names), "digest": digest}


def _shown(first: dict[str, Any]) -> str:
    more = f", … ({first['count']})" if first["count"] > len(first["ids"]) else ""
    return ", ".join(first["ids"]) + more
