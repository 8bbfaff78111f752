"""Draws the input windows of hits as lines, maps or letters, grouped by channel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convtap._errors import InvalidType, InvalidValue, brief, plural
from convtap._tensors.statistics import real_values
from convtap._time.hit import Hit, by_channel, cut_windows
from convtap._view import draw
from convtap._view.cells import Array, colour_limit, finite_range, shrink, side_of
from convtap._view.pictures import MAX_LINES, Picture
from convtap._view.sequence_letters import OUTSIDE, WIDEST, draw_letters
from convtap._view.time_axis import checked_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 4
_HEAD, _GROUP, _TITLE, _GAP, _FOOT = 10, 22, 14, 8, 40
_LETTERS = 15
_REMEDY = "Draw fewer hits: windows(hits[:50], x)."


class _Window(NamedTuple):
    """A hit, its window as (C, W), and a mask of the samples in the signal."""

    hit: Hit
    values: Array
    inside: Array


def windows_figure(hits: Iterable[Hit], x: Any, sample_rate: float | None, letters: str | None) -> Figure:
    """Draws the windows of hits in their order, grouped by channel."""
    rate = None if sample_rate is None else checked_rate(sample_rate)
    every = [
        _Window(hit, np.asarray(real_values(by_channel(hit, window)).cpu().numpy()), window.inside.cpu().numpy())
        for hit, window in cut_windows(hits, x)
    ]
    groups: dict[int, list[_Window]] = {}
    for window in every:
        groups.setdefault(window.hit.channel, []).append(window)
    if letters is None:
        return _small_multiples(every, groups, rate)
    return _sequences(every, groups, rate, _checked_letters(letters, every))


def _small_multiples(every: list[_Window], groups: dict[int, list[_Window]], rate: float | None) -> Figure:
    """Draws each window as lines, or as a map if it has many channels, with one scale."""
    count = max(len(window.values) for window in every)
    height = max(54, 22 * count) if count <= MAX_LINES else 64
    step, across = _TITLE + height + _GAP, min(_ACROSS, max(map(len, groups.values())))
    total = sum(_GROUP + step * -(-len(group) // across) for group in groups.values())
    figure = draw.new_figure(draw.WIDTH, _HEAD + total + _FOOT, _REMEDY)
    values = np.concatenate([window.values[:, window.inside].ravel() for window in every])
    width, top = (draw.WIDTH - 44) // across, _HEAD
    for channel, group in groups.items():
        draw.write(figure, 20, top + 16, _group_title(channel, group), weight="bold")
        top += _GROUP
        for position, window in enumerate(group):
            line, column = divmod(position, across)
            left = 46 + column * width
            axes = draw.place(figure, left, top + _TITLE + line * step, width - 26, height)
            _draw_window(axes, window, values, rate, width - 26)
            axes.tick_params(
                labelleft=column == 0, labelbottom=channel == [*groups][-1] and position + across >= len(group)
            )
            axes.set_title(_place_text(window.hit, rate), fontsize=7, loc="left", pad=2)
            axes.set_title(_minus(f"{window.hit.value:.3g}"), fontsize=7, loc="right", pad=2, weight="bold")
        top += step * -(-len(group) // across)
    unit = "samples" if rate is None else "seconds"
    text = f"{unit} from the start of the window · bold: the output · grey: outside the signal · one scale"
    draw.write(figure, draw.WIDTH // 2, top + 32, text, ha="center", fontsize=7)
    return figure


def _draw_window(axes: Axes, window: _Window, values: Array, rate: float | None, columns: int) -> None:
    """Draws one window, starting at 0, with the samples outside the signal in grey."""
    scale = 1.0 if rate is None else 1.0 / rate
    length = window.values.shape[1]
    extent = (-0.5 * scale, (length - 0.5) * scale)
    shown = np.where(window.inside, window.values.astype(np.float64), np.nan)
    if len(shown) <= MAX_LINES:
        low, high = finite_range(values)
        height = (high - low) * 1.1 or 1.0
        is_binary = bool(np.isin(values, (0, 1)).all())
        for channel, row in enumerate(shown):
            draw.draw_line(axes, row, extent, -channel * height, columns, is_binary, cross=window.inside)
        middle, numbers = (high + low) / 2, range(len(shown))
        axes.set_ylim(middle - (len(shown) - 0.5) * height, middle + height / 2)
        if len(shown) > 1:
            axes.set_yticks([middle - channel * height for channel in numbers], [str(i) for i in numbers])
        else:
            axes.locator_params(axis="y", nbins=3)
    else:
        cells = shrink(np.where(window.inside, window.values, 0), 64, columns).values
        limit, side = colour_limit(values), side_of(values)
        picture = Picture("", shown.shape, "map", cells, len(shown), length, limit, extent=extent, side=side)
        draw.draw_map(axes, picture)
    for first, stop in _outside(window.inside):
        axes.axvspan((first - 0.5) * scale, (stop - 0.5) * scale, color=OUTSIDE, lw=0, zorder=1.5)
    axes.set_xlim(extent)
    axes.locator_params(axis="x", nbins=5, integer=rate is None)


def _outside(inside: Array) -> list[tuple[int, int]]:
    """Returns the start and stop of each run of samples outside the signal."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~inside, [False]]).astype(np.int8)))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]


def _sequences(every: list[_Window], groups: dict[int, list[_Window]], rate: float | None, letters: str) -> Figure:
    """Draws each window as a row of letters."""
    total = sum(_GROUP + _LETTERS * len(group) + _GAP for group in groups.values())
    figure = draw.new_figure(draw.WIDTH, _HEAD + total + _FOOT, _REMEDY)
    length, top = len(every[0].inside), _HEAD
    left = 210
    width = min(draw.WIDTH - left - 80, WIDEST * length)
    for channel, group in groups.items():
        draw.write(figure, 20, top + 16, _group_title(channel, group), weight="bold")
        top += _GROUP
        axes = draw.place(figure, left, top, width, _LETTERS * len(group))
        draw_letters(axes, [window.values for window in group], [window.inside for window in group], letters)
        axes.tick_params(labelbottom=channel == [*groups][-1])
        for row, window in enumerate(group):
            middle = top + _LETTERS * row + _LETTERS // 2
            draw.write(figure, left - 10, middle, _place_text(window.hit, rate), ha="right", va="center", fontsize=7)
            value = _minus(f"{window.hit.value:.3g}")
            draw.write(figure, left + width + 10, middle, value, va="center", fontsize=7, weight="bold")
        top += _LETTERS * len(group) + _GAP
    text = f"position in the window of {length:,} · bold: the output · grey: outside the signal"
    draw.write(figure, left, top + 32, text, fontsize=7)
    return figure


def _group_title(channel: int, group: list[_Window]) -> str:
    return f"channel {channel}  ·  {plural(len(group), 'window')}"


def _place_text(hit: Hit, rate: float | None) -> str:
    """Returns the input of a window and its place in that input, as text."""
    if rate is None:
        return _minus(f"input {hit.sample:,} · {hit.start:,} to {hit.stop - 1:,}")
    digits = min(6, max(0, math.ceil(math.log10(rate))))
    return _minus(f"input {hit.sample:,} · {hit.start / rate:,.{digits}f} to {hit.stop / rate:,.{digits}f} s")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _checked_letters(letters: Any, every: list[_Window]) -> str:
    if not isinstance(letters, str):
        raise InvalidType(f"letters is {brief(letters)}, not a string. Pass one letter per channel: letters='ACGT'.")
    for window in every:
        channels = len(window.values)
        if len(letters) != channels:
            raise InvalidValue(
                f"letters={letters!r} has {plural(len(letters), 'letter')}, but the inputs have {plural(channels, 'channel')}. "
                "Pass one letter per channel."
            )
        shown = window.values[:, window.inside]
        is_one_hot = np.isin(shown, (0, 1)).all(axis=0) & (shown.sum(axis=0) == 1)
        is_equal = (shown == shown[:1]).all(axis=0)  # an unknown letter
        if not (is_one_hot | is_equal).all():
            raise InvalidValue(
                f"input {window.hit.sample} is not one-hot, so it has no letters. Remove letters={letters!r} to draw lines."
            )
    return letters
