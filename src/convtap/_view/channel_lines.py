"""Draws single channels of one output, each as its own small line, all with the same scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
from convtap._tensors.nested import walk_tensors
from convtap._view import draw
from convtap._view.cells import BLUE, Array, finite_range, shortened
from convtap._view.outputs import CapturedOutputs, checked_count
from convtap._view.pictures import MAX_BARS, as_map, bars, is_blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 4
_HEIGHT, _STEP = 54, 76


def one_map(outputs: CapturedOutputs, layer: str, sample: int) -> tuple[str, Array]:
    """Returns one call's output for one input, as (C, T), after a title: its key, and the axis that was assumed."""
    if not isinstance(layer, str):
        raise InvalidType(f"layer is a {type(layer).__name__}, and it must be one layer's name or a call key.")
    found, row = outputs.locate(sample)
    here = {call.key: call for call in found.calls}
    name = outputs.log.resolve(layer)
    calls = [here[layer]] if layer in here else [call for call in found.calls if call.name == name]
    if not calls:
        raise LayerNotFound(
            f"no output of sample {sample} is named {layer!r}. Its forward pass has {listed(here)}."
            f"{did_you_mean(layer, list(here))}"
        )
    if len(calls) > 1:
        raise AmbiguousCall(
            f"{layer!r} ran {len(calls)} times in the forward pass of sample {sample}. Draw one of these calls: "
            f"{listed([repr(call.key) for call in calls])}."
        )
    tensors = list(walk_tensors(calls[0].output))
    if len(tensors) != 1:
        raise Unsupported(
            f"{layer!r} returns {len(tensors)} tensors, and channels draws one. Draw them with acts.plot()."
        )
    (path, tensor), key = tensors[0], calls[0].key
    axes = outputs.axes(calls[0], path, tensor)
    one = found.cut(key, tensor, row, axes.batch)
    if is_blank(one):
        raise Unsupported(f"{key!r} has no values to draw: its shape is {tuple(one.shape)}.")
    values, notes = as_map(one, axes)
    return " · ".join([key, *(note for note in notes if "taken as" in note)]), values


def small_multiples(title: str, values: Array, channels: Any) -> Figure:
    """Draws some channels of a (C, T) map, or all of one frame as bars."""
    count, frames = values.shape
    shown = _numbers(channels, count)
    if frames == 1:
        return _bars(title, values[:, 0])
    lines = -(-len(shown) // _ACROSS)
    figure = draw.new_figure(draw.WIDTH, 34 + lines * _STEP + 22)
    in_a_row = len(shown) > 1 and shown == list(range(shown[0], shown[0] + len(shown)))
    which = f"{shown[0]}–{shown[-1]}" if in_a_row else listed([str(number) for number in shown])
    which = f"all {count:,} channels" if len(shown) == count else f"channels {which} of {count:,}"
    text = f"{shortened(title, 70)}  ({count:,}, {frames:,})  ·  {which}, one scale"
    draw.write(figure, 20, 18, text, weight="bold")
    low, high = finite_range(values[shown])
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    width = (draw.WIDTH - 50) // _ACROSS
    for position, channel in enumerate(shown):
        line, column = divmod(position, _ACROSS)
        axes = draw.place(figure, 46 + column * width, 40 + line * _STEP, width - 16, _HEIGHT)
        draw.draw_line(axes, values[channel], columns=width - 16)
        axes.axhline(0, color=BLUE, lw=0.4)
        axes.set_ylim(low - margin, high + margin)
        draw.whole_ticks(axes, frames, most=4)
        axes.set_title(f"{channel}", fontsize=7, loc="left", pad=2)
        axes.set_title(draw.not_finite(values[channel]), fontsize=7, loc="right", pad=2, color=draw.ALARM)
        axes.locator_params(axis="y", nbins=3)
        axes.tick_params(labelleft=column == 0, labelbottom=position + _ACROSS >= len(shown))
    draw.write(figure, draw.WIDTH // 2, 34 + lines * _STEP + 16, "frame", ha="center", fontsize=7)
    return figure


def _bars(title: str, values: Array) -> Figure:
    count = len(values)
    figure = draw.new_figure(draw.WIDTH, 190)
    draw.write(figure, draw.LEFT, 24, f"{shortened(title, 70)}  ({count:,},)", weight="bold")
    axes = draw.place(figure, draw.LEFT, 30, draw.ACROSS, 120)
    draw.draw_bars(axes, bars(title, (count,), values, []))
    axes.set_xlabel("channel" if count <= MAX_BARS else "channel (each bar the range of neighbours)", fontsize=7)
    return figure


def _numbers(channels: Any, count: int) -> list[int]:
    """Reads which channels to draw: the first so many, or some by number."""
    if isinstance(channels, (int, np.integer)) and not isinstance(channels, bool):
        return list(range(min(count, checked_count("channels", channels))))
    if isinstance(channels, (bool, str)) or not isinstance(channels, Iterable):
        raise InvalidType(f"channels is {brief(channels)}. Pass how many, or which: channels=[3, 17].")
    shown = [int(channel) for channel in channels]
    wrong = [channel for channel in shown if not -count <= channel < count]
    if wrong:
        raise OutOfRange(f"there is no channel {wrong[0]}: the layer has {count}, numbered from 0.")
    if not shown:
        raise InvalidValue("channels is empty, so nothing would be drawn. Pass how many, or which: channels=[3, 17].")
    return [channel % count for channel in shown]
