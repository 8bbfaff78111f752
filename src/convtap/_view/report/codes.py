"""Encodes map cells as bytes that the page's script can read."""

from __future__ import annotations

import numpy as np

from convtap._view.cells import INF_COLOUR, NAN_COLOUR, Array, colour_indices, palette

# Note: [Values in the image]
# Assumption: a reader points at a cell to see its value, and 300 maps stay below 3 MB.
# Failure: values as text take several times the size of the image. Colours do not distinguish values beyond the limit, and
#   a browser that resists fingerprinting does not return a canvas's exact pixels.
# Choice: a byte of the image is a code. It has LINEAR steps from zero to the colour limit, then OUTER logarithmic steps to
#   the peak, all with the full colour. The script decompresses the image's bytes and shows each value as
#   "≈ value ± half a step".

#: Steps from zero to the limit, and from there to the peak, on each side of zero.
LINEAR, OUTER = 64, 20
_ZERO = LINEAR + OUTER
NAN, ABOVE, BELOW = 2 * _ZERO + 1, 2 * _ZERO + 2, 2 * _ZERO + 3


def peak_of(cells: Array) -> float:
    """Returns the largest finite magnitude, or zero if no value is finite."""
    finite = cells[np.isfinite(cells)].astype(np.float64)
    return float(np.abs(finite).max()) if finite.size else 0.0


def codes(cells: Array, limit: float, peak: float) -> Array:
    """Returns the code of each cell. See Note: [Values in the image]."""
    scaled = np.where(np.isfinite(cells), cells, 0).astype(np.float64) / limit
    magnitude = np.abs(scaled)
    steps = np.round(np.minimum(magnitude, 1) * LINEAR)
    if peak > limit:
        beyond = magnitude > 1
        steps[beyond] += np.minimum(np.round(OUTER * np.log(magnitude[beyond]) / np.log(peak / limit)), OUTER)
    found = np.sign(scaled) * steps + _ZERO
    for where, code in ((np.isnan(cells), NAN), (np.isposinf(cells), ABOVE), (np.isneginf(cells), BELOW)):
        found[where] = code
    return found.astype(np.uint8)


def colours(side: int) -> Array:
    """Returns the colour of each code as (n, 3) bytes of ``palette(side)``."""
    values = np.clip(np.arange(-_ZERO, _ZERO + 1) / LINEAR, -1, 1)
    finite = palette(side)[colour_indices(values, 1.0, side)]
    return np.concatenate([finite, [NAN_COLOUR, INF_COLOUR, INF_COLOUR]]).astype(np.uint8)
