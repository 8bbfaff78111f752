"""Writes shards: safetensors files of whole batches, with a checksum of each part."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convtap._errors import StoreError, Unsupported, listed
from convtap._tensors.layout import Axes

FORMAT = 1

#: One layer's rows in one batch: stacked on axis 0, or one tensor a row if their shapes differ.
Rows: TypeAlias = "Tensor | list[Tensor]"
Id: TypeAlias = "int | str"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: The least number of bytes in one write, since a write for each row would be slow.
_WRITE_BYTES = 1 << 20
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Batch:
    """The rows of one batch.

    Attributes:
        number: its place in the data set's order of batches.
        ids: one for each row.
        columns: the rows of each layer that ran, by key.
        labels: one row for each id, or None.
        contents: the checksums of the data from which the rows were computed, or None.
        axes: the time axis of the rows, by layer key, as far as it is known.
    """

    number: int
    ids: Sequence[Id]
    columns: dict[str, Rows]
    labels: Tensor | None = None
    contents: tuple[int, ...] | None = None
    axes: dict[str, Axes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return sum(tensor.nbytes for rows in self.columns.values() for tensor in as_list(rows))


def as_list(rows: Rows) -> list[Tensor]:
    """Returns the tensors of rows: a stacked one, or one for each row."""
    return [rows] if isinstance(rows, Tensor) else rows


def _row_shapes(rows: Rows) -> list[tuple[int, ...]]:
    if isinstance(rows, Tensor):
        return [tuple(rows.shape[1:])] * rows.shape[0]
    return [tuple(row.shape) for row in rows]


@dataclass
class _Part:
    """One tensor of the file, in pieces."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    pieces: list[Tensor]

    def buffers(self) -> Iterator[memoryview]:
        group: list[Tensor] = []
        size = 0
        for piece in self.pieces:
            group.append(piece.reshape(-1))
            size += piece.nbytes
            if size >= _WRITE_BYTES:
                yield _bytes_of(group)
                group, size = [], 0
        if size:
            yield _bytes_of(group)


def _bytes_of(pieces: list[Tensor]) -> memoryview:
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return memoryview(joined.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _int_part(name: str, values: Sequence[Any], shape: list[int]) -> _Part:
    return _Part(name, torch.int64, shape, [torch.tensor(values, dtype=torch.int64)])


def _storable(tensor: Tensor, key: str) -> Tensor:
    """Returns the bits of a tensor in a type that safetensors has."""
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
        what = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type!r}"
        raise StoreError(
            f"the output of {key!r} is {what}, which a shard cannot store. Extract it with "
            "reduce=lambda t: t.dequantize() (or t.to_dense()), or deselect the layer."
        )
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    if tensor.dtype not in _NAMES:
        return tensor.contiguous().view(torch.uint8)
    return tensor


def _column_parts(key: str, columns: list[Rows]) -> tuple[list[_Part], dict[str, Any]]:
    shapes = list(chain.from_iterable(_row_shapes(rows) for rows in columns))
    if not shapes:  # batches without samples
        return _column_of_nothing(key, columns)
    tensors = list(chain.from_iterable(as_list(rows) for rows in columns))
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    if len(dtypes) != 1:
        raise Unsupported(
            f"the outputs of layer {key!r} have several dtypes: {listed(map(str, dtypes))}. Pass one dtype for all, such as "
            "dtype=torch.float32."
        )
    (dtype,) = dtypes
    pieces = [_storable(tensor, key) for tensor in tensors]
    about = {"dtype": str(dtype).removeprefix("torch."), "flat": len(set(shapes)) > 1}
    tail = list(pieces[0].shape[tensors[0].dim() :])  # real and imaginary part, for complex numbers
    if not about["flat"]:
        return [_Part(f"layer:{key}", pieces[0].dtype, [len(shapes), *shapes[0], *tail], pieces)], about
    width = max(map(len, shapes))
    padded = [[*shape, *([-1] * (width - len(shape)))] for shape in shapes]
    ends = list(accumulate((math.prod(shape) for shape in shapes), initial=0))
    return [
        _Part(f"layer:{key}", pieces[0].dtype, [ends[-1], *tail], pieces),
        _int_part(f"offsets:{key}", ends, [len(ends)]),
        _int_part(f"shapes:{key}", padded, [len(shapes), width]),
    ], about


def _column_of_nothing(key: str, columns: list[Rows]) -> tuple[list[_Part], dict[str, Any]]:
    first = next((rows for rows in columns if isinstance(rows, Tensor)), torch.empty(0))
    stored = _storable(first, key)
    about = {"dtype": str(first.dtype).removeprefix("torch."), "flat": False}
    return [_Part(f"layer:{key}", stored.dtype, list(stored.shape), [stored])], about


def _id_parts(ids: list[Id]) -> list[_Part]:
    if not ids or isinstance(ids[0], int):
        return [_int_part("ids", ids, [len(ids)])]
    texts = [str(name).encode() for name in ids]
    ends = list(accumulate(map(len, texts), initial=0))
    text = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)[: ends[-1]]
    return [_Part("ids.text", torch.uint8, [ends[-1]], [text]), _int_part("ids.offsets", ends, [len(ends)])]


def _layout(batches: Sequence[Batch]) -> tuple[list[_Part], dict[str, Any]]:
    """Lays batches out as the tensors of one file, and describes them."""
    parts = _id_parts(list(chain.from_iterable(batch.ids for batch in batches)))
    about: dict[str, Any] = {
        "format": FORMAT,
        "batches": [[batch.number, len(batch.ids)] for batch in batches],
        "columns": {},
    }
    for key in dict.fromkeys(chain.from_iterable(batch.columns for batch in batches)):
        present = [place for place, batch in enumerate(batches) if key in batch.columns]
        found, about["columns"][key] = _column_parts(key, [batches[place].columns[key] for place in present])
        axes = batches[present[-1]].axes.get(key)
        if axes is not None:
            about["columns"][key].update({"time": axes.time} if axes.timed else {"time": axes.time, "timed": False})
        if len(present) < len(batches):
            about["columns"][key]["present"] = present
        parts.extend(found)
    contents = [batch.contents for batch in batches if batch.contents is not None]
    if len(contents) == len(batches) > 0:
        parts.append(_int_part("contents", contents, [len(contents), len(contents[0])]))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if labels:
        first = labels[0]
        if any(label.dtype != first.dtype or label.shape[1:] != first.shape[1:] for label in labels):
            raise Unsupported(
                "labels differ in dtype or shape from batch to batch. Return a row of one dtype and shape for each sample."
            )
        rows = sum(label.shape[0] for label in labels)
        parts.append(_Part("labels", first.dtype, [rows, *first.shape[1:]], labels))
    # the widest types come first, so that every tensor is aligned
    return sorted(parts, key=lambda part: -part.dtype.itemsize), about


#: The checksum with the most digits.
_LONGEST = 2**32 - 1


def write_shard(path: Path, batches: Sequence[Batch]) -> int:
    """Writes a whole shard. Returns its size in bytes.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        StoreError: a shard cannot store one of the outputs.
    """
    parts, about = _layout(batches)
    about["crc32"] = {part.name: _LONGEST for part in parts}
    header: dict[str, Any] = {"__metadata__": {}}
    start = 0
    for part in parts:
        size = math.prod(part.shape) * part.dtype.itemsize
        header[part.name] = {
            "dtype": _NAMES[part.dtype],
            "shape": part.shape,
            "data_offsets": [start, start + size],
        }
        start += size
    room = len(_header_text(header, about, str(_LONGEST)))
    room += -room % 8
    # The header holds the checksums and comes first in the file. It is written last, into the room reserved for it, so that
    # every batch is joined once. Each block is written right after its checksum, while it is in the processor's cache.
    with open(path, "wb", buffering=0) as file:
        file.seek(8 + room)
        for part in parts:
            checksum = 0
            for buffer in part.buffers():
                for first in range(0, len(buffer), _WRITE_BYTES):
                    block = buffer[first : first + _WRITE_BYTES]
                    checksum = zlib.crc32(block, checksum)
                    _write(file, block)
            about["crc32"][part.name] = checksum
        header["__metadata__"]["convtap"] = json.dumps(about)
        text = _header_text(header, about, header_checksum(header)).ljust(room)
        file.seek(0)
        _write(file, memoryview(room.to_bytes(8, "little") + text))
    return 8 + room + start


def _header_text(header: dict[str, Any], about: dict[str, Any], checksum: str) -> bytes:
    metadata = {"convtap": json.dumps(about), "crc32": checksum}
    return json.dumps({**header, "__metadata__": metadata}).encode()


def header_checksum(header: dict[str, Any]) -> str:
    """Returns the checksum of a header without its ``crc32`` entry."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "crc32"}
    return str(zlib.crc32(json.dumps({**header, "__metadata__": metadata}).encode()))


def _write(file: Any, buffer: memoryview) -> None:
    while len(buffer):
        buffer = buffer[file.write(buffer) :]
