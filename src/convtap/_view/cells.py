"""Shrinks (C, T) values to the cells of a picture without losing an extreme, and chooses their colours."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

#: A NumPy array.
Array: TypeAlias = "np.ndarray[Any, Any]"

#: How many of the drawn cells lie within the colour limits, in percent; the others have the full colour.
PERCENTILE = 99

# Note: [Shrinking]
# Assumption: a picture has fewer columns than a signal has frames, and fewer rows than a layer has channels.
# Failure: taking every n-th value drops spikes; averaging turns an oscillation around zero into nothing.
# Choice: a bin of frames becomes two columns, its minimum and its maximum. A group of neighbouring channels becomes one
#   row, which has at each frame the value furthest from zero. A NaN anywhere in a bin or a group is kept, and so is an Inf.


@dataclass(frozen=True)
class Cells:
    """What is drawn of a (C, T) map.

    Attributes:
        values: the cells, (rows, columns), with NaN and Inf where the map has them.
        channels_per_row: how many channels the fullest row stands for.
        frames_per_pair: how many frames the fullest pair of columns stands for; 0 if each column is one frame.
    """

    values: Array
    channels_per_row: int
    frames_per_pair: int


def shrink(values: Array, rows: int, columns: int) -> Cells:
    """Shrinks a (C, T) map to at most (rows, columns) cells. See Note: [Shrinking]."""
    channels, frames = values.shape
    starts = edges(channels, rows)
    pairs = frames > columns
    bins = edges(frames, max(1, columns // 2)) if pairs else edges(frames, frames)
    found = []
    for first, stop in itertools.pairwise(starts):
        row = furthest_from_zero(values[first:stop])
        found.append(_pairs(row, bins) if pairs else row)
    return Cells(np.stack(found), _widest(starts), _widest(bins) if pairs else 0)


def edges(count: int, parts: int) -> Array:
    """The bounds of ``parts`` neighbouring groups of ``count`` things (or of ``count`` groups, if that is fewer)."""
    parts = min(count, parts)
    return np.arange(parts + 1, dtype=np.int64) * count // parts


def _widest(bounds: Array) -> int:
    return int(np.diff(bounds).max())


def furthest_from_zero(values: Array) -> Array:
    """Of each column of (n, T), the value with the largest magnitude; NaN if there is one."""
    if len(values) == 1:
        return np.asarray(values[0])
    low, high = values.min(axis=0), values.max(axis=0)
    return np.asarray(np.where(np.abs(high) >= np.abs(low), high, low))


def _pairs(row: Array, bins: Array) -> Array:
    pairs = np.empty(2 * (len(bins) - 1), dtype=row.dtype)
    pairs[0::2], pairs[1::2] = envelope(row, bins)
    return pairs


def envelope(row: Array, bins: Array) -> tuple[Array, Array]:
    """The minimum and the maximum of (T,) values in each bin; both NaN where a bin holds one."""
    return np.minimum.reduceat(row, bins[:-1]), np.maximum.reduceat(row, bins[:-1])


def colour_limit(cells: Array) -> float:
    """The magnitude that gets the full colour: a percentile of the cells' own, so that a few spikes do not pale the rest.

    Where that is zero (nearly all cells are), it is the largest magnitude; where all cells are zero, it is 1.
    """
    magnitudes = np.abs(cells[np.isfinite(cells)].astype(np.float64))
    if not magnitudes.size:
        return 1.0
    limit = float(np.percentile(magnitudes, PERCENTILE))
    return limit or float(magnitudes.max()) or 1.0


# -- colours: blue below zero, white at it, red above; what is no number stands out from both

_ANCHORS = ((23, 88, 159), (143, 189, 224), (255, 255, 255), (240, 160, 124), (168, 32, 46))
STEPS = 64
NAN_COLOUR = (0, 0, 0)
INF_COLOUR = (255, 205, 0)


def palette() -> Array:
    """The colours as (n, 3) bytes: 2 · STEPS + 1 from the lowest value to the highest, then NaN's, then Inf's."""
    positions = np.linspace(0, len(_ANCHORS) - 1, 2 * STEPS + 1)
    anchors = np.asarray(_ANCHORS, dtype=np.float64)
    ramp = [np.interp(positions, np.arange(len(_ANCHORS)), anchors[:, i]) for i in range(3)]
    return np.concatenate([np.stack(ramp, axis=1).round(), [NAN_COLOUR, INF_COLOUR]]).astype(np.uint8)


def colour_indices(cells: Array, limit: float) -> Array:
    """The position of each cell's colour in the palette."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(cells.astype(np.float64) / limit, -1, 1)
    found = np.round(np.nan_to_num(scaled) * STEPS) + STEPS
    found[np.isnan(cells)] = 2 * STEPS + 1
    found[np.isinf(cells)] = 2 * STEPS + 2
    return found.astype(np.uint8)
