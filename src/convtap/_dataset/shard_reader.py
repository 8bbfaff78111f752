"""Reads a shard: its header at once, a row when it is asked for, and everything to verify it."""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.shard_format import DTYPES, FORMAT, Id, header_checksum
from convtap._errors import StoreError


class Shard:
    """A shard that is read: its header when it is opened, and the bytes of a row when the row is asked for.

    Attributes:
        batches: ``(number, rows)`` of each batch.
        columns: by layer key: ``dtype``, ``flat``, and ``present`` (which of the batches), if not all. ``time`` is the axis
            of a row that is time, counted from the end (None if there is none), and ``timed`` is False if it was assumed;
            shards of earlier versions have neither.

    Raises:
        StoreError: the file is truncated, damaged, or not a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory: mmap.mmap | None = None
        try:
            with open(path, "rb") as file:
                self._read_header(file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise StoreError(f"cannot be read: {error}") from error

    def _read_header(self, file: Any, size: int) -> None:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise StoreError(f"truncated: it has {size} bytes, fewer than its header")
        try:
            header = json.loads(file.read(length))
            metadata = header["__metadata__"]
            about = json.loads(metadata["convtap"])
            checksum = metadata["crc32"]
        except (ValueError, KeyError, TypeError):
            raise StoreError("its header is damaged, or convtap did not write it") from None
        if about["format"] > FORMAT:
            raise StoreError(f"it has format {about['format']}, and this convtap reads up to {FORMAT}: update convtap")
        if header_checksum(header) != checksum:
            raise StoreError("its header is damaged: the checksum differs")
        self._data = 8 + length
        self._parts = {name: part for name, part in header.items() if name != "__metadata__"}
        end = self._data + max((part["data_offsets"][1] for part in self._parts.values()), default=0)
        if size != end:
            raise StoreError(f"{'truncated' if size < end else 'too long'}: it has {size} bytes of {end}")
        self._crc32 = about["crc32"]
        self.batches: list[tuple[int, int]] = [(number, rows) for number, rows in about["batches"]]
        self.columns: dict[str, dict[str, Any]] = about["columns"]
        self._starts: dict[str, dict[int, int]] = {}

    def _buffer(self) -> mmap.mmap:
        if self._memory is None:
            with open(self.path, "rb") as file:
                # a private mapping: torch wants memory that it could write, and the file must never change
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._memory

    def _tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Maps entries ``first`` to ``last`` of axis 0 of one of the file's tensors."""
        part = self._parts[name]
        dtype = DTYPES[part["dtype"]]
        length, *tail = part["shape"]
        shape = [(length if last is None else last) - first, *tail]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        start = self._data + part["data_offsets"][0] + first * math.prod(tail) * dtype.itemsize
        return torch.frombuffer(self._buffer(), dtype=dtype, count=math.prod(shape), offset=start).view(shape)

    def ids(self) -> list[Id]:
        """Returns the id of every row."""
        if "ids" in self._parts:
            return self._tensor("ids").tolist()
        ends = self._tensor("ids.offsets").tolist()
        text = self._tensor("ids.text").numpy().tobytes()
        return [text[start:end].decode() for start, end in pairwise(ends)]

    def id_array(self) -> Any:
        """Returns the id of every row as a NumPy array; ints are not made one by one."""
        import numpy as np

        return self._tensor("ids").numpy().copy() if "ids" in self._parts else np.array(self.ids())

    def labels(self) -> Tensor | None:
        """Returns the label of every row, or None if there are none."""
        return self._tensor("labels").clone() if "labels" in self._parts else None

    def contents(self, place: int) -> tuple[int, ...] | None:
        """Returns the checksums of what a batch was computed from; None in a shard of an earlier version."""
        return tuple(self._tensor("contents", place, place + 1)[0].tolist()) if "contents" in self._parts else None

    def shape(self, key: str) -> list[int | None] | None:
        """Returns the shape of a layer's rows here, None for an axis that varies; None if the number of axes does."""
        if not self.columns[key]["flat"]:
            length, *shape = self._parts[f"layer:{key}"]["shape"]
            if "complex" in self.columns[key]["dtype"]:
                shape.pop()
            return shape if length else []
        low, high = torch.aminmax(self._tensor(f"shapes:{key}"), dim=0)  # where a row has fewer axes, -1 fills up
        return (
            None
            if (low < 0).any()
            else [a if a == b else None for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        )

    def starts(self, key: str) -> dict[int, int]:
        """Returns where each batch's rows of a layer begin, by the batch's place in the shard; absent ones are not in it."""
        found = self._starts.get(key)
        if found is None:
            present = self.columns[key].get("present", range(len(self.batches)))
            found = self._starts[key] = {}
            start = 0
            for place in present:
                found[place] = start
                start += self.batches[place][1]
        return found

    def rows(self, key: str, place: int, first: int, last: int) -> list[Tensor]:
        """Returns rows ``first`` to ``last`` of a layer in a batch, each with its own memory."""
        start = self.starts(key)[place]
        first, last = start + first, start + last
        about = self.columns[key]
        if not about["flat"]:
            return [_restored(row, about["dtype"]).clone() for row in self._tensor(f"layer:{key}", first, last)]
        ends = self._tensor(f"offsets:{key}", first, last + 1).tolist()
        shapes = self._tensor(f"shapes:{key}", first, last).tolist()
        found = []
        for begin, end, shape in zip(ends, ends[1:], shapes, strict=False):
            row = _restored(self._tensor(f"layer:{key}", begin, end), about["dtype"])
            found.append(row.reshape([size for size in shape if size >= 0]).clone())
        return found

    def stacked(self, key: str, place: int) -> Tensor | None:
        """Maps a layer's rows of a batch as one tensor, or returns None if their shapes may differ. Not to be written."""
        about = self.columns[key]
        if about["flat"]:
            return None
        start = self.starts(key)[place]
        return _restored(self._tensor(f"layer:{key}", start, start + self.batches[place][1]), about["dtype"])

    def elements(self, key: str) -> int:
        """Counts a layer's numbers here."""
        return math.prod(self._parts[f"layer:{key}"]["shape"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}

    def problem(self) -> str | None:
        """Reads everything and compares the checksums. Returns what is wrong, or None."""
        try:
            with open(self.path, "rb") as file:
                for name, expected in self._crc32.items():
                    first, last = self._parts[name]["data_offsets"]
                    file.seek(self._data + first)
                    if _checksum(file, last - first) != expected:
                        return f"damaged: the checksum of {name!r} differs"
        except OSError as error:
            return f"cannot be read: {error}"
        return None


def _checksum(file: Any, size: int) -> int:
    checksum = 0
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return checksum


def _restored(stored: Tensor, dtype: str) -> Tensor:
    """Returns stored numbers in the dtype of the layer's output."""
    wanted: torch.dtype = getattr(torch, dtype)
    if wanted.is_complex:
        return torch.view_as_complex(stored)
    return stored if stored.dtype == wanted else stored.view(wanted)
