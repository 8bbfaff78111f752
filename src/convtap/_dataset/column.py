"""Reads one layer's rows in one shard."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtap._dataset.shard_file import CalledFile, MappedFile

#: NumPy's types for those of safetensors. Types that NumPy lacks are read as ints of the same size.
_NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "i2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "?",
}


class Column(NamedTuple):
    """Where one layer's rows lie in a shard.

    Attributes:
        dtype: torch's name of the dtype of the rows.
        stored: safetensors' name of their type in the file.
        at: the offset of the first row, in bytes from the beginning of the file.
        length: the first axis of the tensor in the file: the number of rows, or of all elements if the shapes differ.
        shape: its other axes; complex numbers have a last axis of 2.
        ends: the offset of the ends of rows of different shapes; 0 if all rows have one shape.
        sizes: the offset of the shapes of such rows; 0 if all rows have one shape.
        rows: the number of such rows.
        axes: the number of axes in a stored shape.
    """

    dtype: str
    stored: str
    at: int
    length: int
    shape: tuple[int, ...]
    ends: int = 0
    sizes: int = 0
    rows: int = 0
    axes: int = 0

    @property
    def elements(self) -> int:
        """The number of elements of all rows, as stored in the file."""
        return self.length * math.prod(self.shape)


def numpy_dtype(stored: str) -> Any:
    """Returns the NumPy dtype as which a type of safetensors is read."""
    import numpy as np

    return np.dtype(_NUMPY[stored])


def typed(stored: Tensor, dtype: str) -> Tensor:
    """Returns stored elements in the dtype of the layer's output."""
    wanted: torch.dtype = getattr(torch, dtype)
    if wanted.is_complex:
        # empty NumPy arrays have strides that torch rejects
        return torch.view_as_complex(stored) if stored.numel() else torch.empty(stored.shape[:-1], dtype=wanted)
    return stored if stored.dtype == wanted else stored.view(wanted)


class ColumnReader:
    """Reads one layer's rows in one open shard.

    Args:
        column: where the rows lie.
        file: the shard.
    """

    def __init__(self, column: Column, file: MappedFile | CalledFile) -> None:
        self._check, self._gather = file.check, file.gather
        self._copies = file.copies
        self._wanted = column.dtype
        self._dtype = numpy_dtype(column.stored)
        # an item of an array with one axis is not an array, so rows without axes get one here
        self._is_scalar = not column.shape and not column.ends
        self._shape = (1,) if self._is_scalar else column.shape
        self._rows = file.array(self._dtype, (column.length, *self._shape), column.at)
        self._is_plain = not self._is_scalar and not column.ends and self.block(0).dtype == getattr(torch, self._wanted)
        self._ends: Any = None
        self._sizes: Any = None
        if column.ends:
            int64 = numpy_dtype("I64")
            self._ends = file.array(int64, (column.rows + 1,), column.ends)
            self._sizes = file.array(int64, (column.rows, column.axes), column.sizes)

    def row(self, number: int) -> Tensor:
        """Returns a row. It owns its memory, unless the shard is mapped to share it."""
        self._check()
        if self._is_plain:
            found = self._rows[number]
            return torch.from_numpy(found.copy() if self._copies else found)
        if self._ends is None:
            return self.restored(self._tensor(self._rows[number]))
        first, last = self._ends[number : number + 2].tolist()
        shape = [size for size in self._sizes[number].tolist() if size >= 0]
        return typed(self._tensor(self._rows[first:last]), self._wanted).reshape(shape)

    def block(self, count: int) -> Tensor:
        """Returns an uninitialized block for ``count`` rows, as stored in the file."""
        import numpy as np

        return torch.from_numpy(np.empty((count, *self._shape), self._dtype))

    def fill(self, block: Tensor, rows: Any) -> None:
        """Reads rows of one shape into a block.

        Args:
            block: a result of ``block`` of this reader, or of another shard's, for as many rows.
            rows: the numbers of the rows, as an array of ints in ascending order.
        """
        self._check()
        self._gather(self._rows, rows, block.numpy())

    def restored(self, stored: Tensor) -> Tensor:
        """Returns a row or a block in the dtype and shape of the layer's output."""
        return typed(stored.squeeze(-1) if self._is_scalar else stored, self._wanted)

    def _tensor(self, found: Any) -> Tensor:
        return torch.from_numpy(found.copy() if self._copies else found)
