"""Writes the place, the scales and the NaN marks of a picture as HTML."""

from __future__ import annotations

import numpy as np

from convtap._view.cells import bad_columns
from convtap._view.pictures import MAX_MARKS, Picture
from convtap._view.time_axis import TimeAxis


def place(extent: tuple[float, float] | None, axis: TimeAxis) -> str:
    """Returns the CSS of a place on the time axis, or of the full width without one."""
    if extent is None or axis.bounds is None:
        return "left:0;width:100%"
    first, last = axis.bounds
    percent = 100 / (last - first)
    return f"left:{(extent[0] - first) * percent:.3f}%;width:{(extent[1] - extent[0]) * percent:.3f}%"


def marks(picture: Picture, axis: TimeAxis) -> str:
    """Returns a mark above each column with NaN or Inf, unless there are too many."""
    wrong = bad_columns(picture.cells)
    if not 0 < len(wrong) <= MAX_MARKS:
        return ""
    inside = (wrong + 0.5) / picture.cells.shape[1]
    if picture.extent is not None and axis.bounds is not None:
        (start, stop), (first, last) = picture.extent, axis.bounds
        inside = (start + inside * (stop - start) - first) / (last - first)
    return f'<div class="marks">{"".join(f"""<span style="left:{100 * at:.2f}%">▼</span>""" for at in inside)}</div>'


def time_scale(axis: TimeAxis) -> str:
    """Returns the numbers of the time axis."""
    if axis.bounds is None:
        return ""
    first, last = axis.bounds
    step = _round_step((last - first) / 8)
    numbers = np.arange(np.ceil(first / step), np.floor(last / step) + 1) * step
    return _scale([(100 * (number - first) / (last - first), f"{number + 0.0:,.10g}") for number in numbers])


def _round_step(step: float) -> float:
    """Returns the smallest 1, 2 or 5 · 10ⁿ that is at least ``step``."""
    power = float(10.0 ** np.floor(np.log10(step)))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))


def number_scale(count: int) -> str:
    """Returns the numbers of frames or channels, including the first and the last."""
    step = max(1, int(_round_step((count - 1) / 8))) if count > 1 else 1
    last = count - 1
    numbers = dict.fromkeys([*range(0, max(1, last - step // 2), step), last])
    return _scale([(100 * (number + 0.5) / count, f"{number:,}") for number in numbers])


def _scale(numbers: list[tuple[float, str]]) -> str:
    """Returns numbers at their places in percent. Numbers at an end stay inside."""
    spans = []
    for at, text in numbers:
        side = ' class="first"' if at < 3 else ' class="last"' if at > 97 else ""
        spans.append(f'<span{side} style="left:{at:.2f}%">{text}</span>')
    return f'<div class="scale">{"".join(spans)}</div>'


def channel_numbers(picture: Picture) -> str:
    """Returns the first and the last channel beside a map or lines."""
    first, last = "0", f"{picture.channels - 1:,}"
    if picture.kind == "map" and len(picture.cells) == 1:
        return _ends("channel" if first == last else "channels", first if first == last else f"{first}–{last}")
    return _ends(first) if first == last else _ends(first, "channel", last)


def value_numbers(low: float, high: float) -> str:
    """Returns the ends of an axis of values."""
    return _ends(f"{high:.3g}", f"{low:.3g}")


def _ends(*texts: str) -> str:
    return f'<div class="rows">{"".join(f"<span>{text}</span>" for text in texts)}</div>'
