"""Reads the bytes of an open shard, through a memory map or by read calls."""

from __future__ import annotations

import math
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from convtap._errors import StoreError

# Note: [Mapped shards]
# Assumption: a shard does not change once it has its name. It is written under a temporary name, a new shard has a new
#   number, and a bad one is renamed.
# Failure: if another program truncates a mapped file, or its server or disk fails, an access ends the process with SIGBUS
#   instead of an exception.
# Choice: the size of the file is checked before each read of the map, so a truncated file raises an error. On a network
#   file system shards are read by calls, whose failures are all errors. The user reads rows of ``copy=False`` without that
#   check, so only they can still meet a truncated file.
# Writes into a row of ``copy=False`` stay in this process, since its map is private.


class MappedFile:
    """A shard in a memory map.

    Args:
        path: the file.
        name: the shard's name in errors.
        size: the expected size of the file.
        copies: whether to copy the rows that are read; if False, they lie in the map and are writable.

    Raises:
        OSError, ValueError: the file cannot be opened or mapped.
    """

    def __init__(self, path: Path, name: str, size: int, copies: bool) -> None:
        with open(path, "rb") as file:  # the map keeps a descriptor of its own
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ if copies else mmap.ACCESS_COPY)
        self._name = name
        self._size = size
        self.copies = copies

    def check(self) -> None:
        """Checks the size of the file. See Note: [Mapped shards]."""
        if self._map.size() != self._size:
            raise resized(self._name, self._map.size(), self._size)

    def array(self, dtype: Any, shape: tuple[int, ...], at: int) -> Any:
        """Returns an array that lies in the map."""
        import numpy as np

        return np.ndarray(shape, dtype, self._map, at)

    def gather(self, array: Any, rows: Any, target: Any) -> None:
        """Copies rows of an array of this file into another array."""
        array.take(rows, 0, target, "clip")  # the other modes copy twice


class CalledFile:
    """A shard that is read by calls.

    Its descriptor closes with the last reference, in any thread.

    Args:
        path: the file.
        name: the shard's name in errors.
        size: the expected size of the file.

    Raises:
        OSError: the file cannot be opened.
    """

    copies = False

    def __init__(self, path: Path, name: str, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._name = name
        self._size = size

    def check(self) -> None:
        """Does nothing, since a read call itself fails if bytes are missing."""

    def array(self, dtype: Any, shape: tuple[int, ...], at: int) -> Any:
        """Returns an array that is read when it is indexed on axis 0."""
        return _Unread(self, dtype, shape, at)

    def gather(self, array: Any, rows: Any, target: Any) -> None:
        """Reads rows, in ascending order, into another array; adjacent ones in one call."""
        import numpy as np

        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for first, end in pairwise(cuts):
            array.read(int(rows[first]), target[first:end])

    def read(self, buffer: memoryview, at: int) -> None:
        """Fills a buffer with the bytes from ``at`` on.

        Raises:
            StoreError: the file is too short, or cannot be read.
        """
        while len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer], at)
            except OSError as error:
                raise StoreError(
                    f"{self._name!r} cannot be read: {error}. Check the disk or the connection."
                ) from error
            if not count:
                raise resized(self._name, os.fstat(self._file.fileno()).st_size, self._size)
            at, buffer = at + count, buffer[count:]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class _Unread:
    """An array in a file, of which an int or a slice on axis 0 reads a part."""

    def __init__(self, file: CalledFile, dtype: Any, shape: tuple[int, ...], at: int) -> None:
        self._file = file
        self._dtype = dtype
        self._row = shape[1:]
        self._at = at
        self._step = math.prod(shape[1:]) * dtype.itemsize

    def __getitem__(self, key: int | slice) -> Any:
        import numpy as np

        first, shape = (key.start, (key.stop - key.start, *self._row)) if isinstance(key, slice) else (key, self._row)
        found = np.empty(shape, self._dtype)
        self.read(first, found)
        return found

    def read(self, first: int, target: Any) -> None:
        """Reads the rows from ``first`` on into an array."""
        self._file.read(target.reshape(-1).view("u1").data, self._at + first * self._step)


def resized(name: str, found: int, expected: int) -> StoreError:
    """Returns the error for a shard whose size has changed."""
    what = "truncated" if found < expected else "too long"
    return changed(name, f"{what}: it has {found} bytes instead of {expected}")


def changed(name: str, problem: object) -> StoreError:
    """Returns the error for a shard that was whole when the store was opened."""
    return StoreError(
        f"{name!r} was whole when the store was opened, but now it is not ({problem}). Restore the file, or run extract(..., "
        "resume=True) and open the store again."
    )
