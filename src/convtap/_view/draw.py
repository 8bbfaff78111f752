"""Draws on matplotlib axes: a map, bars, a signal, one line; and lays axes out one below the other, in whole pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import MissingExtra, Unsupported
from convtap._view.cells import INF_COLOUR, NAN_COLOUR, STEPS, Array, edges, palette
from convtap._view.pictures import MAX_BARS, MAX_MARKS, Picture
from convtap._view.timeaxis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
_MOST = 2**16 - 1
WIDTH = 1000  # pixels of a whole picture
LEFT, RIGHT = 62, 38
ACROSS = WIDTH - LEFT - RIGHT  # pixels of the axes

#: Columns of a map: half the pixels, so that none is lost at half the resolution either.
COLUMNS = ACROSS // 2

INK = "#2b3a4a"
ALARM = "#c00000"
BLUE, RED = "#17589f", "#a8202e"
_NAN = "#{:02x}{:02x}{:02x}".format(*NAN_COLOUR)
_INF = "#{:02x}{:02x}{:02x}".format(*INF_COLOUR)


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of a size in pixels.

    Raises:
        MissingExtra: matplotlib is not installed.
        Unsupported: it would be higher than matplotlib can draw.
    """
    if height > _MOST:
        raise Unsupported(
            f"this picture would be {height:,} pixels high, and matplotlib draws at most {_MOST:,}. Draw fewer layers or "
            "channels at a time with layers= or channels=, or see all of them in acts.report('report.html')."
        )
    try:
        from convtap._view.figure import Picture as Shown
    except ImportError as error:
        raise MissingExtra(
            "pictures are drawn with matplotlib, which is not installed (acts.report(path) needs none). "
            "Install it with: pip install 'convtap[plot]'"
        ) from error
    return Shown(figsize=(width / DPI, height / DPI), dpi=DPI)


def place(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Adds axes at a position in pixels from the figure's upper left corner."""
    across, down = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.tick_params(labelsize=7, length=2.5, pad=1.5)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    return axes


def write(figure: Figure, left: int, top: int, text: str, **style: Any) -> None:
    """Writes text at a position in pixels. What is in it is never read as mathematics."""
    across, down = figure.get_size_inches() * DPI
    style = {"fontsize": 8, "va": "bottom", "ha": "left", **style}
    figure.text(left / across, 1 - top / down, text, parse_math=False, **style)


def colours() -> Any:
    """The map's colours for matplotlib, NaN in its own."""
    from matplotlib.colors import ListedColormap

    found = ListedColormap(palette()[: 2 * STEPS + 1] / 255.0, name="convtap")
    return found.with_extremes(bad=_NAN)


def draw_map(axes: Axes, picture: Picture) -> None:
    """Draws a map as an image, channel 0 on top; NaN black, Inf yellow, and a mark above the columns that have one."""
    cells = picture.cells.astype(np.float64)  # twice the limit must not overflow
    first, last = picture.extent or (-0.5, picture.frames - 0.5)
    extent = (first, last, len(cells) - 0.5, -0.5)
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    infinite = np.isinf(cells)
    axes.imshow(np.where(infinite, 0, cells), cmap=colours(), vmin=-picture.limit, vmax=picture.limit, **style)
    if infinite.any():
        axes.imshow(np.where(infinite[..., None], (*(np.asarray(INF_COLOUR) / 255), 1.0), 0.0), **style)
    wrong = np.flatnonzero(~np.isfinite(cells).all(axis=0))
    if 0 < len(wrong) <= MAX_MARKS:
        centres = first + (wrong + 0.5) * (last - first) / cells.shape[1]
        above = axes.get_xaxis_transform()
        axes.plot(centres, np.full(len(wrong), 1.0), "v", color=ALARM, ms=3, transform=above, clip_on=False, lw=0)
    _label_rows(axes, len(cells), picture.channels)


def _label_rows(axes: Axes, rows: int, channels: int) -> None:
    if rows == 1:
        axes.set_yticks([0], ["0" if channels == 1 else f"0–{channels - 1}"])
    else:
        axes.set_yticks([0, rows - 1], ["0", f"{channels - 1:,}"])


def draw_bars(axes: Axes, picture: Picture) -> None:
    """Draws one bar a channel, blue below zero and red above; a channel that is no number gets a cross instead."""
    low, high = picture.cells
    bounds = edges(picture.channels, MAX_BARS)
    starts, widths = bounds[:-1] - 0.5, np.diff(bounds)
    good = np.isfinite(low) & np.isfinite(high)
    width = np.where(widths > 1, widths, 0.8)
    left = starts + (widths - width) / 2
    axes.bar(left[good], high[good], width[good], color=RED, align="edge")
    axes.bar(left[good], low[good], width[good], color=BLUE, align="edge")
    axes.axhline(0, color=INK, lw=0.6)
    nan = np.isnan(low) | np.isnan(high)
    for mask, colour, where in ((nan, _NAN, 0.5), (~good & ~nan, _INF, 0.9)):
        if mask.any():
            centres = (starts + widths / 2)[mask]
            heights = np.full(len(centres), where)
            axes.plot(
                centres,
                heights,
                "X",
                ms=7,
                color=colour,
                mec="black",
                mew=0.5,
                lw=0,
                transform=axes.get_xaxis_transform(),
            )
    axes.set_xlim(-0.5, picture.channels - 0.5)
    axes.locator_params(axis="y", nbins=3)
    whole_ticks(axes, picture.channels)


def whole_ticks(axes: Axes, count: int, most: int = 8) -> None:
    """Puts ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, count - 0.5)


def draw_signal(axes: Axes, values: Array, axis: TimeAxis) -> None:
    """Draws the channels of a signal as lines, one below the other."""
    channels, samples = values.shape
    first, last = axis.signal_extent(samples)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    height = (high - low) * 1.1 or 1.0
    for channel, row in enumerate(values):
        draw_line(axes, row, (first, last), shift=-channel * height)
    if channels > 1:
        middle = (high + low) / 2
        axes.set_yticks([middle - channel * height for channel in range(channels)], [str(i) for i in range(channels)])
        axes.set_ylim(middle - (channels - 0.5) * height, middle + height / 2)
    else:
        axes.locator_params(axis="y", nbins=3)
    axes.set_xlim(axis.bounds or (first, last))


def draw_line(axes: Axes, row: Array, extent: tuple[float, float], shift: float = 0.0, columns: int = ACROSS) -> None:
    """Draws one channel over time: a line, or where it has more values than columns, its minimum and maximum in each.

    What is no number leaves a gap, with a cross at the bottom.
    """
    first, last = extent
    samples = len(row)
    step = (last - first) / samples
    good = np.isfinite(row)
    values = np.where(good, row, np.nan) + shift
    if samples > 2 * columns:
        bounds = edges(samples, columns)
        low = np.fmin.reduceat(values, bounds[:-1])
        high = np.fmax.reduceat(values, bounds[:-1])
        centres = first + (bounds[:-1] + bounds[1:]) / 2 * step
        axes.fill_between(centres, low, high, color=INK, lw=0.5)
    else:
        axes.plot(
            first + (np.arange(samples) + 0.5) * step, values, color=INK, lw=0.8, marker="." if samples == 1 else ""
        )
    wrong = np.flatnonzero(~good)
    if len(wrong):
        at = first + (wrong + 0.5) * step
        bins = np.unique(((at - first) / (last - first) * columns).astype(int), return_index=True)[1]
        below = axes.get_xaxis_transform()
        axes.plot(at[bins], np.full(len(bins), 0.04), "x", color=ALARM, ms=4, lw=0, transform=below, clip_on=False)
