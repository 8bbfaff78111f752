"""The bytes of an open shard: through a memory map, or by read calls."""

from __future__ import annotations

import math
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from convtap._errors import StoreError

# Note: [Mapped shards]
# Assumption: a shard does not change once it has its name. It is written under another name, a new one has a new number,
#   and a bad one is renamed.
# Failure: where a mapped file was cut by another program, or its server or disk fails, the access ends the process with
#   SIGBUS: there is no exception.
# Choice: a map is read only after a look at the size of its file, so that a file that was cut is an error. On a network
#   file system shards are read by calls, whose failures are all errors. Rows of ``copy=False`` are read by the user, with
#   no look at the size; only they can still meet a file that was cut.
# What is written into a row of ``copy=False`` stays in this process: its map is private.


class MappedFile:
    """A shard in a memory map.

    Args:
        path: the file.
        name: what errors call it.
        size: the size that the file must have.
        copies: whether the rows that are read are to be copied; without, they lie in the map, and can be written there.

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
        """Compares the size of the file. See Note: [Mapped shards]."""
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
    """A shard that is read by calls. Its descriptor closes with the last reference, whatever thread that is in.

    Args:
        path: the file.
        name: what errors call it.
        size: the size that the file must have.

    Raises:
        OSError: the file cannot be opened.
    """

    copies = False

    def __init__(self, path: Path, name: str, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._name = name
        self._size = size

    def check(self) -> None:
        """Does nothing: a call finds out itself that bytes are missing."""

    def array(self, dtype: Any, shape: tuple[int, ...], at: int) -> Any:
        """Returns what reads an array when it is indexed on axis 0."""
        return _Unread(self, dtype, shape, at)

    def gather(self, array: Any, rows: Any, target: Any) -> None:
        """Reads rows of an array of this file, in ascending order, into another array; neighbors by one call."""
        import numpy as np

        cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for first, end in pairwise(cuts):
            array.read(int(rows[first]), target[first:end])

    def read(self, buffer: memoryview, at: int) -> None:
        """Fills a buffer.

        Raises:
            StoreError: the file ends before, or it cannot be read.
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
    """An array in a file: an int or a slice on axis 0 reads that part of it."""

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
        """Reads rows from one on into an array."""
        self._file.read(target.reshape(-1).view("u1").data, self._at + first * self._step)


def resized(name: str, found: int, expected: int) -> StoreError:
    """Returns the error for a shard that has another size than before."""
    what = "truncated" if found < expected else "too long"
    return StoreError(f"{name!r} {what}: it has {found} bytes of {expected}. It was whole when the store was opened.")
