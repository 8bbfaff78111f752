"""Draws single channels of one output as small lines with the same scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convtap._errors import (
    AmbiguousCall,
    InvalidType,
    InvalidValue,
    LayerNotFound,
    OutOfRange,
    Unsupported,
    brief,
    did_you_mean,
    listed,
)
from convtap._result.call import Call
from convtap._tensors.nested import walk_tensors
from convtap._view import draw
from convtap._view.cells import BLUE, Array, finite_range, shortened
from convtap._view.outputs import CapturedOutputs, checked_count
from convtap._view.pictures import MAX_BARS, Picture, as_map, bars, is_blank, shown_note, signal_picture
from convtap._view.signal import one_signal
from convtap._view.time_axis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 4
_HEIGHT, _STEP, _TOP, _FOOT = 54, 76, 40, 22


class Channels(NamedTuple):
    """The output of one call for one input, with its place on the time axis.

    Attributes:
        title: the key of the call, and the axis that was assumed.
        frames: the number of frames of the output.
        values: the part of the output in the span, (C, T).
        extent: the start and end of that part on the time axis, or None if its place is unknown.
        notes: a note on the part that is shown.
        signal: the input to draw above the channels, or None.
    """

    title: str
    frames: int
    values: Array
    extent: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    signal: Picture | None = None


def one_map(outputs: CapturedOutputs, layer: str, sample: int, signal: Any = None) -> Channels:
    """Returns one call's output for one input, with the signal of that input."""
    found, row = outputs.locate(sample)
    call, axis = _one_call(outputs, layer, sample), outputs.axis
    tensors = list(walk_tensors(call.output))
    if len(tensors) != 1:
        raise Unsupported(
            f"{layer!r} returns {len(tensors)} tensors, but channels draws a single tensor. Draw all with acts.plot()."
        )
    (path, tensor), key = tensors[0], call.key
    axes = outputs.axes(call, path, tensor)
    one = found.cut(key, tensor, row, axes.batch)
    if is_blank(one):
        raise Unsupported(f"{key!r} has no values to draw: its shape is {tuple(one.shape)}. Choose another layer.")
    values, notes = as_map(one, axes)
    frames = values.shape[1]
    extent = axis.extent(outputs.place(call), path, frames) if frames > 1 else None
    if axis.span is not None and extent is None:
        raise Unsupported(
            f"span={axis.span} does not apply to {key!r}: its place on the time axis is unknown. Remove span to draw all of "
            "its frames."
        )
    given = None if signal is None else one_signal(outputs, signal, sample)
    axis.widen(extent, None if given is None else axis.signal_extent(given.shape[1]))
    axis.check_span(found.shape)
    part, extent = axis.visible(extent, frames)
    title = " · ".join([key, *(note for note in notes if "taken as" in note)])
    panel = None if given is None else signal_picture(given, draw.COLUMNS // _ACROSS, axis)
    return Channels(title, frames, values[:, part], extent, tuple(shown_note("frame", part, frames)), panel)


def _one_call(outputs: CapturedOutputs, layer: str, sample: int) -> Call:
    """Returns the call of a layer in the forward pass of one input."""
    if not isinstance(layer, str):
        raise InvalidType(
            f"layer is a {type(layer).__name__}, not a string. Pass a layer's name or a call key, such as 'conv#1'."
        )
    found, _ = outputs.locate(sample)
    here = {call.key: call for call in found.calls}
    name = outputs.log.resolve(layer)
    calls = [here[layer]] if layer in here else [call for call in found.calls if call.name == name]
    if not calls:
        raise LayerNotFound(
            f"sample {sample} has no output {layer!r}. Its forward pass has {listed(here)}."
            f"{did_you_mean(layer, list(here))}"
        )
    if len(calls) > 1:
        raise AmbiguousCall(
            f"{layer!r} ran {len(calls)} times in the forward pass of sample {sample}. Pass the key of one call: "
            f"{listed([repr(call.key) for call in calls])}."
        )
    return calls[0]


def small_multiples(found: Channels, channels: Any, axis: TimeAxis) -> Figure:
    """Draws channels as lines below the signal, or as bars if they have one frame."""
    count, frames = found.values.shape
    shown = _numbers(channels, count)
    if frames == 1 and found.extent is None:
        return _bars(found, axis)
    if not frames:
        raise Unsupported(f"{found.title!r} has no frames in span={axis.span}. Choose another span.")
    across = min(_ACROSS, len(shown))
    lines, above = -(-len(shown) // across), _signal_height(found)
    height = _TOP + above + lines * _STEP + _FOOT
    figure = draw.new_figure(draw.WIDTH, height, "Draw fewer channels: channels=range(0, 64).")
    draw.write(figure, 20, 18, _headline(found, shown), weight="bold")
    low, high = finite_range(found.values[shown])
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    width = (draw.WIDTH - 44) // across
    for column in range(across if found.signal is not None else 0):
        _draw_signal(figure, found, 46 + column * width, width - 26, column == 0, axis)
    for position, channel in enumerate(shown):
        line, column = divmod(position, across)
        axes = draw.place(figure, 46 + column * width, _TOP + above + line * _STEP, width - 26, _HEIGHT)
        draw.draw_line(axes, found.values[channel], found.extent, columns=width - 26)
        axes.axhline(0, color=BLUE, lw=0.4)
        axes.set_ylim(low - margin, high + margin)
        _ticks(axes, found.extent, frames, 8 // across + 2, axis)
        axes.set_title(f"{channel}", fontsize=7, loc="left", pad=2)
        axes.set_title(draw.not_finite(found.values[channel]), fontsize=7, loc="right", pad=2, color=draw.ALARM)
        axes.locator_params(axis="y", nbins=3)
        axes.tick_params(labelleft=column == 0, labelbottom=position + across >= len(shown))
    unit = "frame" if found.extent is None else f"time in {axis.unit}"
    draw.write(figure, draw.WIDTH // 2, height - 6, unit, ha="center", fontsize=7)
    return figure


def _headline(found: Channels, shown: list[int]) -> str:
    count = len(found.values)
    in_a_row = len(shown) > 1 and shown == list(range(shown[0], shown[0] + len(shown)))
    which = f"{shown[0]}–{shown[-1]}" if in_a_row else listed([str(number) for number in shown])
    which = f"all {count:,} channels" if len(shown) == count else f"channels {which} of {count:,}"
    return "  ·  ".join(
        [f"{shortened(found.title, 70)}  ({count:,}, {found.frames:,})", *found.notes, which, "one scale"]
    )


def _ticks(axes: Axes, extent: tuple[float, float] | None, frames: int, most: int, axis: TimeAxis) -> None:
    """Sets the ticks of small axes, in time if the place is known, else in frames."""
    if extent is None or axis.bounds is None:
        draw.whole_ticks(axes, frames, most=most)
        return
    axes.set_xlim(axis.bounds)
    axes.locator_params(axis="x", nbins=most)


def _signal_height(found: Channels) -> int:
    """Returns the pixel height of the signal with its title and axis numbers."""
    if found.signal is None:
        return 0
    below = 36 if found.extent is None else 24
    return below + (max(_HEIGHT, 24 * found.signal.channels) if found.signal.kind == "lines" else _HEIGHT)


def _draw_signal(figure: Figure, found: Channels, left: int, width: int, is_first: bool, axis: TimeAxis) -> None:
    """Draws the signal above a column of channels."""
    signal = found.signal
    if signal is None or signal.kind == "nothing":
        return
    height = _signal_height(found) - (36 if found.extent is None else 24)
    axes = draw.place(figure, left, _TOP, width, height)
    if signal.kind == "lines":
        draw.draw_lines(axes, signal, width)
    else:
        draw.draw_map(axes, signal)
    _ticks(axes, signal.extent, signal.frames, 6, axis)
    axes.set_title("signal", fontsize=7, loc="left", pad=2, weight="bold")
    warning = draw.not_finite(signal.cells)
    unit = "" if found.extent is not None else axis.short_unit
    axes.set_title(warning or unit, fontsize=7, loc="right", pad=2, color=draw.ALARM if warning else draw.INK)
    axes.tick_params(labelleft=is_first, labelbottom=found.extent is None)


def _bars(found: Channels, axis: TimeAxis) -> Figure:
    title, values = found.title, found.values[:, 0]
    if axis.span is not None or found.signal is not None:
        raise Unsupported(f"{title!r} has no time axis: its channels are drawn as bars. Remove span and signal.")
    count = len(values)
    figure = draw.new_figure(draw.WIDTH, 190)
    draw.write(figure, draw.LEFT, 24, f"{shortened(title, 70)}  ({count:,},)", weight="bold")
    axes = draw.place(figure, draw.LEFT, 30, draw.ACROSS, 120)
    draw.draw_bars(axes, bars(title, (count,), values, []))
    axes.set_xlabel("channel" if count <= MAX_BARS else "channel (each bar is the range of neighbours)", fontsize=7)
    return figure


def _numbers(channels: Any, count: int) -> list[int]:
    """Returns the channels to draw, from their count or from a list of channels."""
    if isinstance(channels, (int, np.integer)) and not isinstance(channels, bool):
        return list(range(min(count, checked_count("channels", channels))))
    if isinstance(channels, (bool, str)) or not isinstance(channels, Iterable):
        raise InvalidType(
            f"channels is {brief(channels)}, not a number or a list. Pass channels=64, or channels=[3, 17]."
        )
    shown = [int(channel) for channel in channels]
    wrong = [channel for channel in shown if not -count <= channel < count]
    if wrong:
        raise OutOfRange(
            f"channel {wrong[0]} does not exist: the layer has {count} channels. Pass numbers from 0 to {count - 1}."
        )
    if not shown:
        raise InvalidValue("channels is empty. Pass channels=64, or channels=[3, 17].")
    return [channel % count for channel in shown]
