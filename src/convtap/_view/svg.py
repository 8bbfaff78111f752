"""Draws in SVG for an HTML page: a signal's lines, bars, and a box of quantiles. Sizes are those of the place it is put in."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from convtap._view.cells import INF_COLOUR, NAN_COLOUR, Array, edges
from convtap._view.pictures import MAX_BARS

_BINS = 600
_INK, _BLUE, _RED, _ALARM = "#22303d", "#17589f", "#a8202e", "#b00000"


def _colour(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def lines(values: Array) -> str:
    """The channels of a (C, T) signal, one below the other: each bin of samples from its minimum to its maximum."""
    channels, samples = values.shape
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    height = (high - low) * 1.1 or 1.0
    bounds = edges(samples, _BINS)
    across = (bounds[:-1] + bounds[1:]) / 2 * 1000 / samples
    parts = []
    for channel, row in enumerate(values):
        good = np.isfinite(row)
        shown = np.where(good, row, np.nan)
        bottom = np.fmin.reduceat(shown, bounds[:-1])
        top = np.fmax.reduceat(shown, bounds[:-1])
        base = channel * 100 + 50
        down = [base - ((ends - (low + high) / 2) / height * 100) for ends in (top, bottom)]
        parts.append(_outline(across, *down))
        wrong = np.unique(np.searchsorted(bounds, np.flatnonzero(~good), side="right") - 1)
        for at in across[wrong]:
            parts.append(f'<path d="M{at:.1f} {channel * 100}v100" stroke="{_ALARM}" {_STROKE}/>')
    return _svg(1000, 100 * channels, "".join(parts))


_STROKE = 'fill="none" stroke-width="1.2" vector-effect="non-scaling-stroke"'


def _outline(across: Array, top: Array, bottom: Array) -> str:
    """Up and down between the ends of each bin, with gaps where there is no number."""
    steps, pen = [], "M"
    for x, first, second in zip(across, top, bottom, strict=True):
        if math.isnan(first):
            pen = "M"
            continue
        steps.append(f"{pen}{x:.1f} {first:.1f}" + (f"V{second:.1f}" if second - first > 0.05 else ""))
        pen = "L"
    return f'<path d="{"".join(steps)}" stroke="{_INK}" {_STROKE} stroke-linejoin="round"/>'


def bars(cells: Array, channels: int) -> str:
    """Bars from zero, one a channel: blue below, red above; a channel that is no number is a stripe over the whole height."""
    low, high = cells
    bounds = edges(channels, MAX_BARS)
    good = np.isfinite(low) & np.isfinite(high)
    top = max([float(high[good].max()), 0.0]) if good.any() else 0.0
    bottom = min([float(low[good].min()), 0.0]) if good.any() else 0.0
    height = top - bottom or 1.0
    zero = top / height * 100
    parts = [f'<path d="M0 {zero:.2f}H1000" stroke="{_INK}" {_STROKE}/>']
    for first, stop, down, up, is_good in zip(bounds[:-1], bounds[1:], low, high, good, strict=True):
        x, width = (first + 0.1) * 1000 / channels, (stop - first - 0.2) * 1000 / channels
        if not is_good:
            colour = _colour(NAN_COLOUR if np.isnan(down) or np.isnan(up) else INF_COLOUR)
            parts.append(_rect(x, width, 0, 100, colour))
            continue
        parts.append(_rect(x, width, zero - up / height * 100, up / height * 100, _RED) if up > 0 else "")
        parts.append(_rect(x, width, zero, -down / height * 100, _BLUE) if down < 0 else "")
    return _svg(1000, 100, "".join(parts))


def _rect(x: float, width: float, y: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}"/>'


def _svg(width: int, height: int, inside: str) -> str:
    size = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" width="100%" height="100%"'
    return f'<svg {size} aria-hidden="true">{inside}</svg>'


def box(quantiles: tuple[float, ...], place: Callable[[float], float]) -> str:
    """The quantiles of one layer, 120 by 14 pixels: thin from the first to the last, thick quartiles, and the median."""
    low, first, median, third, high = (60 + 58 * place(value) for value in quantiles)
    return (
        '<svg width="120" height="14" viewBox="0 0 120 14" aria-hidden="true">'
        f'<path d="M60 0v14" stroke="#c3ccd5"/><path d="M{low:.1f} 7H{high:.1f}" stroke="{_INK}" stroke-width="1.4"/>'
        f'<rect x="{first:.1f}" y="3" width="{max(third - first, 1):.1f}" height="8" fill="#8fbde0" stroke="{_INK}"/>'
        f'<path d="M{median:.1f} 2v10" stroke="{_ALARM}" stroke-width="2"/></svg>'
    )


def common_scale(widths: list[float], linear: float | None) -> Callable[[float], float]:
    """A function from a value to its place between -1 and 1, one for all layers; logarithmic beyond ``linear``."""
    most = max(widths, default=0.0) or 1.0
    if linear is None:
        return lambda value: value / most
    threshold = linear
    return lambda value: math.asinh(value / threshold) / math.asinh(most / threshold)
