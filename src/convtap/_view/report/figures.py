"""Writes the pictures of one input as HTML: maps as PNG, lines and bars as SVG, each with its caption and its scale."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from convtap._errors import plural
from convtap._view.cells import PERCENTILE, STEPS, bad_columns, colour_indices, hex_colour, palette
from convtap._view.outputs import CapturedOutputs, Chosen
from convtap._view.pictures import MAX_MARKS, Picture, pictures
from convtap._view.report.image import bars, lines, png
from convtap._view.report.page import escape
from convtap._view.time_axis import TimeAxis

#: The most columns of a map.
COLUMNS = 600

#: More calls than this have no picture, and all maps together at most so many cells: about a byte each before base64.
MAX_PICTURES = 300
MAX_CELLS = 2_800_000

_EXPLANATION = (
    f"Each map has its own limit (colour ±): {PERCENTILE} % of its cells are within it, the others have the full colour. "
    "Where a bin of frames is one place, its minimum and its maximum stand side by side; where channels share a row, it has "
    "the value furthest from zero. NaN is black, Inf is yellow."
)


def legend() -> str:
    """Writes the scale of colours and what a cell shows."""
    stops = ", ".join(hex_colour(rgb) for rgb in palette()[: 2 * STEPS + 1 : 8])
    return (
        f'<p class="soft">−limit <span class="legend" style="background: linear-gradient(to right, {stops})"></span> +limit, '
        f"white at zero. {escape(_EXPLANATION)}</p>"
    )


def input_figures(outputs: CapturedOutputs, sample: int, layers: Chosen, signal: Any, rows: int) -> str:
    """Writes the pictures of one input, the signal first."""
    share = MAX_CELLS // min(len(outputs.calls), MAX_PICTURES)
    columns = max(80, min(COLUMNS, share // min(rows, share)))
    found = pictures(outputs, sample, layers, signal, rows, columns, COLUMNS, most=MAX_PICTURES)
    parts = [f"<p>Sample {sample}.</p>"]
    if found.elsewhere:
        calls = plural(found.elsewhere, "call")
        parts.append(f"<p>{calls} of other forward passes: choose another input with sample=.</p>")
    if found.here > MAX_PICTURES:
        calls = plural(found.here, "call")
        parts.append(f"<p class='alarm'>The first {MAX_PICTURES} of {calls}; choose others with layers=.</p>")
    drawn = found.outputs if found.signal is None else [found.signal, *found.outputs]
    return "".join([*parts, *(figure(picture, outputs.axis) for picture in drawn)])


def figure(picture: Picture, axis: TimeAxis) -> str:
    """Writes one picture, on the time axis if it has a place there."""
    alarm = f' <span class="alarm">{escape(picture.warning)}</span>' if picture.warning else ""
    notes = f' <span class="soft">· {escape(" · ".join(picture.notes))}</span>' if picture.notes else ""
    caption = f"<figcaption><b>{escape(picture.key)}</b> {picture.size}{alarm}{notes}</figcaption>"
    if picture.kind == "nothing":
        return f"<figure>{caption}</figure>"
    place, marks = _place(picture.extent, axis), ""
    scale = _frame_scale(picture.frames, "frame") if picture.extent is None else _time_scale(axis)
    if picture.kind == "bars":
        height, image = 56, f'<div style="{place}">{bars(picture.cells, picture.channels)}</div>'
        scale = _frame_scale(picture.channels, "channel")
    elif picture.kind == "lines":
        height, image = max(70, 34 * picture.channels), f'<div style="{place}">{lines(picture.cells)}</div>'
    else:
        height = len(picture.cells) * max(1, round(84 / len(picture.cells)))
        data = base64.b64encode(png(colour_indices(picture.cells, picture.limit), palette())).decode()
        alt = escape(f"map of {picture.key}, channels from top to bottom, time from left to right")
        image = f'<img loading="lazy" alt="{alt}" style="{place}" src="data:image/png;base64,{data}">'
        marks = _marks(picture, axis)
    return f'<figure>{caption}{marks}<div class="track" style="height:{height + 2}px">{image}</div>{scale}</figure>'


def _place(extent: tuple[float, float] | None, axis: TimeAxis) -> str:
    """Writes a place on the time axis as a style; the full width without one."""
    if extent is None or axis.bounds is None:
        return "left:0;width:100%"
    first, last = axis.bounds
    percent = 100 / (last - first)
    return f"left:{(extent[0] - first) * percent:.3f}%;width:{(extent[1] - extent[0]) * percent:.3f}%"


def _marks(picture: Picture, axis: TimeAxis) -> str:
    """Writes a mark above each column that has NaN or Inf."""
    wrong = bad_columns(picture.cells)
    if not 0 < len(wrong) <= MAX_MARKS:
        return ""
    inside = (wrong + 0.5) / picture.cells.shape[1]
    if picture.extent is not None and axis.bounds is not None:
        (start, stop), (first, last) = picture.extent, axis.bounds
        inside = (start + inside * (stop - start) - first) / (last - first)
    return f'<div class="marks">{"".join(f"""<span style="left:{100 * at:.2f}%">▼</span>""" for at in inside)}</div>'


def _time_scale(axis: TimeAxis) -> str:
    """Writes the numbers of the time axis."""
    if axis.bounds is None:
        return ""
    first, last = axis.bounds
    step = _round_step((last - first) / 8)
    spans = []
    for mark in np.arange(np.ceil(first / step), np.floor(last / step) + 1) * step:
        at = 100 * (mark - first) / (last - first)
        side = ' class="first"' if at < 3 else ' class="last"' if at > 97 else ""
        spans.append(f'<span{side} style="left:{at:.2f}%">{mark + 0.0:,.10g}</span>')
    return f'<div class="scale">{"".join(spans)}</div>'


def _round_step(step: float) -> float:
    """Returns the smallest of 1, 2 or 5 times a power of ten that is at least ``step``."""
    power = float(10.0 ** np.floor(np.log10(step)))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))


def _frame_scale(count: int, noun: str) -> str:
    """Writes the first and the last number of frames or channels."""
    last = f'<span class="last" style="left:100%">{count - 1:,}</span>' if count > 1 else ""
    return f'<div class="scale"><span class="first" style="left:0">{noun} 0</span>{last}</div>'
