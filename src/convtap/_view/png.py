"""Writes a palette PNG: one byte a cell, compressed; all that an HTML page needs of a picture."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from convtap._view.cells import Array


def png(indices: Array, palette: Array) -> bytes:
    """Encodes (rows, columns) positions in a palette of (n, 3) bytes, n ≤ 256 (the PNG specification, colour type 3)."""
    rows, columns = indices.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # each line begins with its filter, 0: none
    lines[:, 1:] = indices
    parts = (
        (b"IHDR", header),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
