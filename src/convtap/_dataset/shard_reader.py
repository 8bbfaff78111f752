"""Reads the header, ids and labels of a shard, and verifies its checksums."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.column import Column, numpy_dtype, typed
from convtap._dataset.shard_format import DTYPES, FORMAT, Id, header_checksum
from convtap._errors import StoreError

#: The bytes read at once when a shard is opened: the header, and the ids of a small shard.
_HEAD_BYTES = 1 << 14
_CHECKSUM = re.compile(rb', "crc32": "(\d+)"\}')


class Shard:
    """The header of a shard, read and checked by the constructor.

    The file is not kept open.

    Attributes:
        batches: ``(number, rows)`` of each batch.
        columns: by layer key, ``dtype``, ``flat``, and ``present`` (the places of its batches) if the layer did not run in
            all. ``time`` is the axis of a row that is time, counted from the end (None if no axis is), and ``timed`` is False
            if it was assumed; shards of earlier versions have neither.

    Raises:
        StoreError: the file is truncated, damaged, or not a shard.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                self._head = file.read(_HEAD_BYTES)
                length = int.from_bytes(self._head[:8], "little")
                size = os.fstat(file.fileno()).st_size
                if size < 8 or length > size - 8:
                    raise StoreError(f"truncated: it has {size} bytes, fewer than its header")
                while len(self._head) < 8 + length and (more := file.read(8 + length - len(self._head))):
                    self._head += more
        except OSError as error:
            raise StoreError(f"cannot be read: {error}") from error
        self._read_header(self._head[8 : 8 + length], size)

    def _read_header(self, text: bytes, size: int) -> None:
        try:
            header = json.loads(text)
            metadata = header["__metadata__"]
            about = json.loads(metadata["convtap"])
            checksum = metadata["crc32"]
        except (ValueError, KeyError, TypeError):
            raise StoreError("its header is damaged, or convtap did not write it") from None
        if about["format"] > FORMAT:
            raise StoreError(f"it has format {about['format']}, but this convtap reads up to {FORMAT} (update convtap)")
        if _checksum_as_written(text) != checksum and header_checksum(header) != checksum:
            raise StoreError("its header is damaged: the checksum differs")
        self._data = 8 + len(text)
        del header["__metadata__"]
        self._parts: dict[str, Any] = header
        end = self._data + max((part["data_offsets"][1] for part in self._parts.values()), default=0)
        if size != end:
            raise StoreError(f"{'truncated' if size < end else 'too long'}: it has {size} bytes instead of {end}")
        self._crc32 = about["crc32"]
        self.batches: list[tuple[int, int]] = [(number, rows) for number, rows in about["batches"]]
        self.columns: dict[str, dict[str, Any]] = about["columns"]

    def column(self, key: str) -> Column:
        """Returns where a layer's rows lie."""
        dtype, part = self.columns[key]["dtype"], self._parts[f"layer:{key}"]
        at, (length, *shape) = self._data + part["data_offsets"][0], part["shape"]
        if not self.columns[key]["flat"]:
            return Column(dtype, part["dtype"], at, length, tuple(shape))
        ends, sizes = self._parts[f"offsets:{key}"], self._parts[f"shapes:{key}"]
        places = (self._data + ends["data_offsets"][0], self._data + sizes["data_offsets"][0])
        return Column(dtype, part["dtype"], at, length, tuple(shape), *places, *sizes["shape"])

    def begins(self, key: str) -> list[int]:
        """Returns the first row of each batch among a layer's; -1 if it did not run."""
        found, row = [-1] * len(self.batches), 0
        for place in self.columns[key].get("present", range(len(self.batches))):
            found[place] = row
            row += self.batches[place][1]
        return found

    def ids(self) -> list[Id]:
        """Returns the id of every row."""
        if "ids" in self._parts:
            return self._array("ids").tolist()  # type: ignore[no-any-return]
        ends = self._array("ids.offsets").tolist()
        text = self._array("ids.text").tobytes()
        return [text[start:end].decode() for start, end in pairwise(ends)]

    def id_array(self) -> Any:
        """Returns the id of every row as a NumPy array, without a Python int for each."""
        import numpy as np

        return self._array("ids") if "ids" in self._parts else np.array(self.ids())

    def labels(self) -> Tensor | None:
        """Returns the label of every row, or None if the shard has no labels."""
        if "labels" not in self._parts:
            return None
        dtype = DTYPES[self._parts["labels"]["dtype"]]
        return typed(torch.from_numpy(self._array("labels").copy()), str(dtype).removeprefix("torch."))

    def contents(self, place: int) -> tuple[int, ...] | None:
        """Returns the checksums of a batch's data; None in a shard of an earlier version."""
        return tuple(self._array("contents")[place].tolist()) if "contents" in self._parts else None

    def shape(self, key: str) -> list[int | None] | None:
        """Returns the shape of a layer's rows, with None for an axis that varies.

        The result is None if the number of axes varies.
        """
        if not self.columns[key]["flat"]:
            length, *shape = self._parts[f"layer:{key}"]["shape"]
            if "complex" in self.columns[key]["dtype"]:
                shape.pop()
            return shape if length else []
        sizes = self._array(f"shapes:{key}")
        low, high = sizes.min(0), sizes.max(0)  # a row with fewer axes is filled up with -1
        return (
            None
            if (low < 0).any()
            else [a if a == b else None for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        )

    def elements(self, key: str) -> int:
        """Returns the number of elements of a layer's rows."""
        return math.prod(self._parts[f"layer:{key}"]["shape"])

    def _array(self, name: str) -> Any:
        """Reads one of the file's tensors as a whole."""
        import numpy as np

        part = self._parts[name]
        dtype, count, at = numpy_dtype(part["dtype"]), math.prod(part["shape"]), self._data + part["data_offsets"][0]
        if at + count * dtype.itemsize <= len(self._head):
            return np.frombuffer(self._head, dtype, count, at).reshape(part["shape"])
        try:
            found = np.fromfile(self.path, dtype, count, offset=at)
        except OSError as error:
            raise StoreError(f"cannot be read: {error}") from error
        if len(found) != count:
            raise StoreError(f"truncated: {name!r} is incomplete")
        return found.reshape(part["shape"])

    def problem(self) -> str | None:
        """Reads the file and compares its checksums. Returns the problem, or None."""
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


def _checksum_as_written(text: bytes) -> str:
    """Returns the checksum of a header's text without the checksum itself.

    It equals ``header_checksum``, which serializes the header again, and is five times as fast.
    """
    found = _CHECKSUM.search(text)
    if found is None:
        return ""
    rest = text[: found.start()] + text[found.end() - 1 :].rstrip()
    return str(zlib.crc32(rest))


def _checksum(file: Any, size: int) -> int:
    checksum = 0
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return checksum
