"""Draws maps, bars and lines with matplotlib, laid out in whole pixels."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import MissingExtra, Unsupported, one_line
from convtap._view.cells import (
    BLUE,
    INF_COLOUR,
    INF_HEX,
    NAN_HEX,
    RED,
    STEPS,
    Array,
    bad_columns,
    edges,
    finite_envelope,
    finite_range,
    palette,
    scale_ends,
)
from convtap._view.pictures import MAX_BARS, MAX_MARKS, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
#: The maximum height of a picture in pixels. Browsers and viewers do not show higher ones well.
MAX_HEIGHT = 6000
WIDTH = 1020  # pixels of a whole picture
LEFT, RIGHT = 84, 36  # the unit of the time axis stands to the left of its numbers
ACROSS = WIDTH - LEFT - RIGHT  # pixels of the axes

#: Columns of a map: half the pixels, so that every column stays visible at half the resolution.
COLUMNS = ACROSS // 2

INK = "#2b3a4a"
ALARM = "#c00000"


def new_figure(width: int, height: int, remedy: str = "Draw fewer layers at a time with layers=.") -> Figure:
    """Returns an empty figure of a size in pixels that a notebook can show.

    It chooses no backend and is not registered with pyplot, so Python frees it like any other object.
    """
    if height > MAX_HEIGHT:
        raise Unsupported(f"this picture would be {height:,} pixels high, but the limit is {MAX_HEIGHT:,}. {remedy}")
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def need_matplotlib() -> None:
    """Imports matplotlib.

    Raises:
        MissingExtra: it is not installed, or its import fails.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a matplotlib that was built for another NumPy raises errors of several kinds
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "matplotlib":
            raise MissingExtra(
                "pictures need matplotlib, which is not installed (acts.report(path) works without it). Install it: "
                "pip install 'convtap[plot]'"
            ) from error
        raise MissingExtra(
            f"pictures need matplotlib, whose import failed: {type(error).__name__}: {one_line(error)}. Install it again: "
            "pip install --force-reinstall matplotlib"
        ) from error


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def place(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Adds axes at a position in pixels from the figure's upper left corner."""
    across, down = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.tick_params(labelsize=7, length=2.5, pad=1.5)
    plain_numbers(axes.xaxis, "{x:,.10g}")
    plain_numbers(axes.yaxis, "{x:.4g}")
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    return axes


def plain_numbers(axis: Any, form: str) -> None:
    """Formats the numbers of an axis without an offset, such as +2.5e5, in a corner."""
    from matplotlib.ticker import StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter(form))


def write(figure: Figure, left: int, top: int, text: str, **style: Any) -> None:
    """Writes text at a position in pixels, without parsing it as mathematics."""
    across, down = figure.get_size_inches() * DPI
    style = {"fontsize": 8, "va": "bottom", "ha": "left", **style}
    figure.text(left / across, 1 - top / down, text, parse_math=False, **style)


def not_finite(values: Array) -> str:
    """Returns the count of NaN and Inf values as text, empty if all values are finite."""
    bad = int((~np.isfinite(values)).sum())
    return f"{bad:,} NaN or Inf" if bad else ""


def draw_map(axes: Axes, picture: Picture) -> None:
    """Draws a map as an image with channel 0 at the top.

    NaN is black and Inf is yellow. Marks above the map show the columns that have one.
    """
    from matplotlib.colors import ListedColormap

    cells = picture.cells.astype(np.float64)  # so that twice the limit does not overflow
    first, last = picture.extent or (-0.5, picture.frames - 0.5)
    style: dict[str, Any] = {
        "aspect": "auto",
        "interpolation": "nearest",
        "extent": (first, last, len(cells) - 0.5, -0.5),
    }
    colours = ListedColormap(palette(picture.side)[: 2 * STEPS + 1] / 255.0, name="convtap").with_extremes(bad=NAN_HEX)
    infinite, (low, high) = np.isinf(cells), scale_ends(picture.limit, picture.side)
    axes.imshow(np.where(infinite, 0, cells), cmap=colours, vmin=low, vmax=high, **style)
    if infinite.any():
        axes.imshow(np.where(infinite[..., None], (*(np.asarray(INF_COLOUR) / 255), 1.0), 0.0), **style)
    wrong = bad_columns(cells)
    if 0 < len(wrong) <= MAX_MARKS:
        centres = first + (wrong + 0.5) * (last - first) / cells.shape[1]
        above = axes.get_xaxis_transform()
        axes.plot(centres, np.full(len(wrong), 1.0), "v", color=ALARM, ms=3, transform=above, clip_on=False, lw=0)
    if len(cells) > 1:
        axes.set_yticks([0, len(cells) - 1], ["0", f"{picture.channels - 1:,}"])
    else:
        axes.set_yticks([0], ["0" if picture.channels == 1 else f"0–{picture.channels - 1}"])


def draw_bars(axes: Axes, picture: Picture) -> None:
    """Draws one bar per channel, blue or red, or a cross for NaN or Inf."""
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
    cross: dict[str, Any] = {"ms": 7, "mec": "black", "mew": 0.5, "lw": 0, "transform": axes.get_xaxis_transform()}
    for mask, colour, height in ((nan, NAN_HEX, 0.5), (~good & ~nan, INF_HEX, 0.9)):
        if mask.any():
            axes.plot((starts + widths / 2)[mask], np.full(mask.sum(), height), "X", color=colour, **cross)
    axes.locator_params(axis="y", nbins=3)
    whole_ticks(axes, picture.channels)


def whole_ticks(axes: Axes, count: int, most: int = 8) -> None:
    """Sets the ticks of an axis over ``count`` items to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    plain_numbers(axes.xaxis, "{x:,.10g}")
    axes.set_xlim(-0.5, count - 0.5)


def draw_lines(axes: Axes, picture: Picture, columns: int = ACROSS) -> None:
    """Draws the channels of a signal as lines, one below the other."""
    low, high = finite_range(picture.cells)
    height = (high - low) * 1.1 or 1.0
    is_binary = bool(np.isin(picture.cells, (0, 1)).all())  # such as one-hot DNA, for which sloped lines would be wrong
    for channel, row in enumerate(picture.cells):
        draw_line(axes, row, picture.extent, -channel * height, columns, is_binary)
    if picture.channels > 1:
        middle, numbers = (high + low) / 2, range(picture.channels)
        axes.set_yticks([middle - channel * height for channel in numbers], [str(i) for i in numbers])
        axes.set_ylim(middle - (picture.channels - 0.5) * height, middle + height / 2)
    else:
        axes.locator_params(axis="y", nbins=3)


def draw_line(
    axes: Axes,
    row: Array,
    extent: tuple[float, float] | None = None,
    shift: float = 0.0,
    columns: int = ACROSS,
    is_binary: bool = False,
    cross: Array | None = None,
) -> None:
    """Draws one channel over time.

    It is a line, or the minimum and maximum in each column if it has more values than columns. NaN and Inf leave a gap, with
    a cross at the bottom if ``cross`` is true there. Zeros and ones are drawn as blocks.
    """
    samples = len(row)
    first, last = extent or (-0.5, samples - 0.5)
    step = (last - first) / samples
    if samples > 2 * columns:
        bounds = edges(samples, columns)
        low, high = finite_envelope(row + shift, bounds)
        centres = first + (bounds[:-1] + bounds[1:]) / 2 * step
        axes.fill_between(centres, low, high, color=INK, lw=0.5)
    elif is_binary:
        ends = first + np.arange(samples + 1) * step
        axes.stairs(row + shift, ends, baseline=shift, fill=True, color=INK, lw=0.8)
        axes.hlines(shift, first, last, color=INK, lw=0.5)
    else:
        values = np.where(np.isfinite(row), row, np.nan) + shift
        times = first + (np.arange(samples) + 0.5) * step
        axes.plot(times, values, color=INK, lw=0.8, marker="." if samples == 1 else "")
    wrong = np.flatnonzero(~np.isfinite(row) & (True if cross is None else cross))
    if len(wrong):
        at = first + (wrong + 0.5) * step
        bins = np.unique(((at - first) / (last - first) * columns).astype(int), return_index=True)[1]
        below = axes.get_xaxis_transform()
        axes.plot(at[bins], np.full(len(bins), 0.04), "x", color=ALARM, ms=4, lw=0, transform=below, clip_on=False)
