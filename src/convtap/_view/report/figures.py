"""Writes the pictures of one input as HTML: maps as PNG, lines and bars as SVG."""

from __future__ import annotations

import base64
import math
from typing import Any, NamedTuple

from convtap._errors import plural
from convtap._view.cells import PERCENTILE, STEPS, finite_range, hex_colour, palette
from convtap._view.outputs import CapturedOutputs, Chosen
from convtap._view.pictures import Picture, Pictures, pictures
from convtap._view.report.blocks import blocks
from convtap._view.report.codes import codes, colours, peak_of
from convtap._view.report.entries import Entries, folded
from convtap._view.report.image import bars, bars_range, lines, png
from convtap._view.report.page import escape, name_html
from convtap._view.report.scale import channel_numbers, marks, number_scale, place, time_scale, value_numbers
from convtap._view.time_axis import TimeAxis

#: The maximum number of columns of a map.
COLUMNS = 600

#: The approximate height of a map in pixels.
HEIGHT = 100

#: The minimum number of columns. Channels share rows if a map would have fewer.
NARROWEST = 96

#: The maximum number of calls with a picture.
MAX_PICTURES = 300

#: The maximum bytes of a page of up to MAX_PICTURES layers, without its layer tree; the bytes of a layer without its map, of
#: each character of its name, and of each cell of a map of noise.
PAGE, LAYER, SIGN, CELL = 2_600_000, 3_600, 8, 1.31

_EXPLANATION = (
    f"Each map has its own colour limit: {PERCENTILE} % of its cells are within the limit, and the others have the full "
    "colour. A bin of several frames is drawn as its minimum and its maximum, side by side. A row of several channels shows "
    "the value furthest from zero. If a map has no values below zero, its scale starts at zero. If it has no values above "
    "zero, its scale ends at zero. NaN is black, and Inf is yellow."
)


def legend() -> str:
    """Returns the colour scale and an explanation of the cells."""
    stops = ", ".join(hex_colour(rgb) for rgb in palette()[: 2 * STEPS + 1 : 8])
    return (
        f'<p class="hint">−limit <span class="legend" style="background: linear-gradient(to right, {stops})"></span> +limit, '
        f"white is zero. {escape(_EXPLANATION)}</p>"
    )


def drawn_input(outputs: CapturedOutputs, sample: int, layers: Chosen, signal: Any, rows: int) -> Pictures:
    """Prepares the pictures of one input, sized so that the page stays small."""
    within = {id(call) for call in outputs.locate(sample)[0].calls}
    names = [call.key for call in outputs.chosen(layers) if id(call) in within][:MAX_PICTURES]
    rows, columns = _grid(names, rows)
    return pictures(outputs, sample, layers, signal, rows, columns, COLUMNS, most=MAX_PICTURES)


def _grid(names: list[str], rows: int) -> tuple[int, int]:
    """Returns the maximum rows and columns of each map.

    With many maps, the rows are fewer than ``rows``, so that the time axis keeps enough columns.
    """
    count = max(1, len(names))
    cells = max((PAGE - LAYER * count - SIGN * sum(map(len, names))) / CELL / count, 8 * NARROWEST)
    rows = min(rows, 1 << int(math.log2(cells / NARROWEST)))
    return rows, min(COLUMNS, int(cells / rows))


def figures(found: Pictures, axis: TimeAxis, entries: Entries, sample: int) -> str:
    """Returns the pictures of one input as HTML, signal first, folded by block."""
    parts = [legend(), f"<p class='hint'>The pictures show sample {sample}."]
    if found.elsewhere:
        calls = plural(found.elsewhere, "call")
        parts.append(f" Other forward passes have {calls}. Pass sample= to draw another input.")
    parts.append("</p>")
    if found.here > MAX_PICTURES:
        calls = plural(found.here, "call")
        parts.append(
            f"<p class='alarm'>Shown: the first {MAX_PICTURES} of {calls}. Pass layers= to choose other calls.</p>"
        )
    if found.signal is not None:
        parts.append(figure(found.signal, axis))
    drawn = [figure(picture, axis, entries) for picture in found.outputs]
    return "".join(parts) + folded(blocks(entries.drawn), drawn, [picture.warning for picture in found.outputs])


def figure(picture: Picture, axis: TimeAxis, entries: Entries | None = None) -> str:
    """Returns one picture as HTML, on the time axis if its place is known."""
    anchor = back = ""
    if entries is not None:
        anchor = f' id="{entries.map[picture.key]}"'
        row = entries.row.get(picture.key)
        back = "" if row is None else f'<a class="back" href="#{row}" title="go to the row in the table">↑ table</a>'
    alarm = f' <span class="alarm">{escape(picture.warning)}</span>' if picture.warning else ""
    notes = f' <span class="soft">· {escape(" · ".join(picture.notes))}</span>' if picture.notes else ""
    name = f'<b class="name">{name_html(picture.key)}</b>'
    caption = f"<figcaption>{back}{name} {picture.size}{alarm}{notes}</figcaption>"
    if picture.kind == "nothing":
        return f"<figure{anchor}>{caption}</figure>"
    return f"<figure{anchor}>{caption}{_plot(picture, axis)}</figure>"


class _Plot(NamedTuple):
    """The parts of a picture.

    Attributes:
        image: the image, as HTML.
        height: its height in pixels.
        beside: the numbers to its left.
        below: the numbers below it.
        unit: the unit of the numbers below it.
        data: the attributes that the script reads.
    """

    image: str
    height: int
    beside: str
    below: str
    unit: str
    data: dict[str, Any]


def _plot(picture: Picture, axis: TimeAxis) -> str:
    """Returns the picture with its channel numbers and its time scale."""
    image, height, beside, below, unit, data = _WRITERS[picture.kind](picture, axis)
    if picture.extent is not None:
        data["start"], data["stop"] = picture.extent
    above = marks(picture, axis) if picture.kind == "map" else ""
    attributes = "".join(
        f' data-{name}="{f"{value:.9g}" if isinstance(value, float) else value}"' for name, value in data.items()
    )
    return (
        f'<div class="plot">{above}{beside}<div class="track" data-kind="{picture.kind}" data-channels="{picture.channels}"'
        f'{attributes} style="height:{height + 2}px"><div style="{place(picture.extent, axis)}">{image}</div></div>'
        f'<div class="unit">{unit}</div>{below}</div>'
    )


def _map(picture: Picture, axis: TimeAxis) -> _Plot:
    cells, peak = picture.cells, peak_of(picture.cells)
    data = base64.b64encode(png(codes(cells, picture.limit, peak), colours(picture.side))).decode()
    alt = escape(f"map of {picture.key} with channels from top to bottom and time from left to right")
    image = f'<img loading="lazy" alt="{alt}" src="data:image/png;base64,{data}">'
    height = len(cells) * max(1, round(HEIGHT / len(cells)))
    about = {"frames": picture.frames, "limit": picture.limit, "peak": peak}
    if picture.extent is None:
        return _Plot(image, height, channel_numbers(picture), number_scale(picture.frames), "frame", about)
    return _Plot(image, height, channel_numbers(picture), time_scale(axis), _unit(axis), about)


def _bars(picture: Picture, axis: TimeAxis) -> _Plot:
    low, high = bars_range(picture.cells)
    beside, below = value_numbers(low, high), number_scale(picture.channels)
    return _Plot(bars(picture.cells), 56, beside, below, "channel", {"low": low, "high": high})


def _lines(picture: Picture, axis: TimeAxis) -> _Plot:
    low, high = finite_range(picture.cells)
    height, about = max(70, 34 * picture.channels), {"frames": picture.frames, "low": low, "high": high}
    beside = value_numbers(low, high) if picture.channels == 1 else channel_numbers(picture)
    return _Plot(lines(picture.cells), height, beside, time_scale(axis), _unit(axis), about)


_WRITERS = {"map": _map, "bars": _bars, "lines": _lines}


def _unit(axis: TimeAxis) -> str:
    return "seconds" if axis.unit == "seconds" else "sample"
