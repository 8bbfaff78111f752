"""Prepares the picture of each output for one input: cells, place in time, notes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from convtap._errors import LayerNotFound, Unsupported, listed
from convtap._result.call import shown_value
from convtap._tensors.layout import Axes
from convtap._tensors.memory import has_no_values
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import real_values
from convtap._view.cells import Array, colour_limit, count_bad, edges, envelope, scale_text, shrink, side_of
from convtap._view.outputs import CapturedOutputs, Chosen
from convtap._view.signal import one_signal
from convtap._view.time_axis import Place, TimeAxis

#: The maximum number of channels of a signal that is drawn as lines. With more channels it is a map.
MAX_LINES = 8

#: The maximum number of columns with NaN or Inf that have marks. More columns are visible without marks.
MAX_MARKS = 60

#: The maximum number of bars. With more channels, neighbours share a bar.
MAX_BARS = 256


@dataclass(frozen=True)
class Picture:
    """One output for one input, or the signal, ready to be drawn.

    Attributes:
        key: the key of the call, with the path of the tensor if the call returns several; or ``"signal"``.
        shape: the shape of the output for this input, such as (C, T).
        kind: ``"map"`` over time, ``"lines"`` over time, ``"bars"`` without a time axis, or ``"nothing"`` if only the notes
            can be shown.
        cells: the map's cells; for lines the values, (C, T); for bars two rows, the lower and the upper ends.
        channels: the number of channels.
        frames: the number of frames or samples that are shown.
        limit: the magnitude of the full colour.
        warning: the counts of NaN and Inf as text, or an empty string.
        extent: the start and end on the time axis, in its unit, or None if the place is unknown.
        notes: the notes in the title.
        side: 1 if the colour scale starts at zero, -1 if it ends at zero, 0 if it has both signs.
    """

    key: str
    shape: tuple[int, ...]
    kind: Literal["map", "lines", "bars", "nothing"]
    cells: Array
    channels: int = 0
    frames: int = 0
    limit: float = 1.0
    warning: str = ""
    extent: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    side: int = 0

    @property
    def size(self) -> str:
        """The shape with thousands separators, such as ``(4, 1,200)``."""
        return f"({', '.join(f'{size:,}' for size in self.shape)}{',' if len(self.shape) == 1 else ''})"


class Pictures(NamedTuple):
    """The pictures of one input.

    Attributes:
        signal: the picture of the signal, or None.
        outputs: the pictures of the outputs.
        here: the number of chosen calls in the pass of this input.
        elsewhere: the number of chosen calls in other passes.
    """

    signal: Picture | None
    outputs: list[Picture]
    here: int
    elsewhere: int


def pictures(
    outputs: CapturedOutputs,
    sample: int,
    layers: Chosen,
    signal: Any,
    rows: int,
    columns: int,
    signal_columns: int | None = None,
    most: int | None = None,
) -> Pictures:
    """Prepares the signal and each chosen call for one input.

    It first widens the time axis to include all of them. A map has at most ``rows`` and ``columns``, and the signal has at
    most ``signal_columns``. Only the first ``most`` calls are prepared.
    """
    values = None if signal is None else one_signal(outputs, signal, sample)
    if values is not None:
        outputs.axis.widen(outputs.axis.signal_extent(values.shape[1]))
    axis, calls = outputs.axis, outputs.chosen(layers)
    found, row = outputs.locate(sample)
    within = {id(call) for call in found.calls}
    here = [call for call in calls if id(call) in within]
    if not here:
        raise LayerNotFound(
            f"{listed([call.key for call in calls])} did not run in the forward pass of sample {sample}. Choose from its "
            f"calls: {listed([call.key for call in found.calls])}."
        )
    places = [(call, outputs.place(call)) for call in here[:most]]
    for call, place in places:
        for path, tensor in walk_tensors(shown_value(call)):
            axis.widen(axis.extent(place, path, outputs.frames(call, path, tensor)))
    axis.check_span(found.shape)
    drawn = []
    for call, place in places:
        for path, tensor in walk_tensors(call.output):
            key, axes = f"{call.key}{path}", outputs.axes(call, path, tensor)
            try:
                one = found.cut(key, tensor, row, axes.batch)
            except Unsupported as error:
                drawn.append(_nothing(key, tensor, str(error).partition(". ")[0] + "."))
            else:
                drawn.append(_picture(key, path, one, axes, place, rows, columns, axis))
    shown = None if values is None else signal_picture(values, signal_columns or columns, axis)
    return Pictures(shown, drawn, len(here), len(calls) - len(here))


def _picture(
    key: str, path: str, one: Tensor, axes: Axes, place: Place, rows: int, columns: int, axis: TimeAxis
) -> Picture:
    if is_blank(one):
        return _nothing(key, one, "it has no values (meta device)." if one.numel() else "it is empty.")
    values, notes = as_map(one, axes)
    shape, frames = tuple(one.shape), values.shape[1]
    if frames == 1:
        return bars(key, shape, values[:, 0], notes)
    return _map(key, shape, values, rows, columns, axis, axis.extent(place, path, frames), notes)


def signal_picture(values: Array, columns: int, axis: TimeAxis) -> Picture:
    """Returns a (C, T) signal as lines, or as a map if it has many channels."""
    channels, samples = values.shape
    whole, unit = axis.signal_extent(samples), f"time in {axis.unit}"
    if channels > MAX_LINES:
        picture = _map("signal", values.shape, values, 64, columns, axis, whole, [], "sample")
        return replace(picture, notes=(*picture.notes, unit))
    frames, extent = axis.visible(whole, samples)
    shown, notes = values[:, frames], shown_note("sample", frames, samples)
    if not shown.shape[1]:
        return Picture("signal", values.shape, "nothing", shown, notes=("it has no samples in the span.",))
    warning = _bad_of(values, shown)
    return Picture(
        "signal", values.shape, "lines", shown, channels, shown.shape[1], 1.0, warning, extent, (*notes, unit)
    )


def bars(key: str, shape: tuple[int, ...], values: Array, notes: list[str]) -> Picture:
    """Returns (C,) values as bars from zero; neighbours share a bar if there are many."""
    low, high = envelope(values, edges(len(values), MAX_BARS))
    cells = np.stack([np.where(low > 0, 0, low), np.where(high < 0, 0, high)])
    finite = cells[np.isfinite(cells)]
    each = "one bar per channel" if len(values) <= MAX_BARS else "each bar is the range of neighbouring channels"
    span = f"from {finite.min():.3g} to {finite.max():.3g}" if finite.size else "no finite value"
    notes = [*notes, f"no time axis: {each}", span]
    return Picture(key, shape, "bars", cells, len(values), 1, warning=count_bad(values), notes=tuple(notes))


def is_blank(tensor: Tensor) -> bool:
    """Returns whether a tensor is empty or on the meta device."""
    return not tensor.numel() or has_no_values(tensor)


def as_map(tensor: Tensor, axes: Axes) -> tuple[Array, list[str]]:
    """Returns one input's output as (C, T) numbers, and notes on the conversion."""
    notes = ["magnitudes of complex values"] if tensor.is_complex() else []
    array: Array = real_values(tensor.detach()).cpu().numpy()
    if array.ndim < 2 or axes.time is None or axes.channel is None:
        return array.reshape(-1, 1), notes
    if axes.time != -1:
        notes.append(f"time is axis {axes.time}" if axes.timed else f"axis {axes.time} taken as time")
    elif not axes.timed:
        notes.append("last axis taken as time")
    if array.ndim > 2:
        notes.append("other axes joined")
    array = np.moveaxis(array, (axes.channel, axes.time), (0, -1))
    return array.reshape(-1, array.shape[-1]), notes


def _nothing(key: str, tensor: Tensor, note: str) -> Picture:
    return Picture(key, tuple(tensor.shape), "nothing", np.zeros((0, 0)), notes=(note,))


def _map(
    key: str,
    shape: tuple[int, ...],
    values: Array,
    rows: int,
    columns: int,
    axis: TimeAxis,
    extent: tuple[float, float] | None,
    notes: list[str],
    noun: str = "frame",
) -> Picture:
    part, shown = axis.visible(extent, values.shape[1])
    notes, within = [*notes, *shown_note(noun, part, values.shape[1])], values[:, part]
    if not within.shape[1]:
        return Picture(key, shape, "nothing", within, notes=(f"it has no {noun}s in the span.",))
    cells = shrink(within, rows, axis.columns_for(shown, columns))
    limit, side = colour_limit(cells.values), side_of(values)
    notes = [*notes, *cells.notes]
    if axis.has_timeline and extent is None:
        notes.append("not on the time axis: drawn over its own frames")
    notes.append(_range(cells.values, limit, side))
    warning = _bad_of(values, within)
    return Picture(
        key, shape, "map", cells.values, len(values), within.shape[1], limit, warning, shown, tuple(notes), side
    )


def shown_note(noun: str, part: slice, count: int) -> list[str]:
    """Returns a note with the frames that are shown, unless all are."""
    if part == slice(0, count):
        return []
    return [f"{noun}s {part.start:,} to {part.stop - 1:,}" if part.stop - part.start > 1 else f"{noun} {part.start:,}"]


def _bad_of(values: Array, shown: Array) -> str:
    """Returns the counts of NaN and Inf as text, with the counts in the shown part."""
    warning, inside = count_bad(values), count_bad(shown)
    if not warning or shown.size == values.size:
        return warning
    return f"{warning} ({'all' if inside == warning else inside or 'none'} in the span)"


def _range(cells: Array, limit: float, side: int) -> str:
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return "no finite value"
    peak = float(np.abs(finite).max())
    return f"colour {scale_text(limit, side)}, peak {peak:.3g}" if peak else "all zero"
