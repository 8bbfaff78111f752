"""Draws an index of many outputs, with one strip per output on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._view import draw
from convtap._view.cells import Array, colour_indices, colour_limit, palette, scale_text, shortened, shrink
from convtap._view.maps import footer
from convtap._view.pictures import Picture, Pictures
from convtap._view.time_axis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _LOW = 18, 9  # pixels of an output's row, normally and with very many outputs
_LEFT, _ACROSS = 250, draw.COLUMNS  # one pixel per column of a map, so that the strip shows every column
_HEAD, _FOOT, _SIGNAL = 44, 64, 40
_BACKGROUND = (244, 246, 248)
_NAME, _SIZE = 36, 26
_LIMIT = "limit: written to the right of each strip"

#: The maximum number of outputs of an index with rows of the normal height, and of any index.
MOST, MOST_AT_ALL = ((draw.MAX_HEIGHT - _HEAD - _SIGNAL - _FOOT) // row for row in (_ROW, _LOW))


def index_page(
    found: Pictures, axis: TimeAxis, heading: str, pages: Sequence[int] | None = None, marks: str = "page"
) -> Figure:
    """Draws one strip per output, with its name, shape, colour scale and page."""
    rows, row = found.outputs, _ROW if len(found.outputs) <= MOST else _LOW
    top = _HEAD + (0 if found.signal is None else _SIGNAL)
    height = top + row * len(rows) + _FOOT
    figure = draw.new_figure(draw.WIDTH, height, "Draw fewer layers with layers=, or write convtap.plot.pages(acts).")
    draw.write(figure, 20, 18, heading, color=draw.INK)
    for at, text in ((20, "output"), (_LEFT + _ACROSS + 10, "shape"), (_LEFT + _ACROSS + 150, "colour")):
        draw.write(figure, at, 38, text, fontsize=7, weight="bold")
    if found.signal is not None:
        _signal(figure, found.signal, axis)
    _strips(figure, rows, axis, top, row)
    for number, picture in enumerate(rows):
        middle = top + row * number + row // 2
        page = "" if pages is None else f"{marks} {pages[number]}"
        _texts(figure, picture, middle, page, 7 if row == _ROW else 5.5)
    footer(figure, top + row * len(rows) + 22, [picture for picture in rows if picture.kind == "map"], _LIMIT)
    return figure


def _signal(figure: Figure, signal: Picture, axis: TimeAxis) -> None:
    draw.write(figure, 20, _HEAD + 16, "signal", va="center", fontsize=7)
    draw.write(figure, _LEFT + _ACROSS + 10, _HEAD + 16, signal.size, va="center", fontsize=7)
    if signal.kind == "nothing":
        return
    axes = draw.place(figure, _LEFT, _HEAD, _ACROSS, _SIGNAL - 8)
    if signal.kind == "lines":
        draw.draw_lines(axes, signal)
    else:
        draw.draw_map(axes, signal)
    axes.set_yticks([])
    axes.tick_params(labelbottom=False, bottom=axis.has_timeline)
    if axis.bounds is not None:
        axes.set_xlim(axis.bounds)


def _strips(figure: Figure, rows: Sequence[Picture], axis: TimeAxis, top: int, row: int) -> None:
    """Draws all strips as one image, since separate axes for 300 strips take seconds."""
    image = np.full((row * len(rows), _ACROSS, 3), 255, np.uint8)
    gap = row // 4
    for number, picture in enumerate(rows):
        first = number * row + gap // 2
        if picture.kind != "nothing":
            image[first : first + row - gap] = _strip(picture, axis, row - gap)
    axes = draw.place(figure, _LEFT, top, _ACROSS, row * len(rows))
    bounds = axis.bounds or (0.0, 1.0)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(*bounds, len(rows), 0))
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    has_axis = axis.bounds is not None and axis.has_timeline
    if not has_axis:
        axes.set_xticks([])
    unit, left = (axis.short_unit, _LEFT - 76) if has_axis else ("frames of each output", _LEFT)
    draw.write(figure, left, top + row * len(rows) + 5, unit, va="top", fontsize=7)


def _strip(picture: Picture, axis: TimeAxis, height: int) -> Array:
    """Returns the pixels (height, _ACROSS, 3) of one strip, placed on the time axis."""
    cells = picture.cells if picture.kind == "map" else _one_row(picture)
    cells = shrink(cells, height, _ACROSS).values
    limit = picture.limit if picture.kind == "map" else colour_limit(cells)
    colours = palette(picture.side)[colour_indices(cells, limit, picture.side)]
    left, right = 0.0, float(_ACROSS)
    if picture.extent is not None and axis.bounds is not None:
        (first, last), (start, stop) = axis.bounds, picture.extent
        left, right = ((end - first) / (last - first) * _ACROSS for end in (start, stop))
    across = np.floor((np.arange(_ACROSS) + 0.5 - left) / max(right - left, 1.0) * cells.shape[1]).astype(int)
    inside = (across >= 0) & (across < cells.shape[1])
    down = np.arange(height) * len(cells) // height
    pixels = np.full((height, _ACROSS, 3), _BACKGROUND, np.uint8)
    pixels[:, inside] = colours[down][:, across[inside]]
    return pixels


def _one_row(picture: Picture) -> Array:
    """Returns bars as one row of cells, each with the end further from zero."""
    low, high = picture.cells
    return np.asarray(np.where(np.abs(high) >= np.abs(low), high, low))[None]


def _texts(figure: Figure, picture: Picture, middle: int, page: str, size: float) -> None:
    style: dict[str, Any] = {"va": "center", "fontsize": size}
    draw.write(figure, 20, middle, shortened(picture.key, _NAME), **style)
    draw.write(figure, _LEFT + _ACROSS + 10, middle, shortened(picture.size, _SIZE), **style)
    draw.write(figure, draw.WIDTH - 20, middle, page, ha="right", **style)
    if picture.kind == "nothing":
        reason = shortened(f"not drawn: {picture.notes[0]}", 76)
        draw.write(figure, _LEFT, middle, reason, color=draw.ALARM, **style)
        return
    scale = "channels" if picture.kind == "bars" else scale_text(picture.limit, picture.side)
    text = picture.warning or scale
    draw.write(figure, _LEFT + _ACROSS + 150, middle, text, color=draw.ALARM if picture.warning else draw.INK, **style)
