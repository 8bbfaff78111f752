"""What is to be drawn of a capture: for one input, each call's cells, where they lie on the time axis, and what to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from convtap._errors import LayerNotFound, Unsupported, listed
from convtap._result.call import shown_value
from convtap._tensors.layout import Axes
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import real_values
from convtap._view.cells import Array, Cells, colour_limit, edges, envelope, shrink
from convtap._view.choose import Chosen, chosen, one_input, pass_of
from convtap._view.labels import counted
from convtap._view.orient import Orientation
from convtap._view.timeaxis import Place, TimeAxis

if TYPE_CHECKING:
    from convtap._result.activations import Activations


#: More channels of a signal than this are drawn as a map, not as lines.
MAX_LINES = 8

#: Columns with a value that is no number, up to which each gets a mark above it; more are seen without.
MAX_MARKS = 60

#: More bars than this are drawn as ranges of neighbouring channels.
MAX_BARS = 256


@dataclass(frozen=True)
class Picture:
    """One call's output for one input, ready to be drawn.

    Attributes:
        key: the call.
        shape: the shape of the output for this input, such as (C, T).
        kind: a map over time; bars, where there is no time axis; or nothing, where only the note can be shown.
        cells: the map's cells; for bars two rows, the lower and the upper ends.
        channels: how many channels there are.
        frames: how many frames (1 for bars).
        limit: the magnitude that gets the full colour.
        bad: how many values are NaN, and how many Inf.
        extent: where the map begins and ends on the time axis, in its unit, or None if it has no place on it.
        notes: what else to say about it.
    """

    key: str
    shape: tuple[int, ...]
    kind: Literal["map", "bars", "nothing"]
    cells: Array
    channels: int = 0
    frames: int = 0
    limit: float = 1.0
    bad: tuple[int, int] = (0, 0)
    extent: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """How much of it is no number, or nothing."""
        return counted(self.bad)


def pictures(
    acts: Activations,
    sample: int,
    layers: Chosen,
    *,
    rows: int,
    columns: int,
    axis: TimeAxis,
    orientation: Orientation,
    most: int | None = None,
) -> tuple[list[Picture], int]:
    """Prepares what is drawn of each chosen call for one input, one call at a time, and counts the calls there are.

    Raises:
        NotCaptured: there are no outputs.
        LayerNotFound: ``layers`` names nothing that is here, or nothing that ran on this input.
        OutOfRange: there is no such input.
    """
    calls = chosen(acts, layers)
    position, found = pass_of(acts, sample)
    within = {id(call) for call in found.calls}
    here = [call for call in calls if id(call) in within]
    if not here:
        raise LayerNotFound(
            f"{listed([call.key for call in calls])}: captured, but not in the forward pass of sample {sample}. "
            f"That pass has {listed([call.key for call in found.calls])}."
        )
    places = [(call, orientation.place(call)) for call in here[:most]]
    for call, place in places:
        for path, tensor in walk_tensors(shown_value(call)):
            axis.widen(axis.extent(place, path, orientation.frames(call, path, tensor)))
    drawn: list[Picture] = []
    for call, place in places:
        for path, tensor in walk_tensors(call.output):
            key = f"{call.key}{path}"
            axes = orientation.axes(call, path, tensor)
            try:
                cut = one_input(found, key, tensor, position, axes.batch)
            except Unsupported as error:
                note = str(error).partition(". ")[0] + "."
                drawn.append(Picture(key, tuple(tensor.shape), "nothing", np.zeros((0, 0)), notes=(note,)))
                continue
            drawn.append(_picture(key, path, cut, axes, place, rows, columns, axis))
    return drawn, len(here)


# -- one output


def _picture(
    key: str, path: str, tensor: Tensor, axes: Axes, place: Place, rows: int, columns: int, axis: TimeAxis
) -> Picture:
    shape = tuple(tensor.shape)
    if not tensor.numel() or tensor.device.type == "meta":
        why = "it has no values (meta device)." if tensor.numel() else "it is empty."
        return Picture(key, shape, "nothing", np.zeros((0, 0)), notes=(why,))
    values, notes = as_map(tensor, axes)
    channels, frames = values.shape
    bad = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    if frames == 1:
        each = "one bar a channel" if channels <= MAX_BARS else "each bar the range of neighbouring channels"
        notes.append(f"no time axis: {each}")
        cells = bar_cells(values[:, 0])
        finite = cells[np.isfinite(cells)]
        notes.append(f"from {finite.min():.3g} to {finite.max():.3g}" if finite.size else "no finite value")
        return Picture(key, shape, "bars", cells, channels, 1, bad=bad, notes=tuple(notes))
    return _map(key, shape, values, rows, columns, axis, axis.extent(place, path, frames), bad, notes)


def signal_map(values: Array, rows: int, columns: int, axis: TimeAxis) -> Picture:
    """A signal of many channels, (C, T), as a map."""
    bad = (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    extent = axis.signal_extent(values.shape[1])
    return _map("signal", values.shape, values, rows, columns, axis, extent, bad, [])


def _map(
    key: str,
    shape: tuple[int, ...],
    values: Array,
    rows: int,
    columns: int,
    axis: TimeAxis,
    extent: tuple[float, float] | None,
    bad: tuple[int, int],
    notes: list[str],
) -> Picture:
    channels, frames = values.shape
    cells = shrink(values, rows, axis.columns_for(extent, columns))
    notes.extend(_shrunk(cells))
    if axis.has_timeline and extent is None:
        notes.append("not on the time axis: drawn over its own frames")
    limit = colour_limit(cells.values)
    notes.append(_range(cells.values, limit))
    return Picture(key, shape, "map", cells.values, channels, frames, limit, bad, extent, tuple(notes))


def as_map(tensor: Tensor, axes: Axes) -> tuple[Array, list[str]]:
    """One input's output as (C, T) numbers, and what was done to make it that.

    Args:
        tensor: the output, without batch axis.
        axes: which of its axes is what; what is assumed of them is in the note.
    """
    notes = []
    if tensor.is_complex():
        notes.append("magnitudes of complex values")
    array: Array = real_values(tensor.detach()).cpu().numpy()
    if array.ndim < 2 or axes.time is None or axes.channel is None:
        return array.reshape(-1, 1), notes
    if axes.time != -1:
        notes.append(f"time is its axis {axes.time}" if axes.timed else f"its axis {axes.time} taken as time")
    elif not axes.timed:
        notes.append("its last axis taken as time")
    if array.ndim > 2:
        notes.append("its other axes joined")
    array = np.moveaxis(array, (axes.channel, axes.time), (0, -1))
    return array.reshape(-1, array.shape[-1]), notes


def bar_cells(values: Array) -> Array:
    """The lower and upper ends of bars from zero; of more than MAX_BARS values neighbours share one, with their range."""
    low, high = envelope(values, edges(len(values), MAX_BARS))
    return np.stack([np.where(low > 0, 0, low), np.where(high < 0, 0, high)])


def _shrunk(cells: Cells) -> list[str]:
    notes = []
    if cells.channels_per_row > 1:
        notes.append(f"{cells.channels_per_row} channels a row")
    if cells.frames_per_pair:
        notes.append(f"min and max of {cells.frames_per_pair:,} frames")
    return notes


def _range(cells: Array, limit: float) -> str:
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        return "no finite value"
    peak = float(np.abs(finite).max())
    if not peak:
        return "all zero"
    return f"colour ±{limit:.3g}, peak {peak:.3g}"
