"""Encodes maps and thumbnails as PNG, and draws lines, bars and quantiles as SVG.

The report does not use matplotlib, so it needs no other package. 74 maps take 3.3 MB and 0.3 s, and matplotlib's PNG files of
the same quality take 11.6 MB and 6 s.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable

import numpy as np

from convtap._view.cells import (
    BLUE,
    INF_COLOUR,
    INF_HEX,
    NAN_COLOUR,
    NAN_HEX,
    RED,
    Array,
    colour_indices,
    colour_limit,
    edges,
    finite_envelope,
    finite_range,
    palette,
)

#: Bins of samples of a line. The page's script uses the same number.
_BINS = 600

#: Rows, columns, and colour steps on each side of zero.
_THUMBNAIL = (16, 48, 16)

_INK, _ALARM = "#22303d", "#b00000"
_STROKE = 'fill="none" stroke-width="1.2" vector-effect="non-scaling-stroke"'


def png(indices: Array, palette: Array) -> bytes:
    """Encodes (rows, columns) indices of a palette as PNG of colour type 3.

    The palette has (n, 3) bytes, with n ≤ 256.
    """
    rows, columns = indices.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # each line begins with its filter; 0 means no filter
    lines[:, 1:] = indices
    pixels = zlib.compress(lines.tobytes())  # the highest level takes 15 times as long and saves 10 %
    parts = ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lines(values: Array) -> str:
    """Draws the channels of a (C, T) signal, one below the other.

    Each bin of samples is a line from its minimum to its maximum.
    """
    channels, samples = values.shape
    low, high = finite_range(values)
    height = (high - low) * 1.1 or 1.0
    bins = edges(samples, _BINS)
    across = (bins[:-1] + bins[1:]) / 2 * 1000 / samples
    parts = []
    for channel, row in enumerate(values):
        bottom, top = (
            channel * 100 + 50 - (ends - (low + high) / 2) / height * 100 for ends in finite_envelope(row, bins)
        )
        parts.append(_outline(across, top, bottom))
        wrong = np.unique(np.searchsorted(bins, np.flatnonzero(~np.isfinite(row)), side="right") - 1)
        for at in across[wrong]:
            parts.append(f'<path d="M{at:.1f} {channel * 100}v100" stroke="{_ALARM}" {_STROKE}/>')
    return _svg(1000, 100 * channels, "".join(parts))


def _outline(across: Array, top: Array, bottom: Array) -> str:
    """Draws a line between the ends of each bin, with gaps at bins without values."""
    steps, pen = [], "M"
    for x, first, second in zip(across, top, bottom, strict=True):
        if math.isnan(first):
            pen = "M"
            continue
        steps.append(f"{pen}{x:.1f} {first:.1f}" + (f"V{second:.1f}" if second - first > 0.05 else ""))
        pen = "L"
    return f'<path class="line" d="{"".join(steps)}" stroke="{_INK}" {_STROKE} stroke-linejoin="round"/>'


def bars(cells: Array) -> str:
    """Draws bars from zero, blue below and red above.

    A bar with NaN or Inf is a stripe over the whole height. A bar is 10 units wide and the range of the values is 1,000
    units high, so that the page's script can read them.
    """
    low, high = cells.astype(np.float64)
    bottom, top = bars_range(cells)
    height = top - bottom or 1.0
    zero = top / height * 1000
    found: dict[str, list[str]] = {"up": [], "down": [], "NaN": [], "Inf": []}
    for bar, (down, up) in enumerate(zip(low, high, strict=True)):
        x = 10 * bar + 1
        if not (math.isfinite(down) and math.isfinite(up)):
            found["NaN" if math.isnan(down) or math.isnan(up) else "Inf"].append(f"M{x} 0v1000h8v-1000z")
            continue
        for kind, value in (("up", up), ("down", down)):
            if value:
                tall = round(value / height * 1000)
                found[kind].append(f"M{x} {zero:.1f}v{-tall}h8v{tall}z")
    colours = {"up": RED, "down": BLUE, "NaN": NAN_HEX, "Inf": INF_HEX}
    paths = [f'<path class="{k}" fill="{colours[k]}" d="{"".join(parts)}"/>' for k, parts in found.items() if parts]
    axis = f'<path d="M0 {zero:.1f}H{10 * len(low)}" stroke="{_INK}" {_STROKE}/>'
    return _svg(10 * len(low), 1000, axis + "".join(paths))


def bars_range(cells: Array) -> tuple[float, float]:
    """Returns the lowest and the highest end of finite bars, including zero."""
    low, high = finite_range(cells)
    return min(low, 0.0), max(high, 0.0)


def thumbnail(cells: Array, is_map: bool, side: int = 0) -> bytes:
    """Encodes a map, or bars as one row, as a small PNG.

    Each cell has the value furthest from zero.
    """
    rows, columns, steps = _THUMBNAIL
    small = _furthest(_furthest(cells, edges(len(cells), rows if is_map else 1), 0), edges(cells.shape[1], columns), 1)
    limit = colour_limit(cells)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.round(np.clip(np.nan_to_num(small.astype(np.float64)) / limit, -1, 1) * steps) + steps
    found[np.isnan(small)], found[np.isinf(small)] = 2 * steps + 1, 2 * steps + 2
    colours = palette(side)[colour_indices(np.arange(-steps, steps + 1) / steps, 1.0, side)]
    return png(found.astype(np.uint8), np.concatenate([colours, [NAN_COLOUR, INF_COLOUR]]).astype(np.uint8))


def _furthest(cells: Array, bounds: Array, axis: int) -> Array:
    low, high = np.minimum.reduceat(cells, bounds[:-1], axis), np.maximum.reduceat(cells, bounds[:-1], axis)
    return np.where(np.abs(high) >= np.abs(low), high, low)


def _svg(width: int, height: int, inside: str) -> str:
    size = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" width="100%" height="100%"'
    return f'<svg {size} aria-hidden="true">{inside}</svg>'


def box(quantiles: tuple[float, ...], place: Callable[[float], float]) -> str:
    """Draws the quantiles of one layer in 120 by 14 pixels.

    A thin line joins the first and the last quantile, a thick bar the quartiles, and a red line is the median.
    """
    low, first, median, third, high = (60 + 58 * place(value) for value in quantiles)
    return (
        '<svg class="box" viewBox="0 0 120 14" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="M60 0v14" stroke="#c3ccd5"/><path d="M{low:.1f} 7H{high:.1f}" stroke="{_INK}" stroke-width="1.4"/>'
        f'<rect x="{first:.1f}" y="3" width="{max(third - first, 1):.1f}" height="8" fill="#8fbde0" stroke="{_INK}"/>'
        f'<path d="M{median:.1f} 2v10" stroke="{_ALARM}" stroke-width="2"/></svg>'
    )
