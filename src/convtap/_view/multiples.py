"""Small multiples: single channels of one output, each as its own line, all with the same scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import (
    InvalidType,
    InvalidValue,
    LayerNotFound,
    OutOfRange,
    Unsupported,
    brief,
    did_you_mean,
    listed,
)
from convtap._result.activations import Activations, log_of
from convtap._tensors.nested import walk_tensors
from convtap._view import draw as _draw
from convtap._view.cells import Array
from convtap._view.choose import Chosen, one_input, pass_of
from convtap._view.labels import shortened
from convtap._view.orient import Orientation
from convtap._view.pictures import MAX_BARS, Picture, as_map, bar_cells
from convtap._view.timeaxis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convtap._result.activations import Activations

_ACROSS = 4
_HEIGHT, _STEP = 54, 76


def one_map(
    acts: Activations, layer: str, sample: int, timeline: Any = None, channels_last: bool | Chosen = None
) -> tuple[str, Array]:
    """One call's output for one input, as (C, T), and its key."""
    if not isinstance(layer, str):
        raise InvalidType(f"layer is a {type(layer).__name__}, and it must be one layer's name or a call key.")
    acts.calls()
    row, found = pass_of(acts, sample)
    here = {call.key: call for call in found.calls}
    call = here.get(layer)
    if call is None:
        resolved = log_of(acts).resolve(layer)
        calls = [call for call in found.calls if call.name == resolved]
        if len(calls) > 1:
            acts[layer]  # raises AmbiguousCall, which says what to write
        if not calls:
            raise LayerNotFound(
                f"no output of sample {sample} is named {layer!r}. Its forward pass has {listed(here)}."
                f"{did_you_mean(layer, list(here))}"
            )
        call = calls[0]
    tensors = list(walk_tensors(call.output))
    if len(tensors) != 1:
        raise Unsupported(
            f"{layer!r} returns {len(tensors)} tensors, and channels draws one. Draw them with acts.plot()."
        )
    path, tensor = tensors[0]
    axes = Orientation(acts, TimeAxis(timeline, None, has_signal=False), channels_last).axes(call, path, tensor)
    cut = one_input(found, call.key, tensor, row, axes.batch)
    if not cut.numel() or cut.device.type == "meta":
        raise Unsupported(f"{call.key!r} has no values to draw: its shape is {tuple(cut.shape)}.")
    values, notes = as_map(cut, axes)
    return " · ".join([call.key, *(note for note in notes if "taken as" in note)]), values


def small_multiples(key: str, values: Array, channels: Any) -> Figure:
    """Draws some channels of a (C, T) map."""
    count, frames = values.shape
    shown = _numbers(channels, count)
    if frames == 1:
        return _bars(key, values[:, 0], count)
    lines = -(-len(shown) // _ACROSS)
    figure = _draw.new_figure(_draw.WIDTH, 34 + lines * _STEP + 22)
    which = f"all {count:,} channels" if len(shown) == count else f"channels {_runs(shown)} of {count:,}"
    title = f"{shortened(key, 70)}  ({count:,}, {frames:,})  ·  {which}, one scale"
    _draw.write(figure, 20, 18, title, weight="bold")
    limits = _limits(values[shown])
    width = (_draw.WIDTH - 50) // _ACROSS
    for position, channel in enumerate(shown):
        line, column = divmod(position, _ACROSS)
        axes = _draw.place(figure, 46 + column * width, 40 + line * _STEP, width - 16, _HEIGHT)
        _draw.draw_line(axes, values[channel], (-0.5, frames - 0.5), columns=width - 16)
        axes.axhline(0, color=_draw.BLUE, lw=0.4)
        axes.set_ylim(limits)
        _draw.whole_ticks(axes, frames, most=4)
        bad = int((~np.isfinite(values[channel])).sum())
        axes.set_title(f"{channel}", fontsize=7, loc="left", pad=2)
        if bad:
            axes.set_title(f"{bad:,} NaN or Inf", fontsize=7, loc="right", pad=2, color=_draw.ALARM)
        axes.locator_params(axis="y", nbins=3)
        last = position + _ACROSS >= len(shown)
        axes.tick_params(labelleft=column == 0, labelbottom=last)
    _draw.write(figure, _draw.WIDTH // 2, 34 + lines * _STEP + 16, "frame", ha="center", fontsize=7)
    return figure


def _runs(numbers: list[int]) -> str:
    """Writes numbers: ``0–63``, or ``3, 17, …``."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}–{numbers[-1]}"
    return listed([str(number) for number in numbers])


def _bars(key: str, values: Array, count: int) -> Figure:
    figure = _draw.new_figure(_draw.WIDTH, 190)
    picture = Picture(key, (count,), "bars", bar_cells(values), count)
    _draw.write(figure, _draw.LEFT, 24, f"{shortened(key, 70)}  ({count:,},)", weight="bold")
    axes = _draw.place(figure, _draw.LEFT, 30, _draw.ACROSS, 120)
    _draw.draw_bars(axes, picture)
    axes.set_xlabel("channel" if count <= MAX_BARS else "channel (each bar the range of neighbours)", fontsize=7)
    return figure


def _limits(values: Array) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def _numbers(channels: Any, count: int) -> list[int]:
    """Which channels are meant: a number of them, or some of them by number."""
    if isinstance(channels, (int, np.integer)) and not isinstance(channels, bool):
        if channels < 1:
            raise InvalidValue(f"channels={channels} leaves nothing to draw. Write for example channels=64.")
        return list(range(min(count, int(channels))))
    if isinstance(channels, (bool, str)) or not isinstance(channels, Iterable):
        raise InvalidType(f"channels is {brief(channels)}. Pass how many, or which: channels=[3, 17].")
    shown = [int(channel) for channel in channels]
    wrong = [channel for channel in shown if not -count <= channel < count]
    if wrong:
        raise OutOfRange(f"there is no channel {wrong[0]}: the layer has {count}, numbered from 0.")
    if not shown:
        raise InvalidValue("channels is empty, so nothing would be drawn. Pass how many, or which: channels=[3, 17].")
    return [channel % count for channel in shown]
