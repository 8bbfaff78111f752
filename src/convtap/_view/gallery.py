"""The report's pictures: maps as PNG inside the page, signals and bars as SVG, and everything else as text."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import plural
from convtap._view import svg as _svg
from convtap._view.cells import PERCENTILE, Array, colour_indices, palette
from convtap._view.choose import Chosen, checked_count, chosen
from convtap._view.labels import counted
from convtap._view.orient import Orientation
from convtap._view.page import escape
from convtap._view.pictures import MAX_LINES, MAX_MARKS, Picture, pictures, signal_map
from convtap._view.png import png
from convtap._view.signal import one_signal
from convtap._view.timeaxis import TimeAxis

if TYPE_CHECKING:
    from convtap._result.activations import Activations

COLUMNS = 600

#: More calls than this have no picture, and all maps together at most so many cells: about a byte each before base64.
MAX_PICTURES = 300
MAX_CELLS = 2_800_000

EXPLANATION = (
    f"Each map has its own limit (colour ±): {PERCENTILE} % of its cells are within it, the others have the full colour. "
    "Where a bin of frames is one place, its minimum and its maximum stand side by side; where channels share a row, it has "
    "the value furthest from zero. NaN is black, Inf is yellow."
)


class Gallery:
    """The pictures of one input. Arguments are checked and all is computed at once, before anything is written."""

    def __init__(
        self,
        acts: Activations,
        sample: int,
        layers: Chosen,
        signal: Any,
        sample_rate: float | None,
        timeline: Any,
        channels: int,
        channels_last: bool | Chosen,
    ) -> None:
        rows = checked_count("channels", channels)
        self._axis = axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None)
        self._drawn: list[Picture] = []
        self._total = self._chosen = 0
        self._sample = sample
        self._signal: Array | None = None
        if not len(acts):
            return
        self.orientation = Orientation(acts, axis, channels_last)
        if signal is not None:
            self._signal = one_signal(acts, signal, sample, axis, channels_last)
            axis.widen(axis.signal_extent(self._signal.shape[1]))
        share = MAX_CELLS // min(len(acts), MAX_PICTURES)
        columns = max(80, min(COLUMNS, share // min(rows, share)))
        self._chosen = len(chosen(acts, layers))
        self._drawn, self._total = pictures(
            acts,
            sample,
            layers,
            rows=rows,
            columns=columns,
            axis=axis,
            orientation=self.orientation,
            most=MAX_PICTURES,
        )

    def html(self) -> str:
        """The pictures, the signal first."""
        parts = [f"<p>Sample {self._sample}.</p>"]
        elsewhere = self._chosen - self._total
        if elsewhere:
            parts.append(
                f"<p>{plural(elsewhere, 'call')} of other forward passes: choose another input with sample=.</p>"
            )
        if self._total > MAX_PICTURES:
            parts.append(
                f"<p class='alarm'>The first {MAX_PICTURES} of {plural(self._total, 'call')}; choose others with layers=.</p>"
            )
        if self._signal is not None:
            parts.append(self._signal_figure(self._signal))
        parts.extend(self._figure(picture) for picture in self._drawn)
        return "".join(parts)

    def _signal_figure(self, signal: Array) -> str:
        channels, samples = signal.shape
        left = self._place(self._axis.signal_extent(samples))
        if channels > MAX_LINES:
            return self._figure(signal_map(signal, 64, COLUMNS, self._axis))
        caption = _caption("signal", signal.shape, (f"time in {self._axis.unit}",), _bad(signal))
        height = 70 if channels == 1 else 34 * channels
        drawing = f'<div style="{left}">{_svg.lines(signal)}</div>'
        return f"<figure>{caption}{_track(drawing, height)}{self._scale()}</figure>"

    def _figure(self, picture: Picture) -> str:
        caption = _caption(picture.key, picture.shape, picture.notes, picture.warning)
        if picture.kind == "nothing":
            return f"<figure>{caption}</figure>"
        if picture.kind == "bars":
            drawing = f'<div style="left:0;width:100%">{_svg.bars(picture.cells, picture.channels)}</div>'
            return f"<figure>{caption}{_track(drawing, 56)}{_ends(picture.channels, 'channel')}</figure>"
        placed = picture.extent is not None
        where = self._place(picture.extent) if placed else "left:0;width:100%"
        data = base64.b64encode(png(colour_indices(picture.cells, picture.limit), palette())).decode()
        alt = escape(f"map of {picture.key}, channels from top to bottom, time from left to right")
        image = f'<img loading="lazy" alt="{alt}" style="{where}" src="data:image/png;base64,{data}">'
        rows = len(picture.cells)
        height = rows * max(1, round(84 / rows))
        scale = self._scale() if placed else _ends(picture.frames, "frame")
        marks = self._marks(picture)
        return f"<figure>{caption}{marks}{_track(image, height)}{scale}</figure>"

    def _marks(self, picture: Picture) -> str:
        """A mark above each column that has a value that is no number."""
        wrong = np.flatnonzero(~np.isfinite(picture.cells).all(axis=0))
        if not 0 < len(wrong) <= MAX_MARKS:
            return ""
        inside = (wrong + 0.5) / picture.cells.shape[1]
        if picture.extent is not None and self._axis.bounds is not None:
            (start, stop), (first, last) = picture.extent, self._axis.bounds
            inside = (start + inside * (stop - start) - first) / (last - first)
        return (
            f'<div class="marks">{"".join(f"""<span style="left:{100 * at:.2f}%">▼</span>""" for at in inside)}</div>'
        )

    def _place(self, extent: tuple[float, float] | None) -> str:
        """Where on the time axis something lies, as a style."""
        if extent is None or self._axis.bounds is None:
            return "left:0;width:100%"
        first, last = self._axis.bounds
        percent = 100 / (last - first)
        return f"left:{(extent[0] - first) * percent:.3f}%;width:{(extent[1] - extent[0]) * percent:.3f}%"

    def _scale(self) -> str:
        """The numbers of the time axis."""
        if self._axis.bounds is None:
            return ""
        first, last = self._axis.bounds
        step = _round_step((last - first) / 8)
        marks = np.arange(np.ceil(first / step), np.floor(last / step) + 1) * step
        spans = []
        for mark in marks:
            at = 100 * (mark - first) / (last - first)
            side = ' class="first"' if at < 3 else ' class="last"' if at > 97 else ""
            spans.append(f'<span{side} style="left:{at:.2f}%">{mark + 0.0:,.10g}</span>')
        return f'<div class="scale">{"".join(spans)}</div>'


def _round_step(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least ``step``."""
    power = float(10.0 ** np.floor(np.log10(step)))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))


def _bad(values: Array) -> str:
    return counted((int(np.isnan(values).sum()), int(np.isinf(values).sum())))


def _caption(key: str, shape: tuple[int, ...], notes: tuple[str, ...], warning: str) -> str:
    sizes = ", ".join(f"{size:,}" for size in shape) + ("," if len(shape) == 1 else "")
    alarm = f' <span class="alarm">{escape(warning)}</span>' if warning else ""
    soft = f' <span class="soft">· {escape(" · ".join(notes))}</span>' if notes else ""
    return f"<figcaption><b>{escape(key)}</b> ({sizes}){alarm}{soft}</figcaption>"


def _track(inside: str, height: int) -> str:
    return f'<div class="track" style="height:{height + 2}px">{inside}</div>'


def _ends(count: int, noun: str) -> str:
    last = f'<span class="last" style="left:100%">{count - 1:,}</span>' if count > 1 else ""
    return f'<div class="scale"><span class="first" style="left:0">{noun} 0</span>{last}</div>'
