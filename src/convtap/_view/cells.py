"""Shrinks (C, T) values to the cells of a picture, and chooses colours and labels."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy as np

#: A NumPy array.
Array: TypeAlias = "np.ndarray[Any, Any]"

#: The percentage of the drawn cells that lie within the colour limits. The others have the full colour.
PERCENTILE = 99

# Note: [Shrinking]
# Assumption: a picture has fewer columns than a signal has frames, and fewer rows than a layer has channels.
# Failure: taking every n-th value drops spikes, and averaging an oscillation around zero returns zeros.
# Choice: a bin of frames becomes two columns, its minimum and its maximum. A group of neighbouring channels becomes one
#   row with the value furthest from zero at each frame. A NaN or Inf anywhere in a bin or a group is kept.


class Cells(NamedTuple):
    """The cells of a (C, T) map as (rows, columns), and notes on the shrinking."""

    values: Array
    notes: list[str]


def shrink(values: Array, rows: int, columns: int) -> Cells:
    """Shrinks a (C, T) map to at most (rows, columns) cells. See Note: [Shrinking]."""
    channels, frames = values.shape
    groups, notes = edges(channels, rows), []
    cells = np.stack([_furthest_from_zero(values[first:stop]) for first, stop in itertools.pairwise(groups)])
    if channels > rows:
        notes.append(f"{np.diff(groups).max()} channels a row")
    if frames > columns:
        bins = edges(frames, max(1, columns // 2))
        cells = np.stack(envelope(cells, bins), axis=-1).reshape(len(cells), -1)
        notes.append(f"min and max of {np.diff(bins).max():,} frames")
    return Cells(cells, notes)


def edges(count: int, parts: int) -> Array:
    """Returns the bounds of at most ``parts`` neighbouring groups of ``count`` items."""
    parts = min(count, parts)
    return np.arange(parts + 1, dtype=np.int64) * count // parts


def _furthest_from_zero(values: Array) -> Array:
    """Returns the value with the largest magnitude in each column of (n, T), or NaN."""
    if len(values) == 1:
        return np.asarray(values[0])
    low, high = values.min(axis=0), values.max(axis=0)
    return np.asarray(np.where(np.abs(high) >= np.abs(low), high, low))


def envelope(values: Array, bins: Array) -> tuple[Array, Array]:
    """Returns the minimum and maximum of (..., T) values in each bin, or NaN."""
    return np.minimum.reduceat(values, bins[:-1], axis=-1), np.maximum.reduceat(values, bins[:-1], axis=-1)


def finite_envelope(row: Array, bins: Array) -> tuple[Array, Array]:
    """Returns the minimum and maximum of the finite (T,) values in each bin, else NaN."""
    finite = np.where(np.isfinite(row), row, np.nan)
    return np.fmin.reduceat(finite, bins[:-1]), np.fmax.reduceat(finite, bins[:-1])


def finite_range(values: Array) -> tuple[float, float]:
    """Returns the lowest and the highest finite value, or zeros if no value is finite."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def bad_columns(cells: Array) -> Array:
    """Returns the indices of the columns that hold NaN or Inf."""
    return np.flatnonzero(~np.isfinite(cells).all(axis=0))


# -- colours: blue below zero, white at zero, red above; NaN and Inf differ from all of them

_ANCHORS = ((23, 88, 159), (143, 189, 224), (255, 255, 255), (240, 160, 124), (168, 32, 46))
#: The anchors for values on one side of zero: the colours of that side, with a darker end and twice as many steps.
_ONE_SIDED = {1: (*_ANCHORS[2:], (74, 6, 30)), -1: ((6, 28, 66), *_ANCHORS[:3])}
STEPS = 64
NAN_COLOUR = (0, 0, 0)
INF_COLOUR = (255, 205, 0)


def hex_colour(rgb: Any) -> str:
    """Returns a colour of three bytes as text, such as ``#17589f``."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


BLUE, RED = hex_colour(_ANCHORS[0]), hex_colour(_ANCHORS[-1])
NAN_HEX, INF_HEX = hex_colour(NAN_COLOUR), hex_colour(INF_COLOUR)


def side_of(values: Array) -> int:
    """Returns the sign of the finite values: 1, -1, or 0 for both signs or only zeros."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not np.isfinite([low, high]).all():  # finite_range copies the values, so it runs only if needed
        low, high = finite_range(values)
    return int(high > 0) - int(low < 0)


def scale_ends(limit: float, side: int) -> tuple[float, float]:
    """Returns the lowest and the highest value of a colour scale."""
    return (0.0 if side > 0 else -limit), (0.0 if side < 0 else limit)


def palette(side: int = 0) -> Array:
    """Returns the colours as (n, 3) bytes.

    There are 2 · STEPS + 1 colours from the lowest value to the highest, then those of NaN and Inf. ``side`` is 1 for a scale
    that starts at zero, and -1 for a scale that ends at zero.
    """
    anchors = np.asarray(_ONE_SIDED.get(side, _ANCHORS), dtype=np.float64)
    positions = np.linspace(0, len(anchors) - 1, 2 * STEPS + 1)
    ramp = [np.interp(positions, np.arange(len(anchors)), anchors[:, i]) for i in range(3)]
    return np.concatenate([np.stack(ramp, axis=1).round(), [NAN_COLOUR, INF_COLOUR]]).astype(np.uint8)


def colour_limit(cells: Array) -> float:
    """Returns the magnitude of the full colour, a percentile of the cells' magnitudes.

    With a percentile, a few spikes do not pale the other cells. If it is zero, the limit is the largest magnitude, or 1 if
    all cells are zero.
    """
    magnitudes = np.abs(cells[np.isfinite(cells)].astype(np.float64))
    if not magnitudes.size:
        return 1.0
    return float(np.percentile(magnitudes, PERCENTILE)) or float(magnitudes.max()) or 1.0


def colour_indices(cells: Array, limit: float, side: int = 0) -> Array:
    """Returns the index of each cell's colour in ``palette(side)``."""
    low, high = (end / limit for end in scale_ends(limit, side))
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(cells.astype(np.float64) / limit, low, high)
    found = np.round((np.nan_to_num(scaled) - low) / (high - low) * 2 * STEPS)
    found[np.isnan(cells)] = 2 * STEPS + 1
    found[np.isinf(cells)] = 2 * STEPS + 2
    return found.astype(np.uint8)


# -- labels


def printable(text: str) -> str:
    """Returns a text with line breaks, control and direction characters as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shortened(text: str, most: int) -> str:
    """Returns at most ``most`` characters of a text, without its middle."""
    text = printable(text)
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def count_bad(values: Array) -> str:
    """Returns the counts of NaN and Inf values as text, empty if all are finite."""
    return written_bad(int(np.isnan(values).sum()), int(np.isinf(values).sum()))


def written_bad(nan: int, inf: int) -> str:
    """Returns counts of NaN and Inf as text, empty if both are zero."""
    return ", ".join(f"{count:,} {name}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count)


def scale_text(limit: float, side: int) -> str:
    """Returns a colour scale as text: ``±1.5``, ``0 to 1.5`` or ``−1.5 to 0``."""
    return f"±{limit:.3g}" if not side else f"0 to {limit:.3g}" if side > 0 else f"−{limit:.3g} to 0"
