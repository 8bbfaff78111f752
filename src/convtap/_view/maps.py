"""Lays out the feature maps of one input, one below the other, the signal on top; all heights in whole pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convtap._view import draw
from convtap._view.cells import PERCENTILE, STEPS, palette, shortened
from convtap._view.draw import ACROSS, LEFT, WIDTH
from convtap._view.pictures import Picture, Pictures
from convtap._view.time_axis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE, _TICKS, _GAP, _FOOT = 17, 15, 7, 62
_TITLE_SIGN, _NOTE_SIGN = 8.0, 5.6  # pixels that one sign of a title or a note needs at most, nearly always
_ROOMY = 12  # up to so many maps each gets twice the height


def feature_maps(found: Pictures, axis: TimeAxis) -> Figure:
    """Draws the signal, if there is one, and below it one picture an output."""
    drawn, roomy = found.outputs, len(found.outputs) <= _ROOMY
    panels = [] if found.signal is None else [(found.signal, _height(found.signal, roomy=True), True)]
    for number, picture in enumerate(drawn, 1):
        labelled = roomy or picture.extent is None or number % _ROOMY == 0 or number == len(drawn)
        panels.append((picture, _height(picture, roomy), labelled and picture.kind != "nothing"))
    below = [_GAP + (_TICKS if ticks else 0) for _, _, ticks in panels]
    has_maps = any(picture.kind == "map" for picture in drawn)
    total = sum(_TITLE + height + space for (_, height, _), space in zip(panels, below, strict=True))
    figure = draw.new_figure(WIDTH, total + (_FOOT if has_maps else 8))
    top = 4
    for (picture, height, ticks), space in zip(panels, below, strict=True):
        _panel(figure, picture, top + _TITLE, height, ticks, axis)
        top += _TITLE + height + space
    if has_maps:
        _footer(figure, top, axis)
    return figure


def _height(picture: Picture, roomy: bool) -> int:
    if picture.kind == "map":  # a whole number of pixels a row
        return len(picture.cells) * max(1, round((128 if roomy else 64) / len(picture.cells)))
    if picture.kind == "lines":
        return max(80, 36 * picture.channels)
    return 22 if picture.kind == "nothing" else 90 if roomy else 56


def _panel(figure: Figure, picture: Picture, top: int, height: int, ticks: bool, axis: TimeAxis) -> None:
    """Draws one picture with its title, its notes and its warning."""
    notes = " · ".join(picture.notes)
    warning = draw.not_finite(picture.cells) if picture.kind == "lines" else picture.warning
    room = int((ACROSS - _NOTE_SIGN * (len(notes) + len(warning) + 4)) / _TITLE_SIGN)
    title = f"{shortened(picture.key, max(24, room - len(picture.size) - 4))}  {picture.size}"
    draw.write(figure, LEFT, top - 2, title, weight="bold")
    if picture.kind == "nothing":
        draw.write(figure, LEFT, top + 12, f"not drawn: {shortened(notes, 150)}", color=draw.ALARM)
        return
    draw.write(figure, LEFT + ACROSS, top - 2, notes, ha="right", fontsize=7)
    right = LEFT + ACROSS - int(_NOTE_SIGN * (len(notes) + 2))
    draw.write(figure, right, top - 2, warning, ha="right", fontsize=7, color=draw.ALARM, weight="bold")
    axes = draw.place(figure, LEFT, top, ACROSS, height)
    if picture.kind == "bars":
        draw.draw_bars(axes, picture)
        axes.set_ylabel("value", fontsize=7, labelpad=1)
    elif picture.kind == "lines":
        draw.draw_lines(axes, picture)
    else:
        draw.draw_map(axes, picture)
        axes.set_ylabel("channel", fontsize=7, labelpad=1)
    if picture.extent is not None and axis.bounds is not None:
        axes.set_xlim(axis.bounds)
    elif picture.kind == "map":
        draw.whole_ticks(axes, picture.frames)
    axes.tick_params(labelbottom=ticks)


def _footer(figure: Figure, top: int, axis: TimeAxis) -> None:
    """Writes the unit of the time axis and draws the scale of colours."""
    unit = f"time in {axis.unit}" if axis.has_timeline else "frames of each layer"
    draw.write(figure, LEFT + ACROSS // 2, top + 8, unit, ha="center", va="center", fontsize=7)
    bar = draw.place(figure, LEFT, top + 20, 200, 9)
    bar.imshow(palette()[None, : 2 * STEPS + 1], aspect="auto", extent=(-1, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([-1, 0, 1], ["−limit", "0", "limit"])
    text = f"each map has its own limit (colour ± above it): {PERCENTILE} % of its cells are within it · NaN black · Inf yellow"
    draw.write(figure, LEFT + 225, top + 25, text, va="center", fontsize=7)
