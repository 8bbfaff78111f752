"""Lays out the feature maps of one input below the signal, in whole pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from convtap._view import draw
from convtap._view.cells import PERCENTILE, STEPS, palette, shortened
from convtap._view.draw import ACROSS, LEFT, WIDTH
from convtap._view.pictures import Picture, Pictures
from convtap._view.time_axis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE, _TICKS, _GAP, _FOOT, _HEADING = 17, 15, 7, 46, 22
_TITLE_SIGN, _NOTE_SIGN = 8.0, 5.6  # pixels that a character of a title or a note needs at most, with rare exceptions
_ROOMY = 12  # up to this number of maps, each has twice the height


class _Panel(NamedTuple):
    """A picture, its height in pixels, and whether it has axis numbers below it."""

    picture: Picture
    height: int
    has_ticks: bool

    @property
    def total(self) -> int:
        """The pixels from its title to the next title."""
        return _TITLE + self.height + _GAP + (_TICKS if self.has_ticks else 0)


def feature_maps(found: Pictures, axis: TimeAxis, heading: str = "") -> Figure:
    """Draws the signal, if given, and below it one picture per output."""
    panels = _panels(found)
    figure = draw.new_figure(WIDTH, height_of(found, heading))
    top = 4
    if heading:
        draw.write(figure, LEFT, top + 14, heading, fontsize=8, color=draw.INK)
        top += _HEADING
    for panel in panels:
        _draw_panel(figure, panel, top + _TITLE, axis)
        top += panel.total
    footer(figure, top, _maps(panels))
    return figure


def height_of(found: Pictures, heading: str = "") -> int:
    """Returns the height in pixels of the figure of some pictures."""
    panels = _panels(found)
    return sum(panel.total for panel in panels) + (_FOOT if _maps(panels) else 8) + (_HEADING if heading else 0)


def _panels(found: Pictures) -> list[_Panel]:
    drawn, roomy = found.outputs, len(found.outputs) <= _ROOMY
    panels = [] if found.signal is None else [_Panel(found.signal, _height(found.signal, True), True)]
    for number, picture in enumerate(drawn, 1):
        labelled = roomy or picture.extent is None or number % _ROOMY == 0 or number == len(drawn)
        panels.append(_Panel(picture, _height(picture, roomy), labelled and picture.kind != "nothing"))
    return panels


def _maps(panels: Iterable[_Panel]) -> list[Picture]:
    return [panel.picture for panel in panels if panel.picture.kind == "map"]


def _height(picture: Picture, roomy: bool) -> int:
    if picture.kind == "map":  # a whole number of pixels per row
        return len(picture.cells) * max(1, round((128 if roomy else 64) / len(picture.cells)))
    if picture.kind == "lines":
        return max(80, 36 * picture.channels)
    return 22 if picture.kind == "nothing" else 90 if roomy else 56


def _draw_panel(figure: Figure, panel: _Panel, top: int, axis: TimeAxis) -> None:
    """Draws one picture with its title, notes, warning, and the unit of its axis."""
    picture = panel.picture
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
    axes = draw.place(figure, LEFT, top, ACROSS, panel.height)
    if picture.kind == "bars":
        draw.draw_bars(axes, picture)
        axes.set_ylabel("value", fontsize=7, labelpad=1)
    elif picture.kind == "lines":
        draw.draw_lines(axes, picture)
    else:
        draw.draw_map(axes, picture)
        axes.set_ylabel("channel", fontsize=7, labelpad=1)
    is_placed = picture.extent is not None and axis.bounds is not None
    if is_placed:
        axes.set_xlim(axis.bounds)
    elif picture.kind == "map":
        draw.whole_ticks(axes, picture.frames)
    axes.tick_params(labelbottom=panel.has_ticks)
    if panel.has_ticks:
        unit = "channel" if picture.kind == "bars" else axis.short_unit if is_placed else "frame"
        draw.write(figure, 6, top + panel.height + 5, unit, va="top", fontsize=7)


def footer(figure: Figure, top: int, maps: list[Picture], text: str = "") -> None:
    """Draws the colour scales that the maps use, and explains the limit."""
    if not maps:
        return
    text = text or f"limit: written above each map, and {PERCENTILE} % of its cells are within it"
    left = LEFT
    for side in (0, 1, -1):
        if not any(picture.side == side for picture in maps):
            continue
        bar = draw.place(figure, left, top + 8, 100, 9)
        bar.imshow(palette(side)[None, : 2 * STEPS + 1], aspect="auto", extent=(-1, 1, 0, 1))
        bar.set_yticks([])
        ends = {0: ["−limit", "0", "limit"], 1: ["0", "limit"], -1: ["−limit", "0"]}[side]
        bar.set_xticks([-1, 0, 1] if side == 0 else [-1, 1], ends)
        left += 138
    draw.write(figure, left - 5, top + 13, f"{text} · NaN black · Inf yellow", va="center", fontsize=7)
