"""Finds the batch, channel and time axes of an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Note: [Which axis is time]
# Assumption: an output is (B, C, T), (B, T, C) or (T, B, C), or has one axis less: (B, C), or (C, T) of a single signal.
# Failure: a tensor does not name its axes. If (B, T, C) is read as (B, C, T), statistics and pictures look plausible but are
#   wrong.
# Choice: convtap asks three sources in this order: the user (``channels_last=``), the timeline, which follows the time axis
#   through the model, and the layer's type (``LayerLayouts``). If the shape contradicts the layer's number of channels, a
#   layout that is not exact, such as that of the result of ``reduce``, is transposed. If no source knows, convtap assumes
#   (B, C, T), and ``Axes`` marks it as assumed, so that views can say so.


class Layout(NamedTuple):
    """The order of the axes in a layer's output.

    Attributes:
        last: whether channels are the last axis, (B, T, C), instead of axis 1, (B, C, T).
        batch: the batch axis: 0, or 1 for (T, B, C).
        channels: the number of channels, or None if the layer does not tell.
        exact: whether the output is the layer's own, and not computed from it.
        sure: whether the layout is known, not guessed.
    """

    last: bool = False
    batch: int = 0
    channels: int | None = None
    exact: bool = True
    sure: bool = True


class Axes(NamedTuple):
    """The axes of one input's row of an output, counted from the end.

    Attributes:
        channel: the channel axis, or None if the row has no axes.
        time: the time axis, or None if the row has none, such as (C,).
        batch: the batch axis of the whole output, counted from 0.
        sure: whether the channel axis is known, not assumed.
        timed: whether the time axis is known, not assumed.
    """

    channel: int | None
    time: int | None
    batch: int = 0
    sure: bool = True
    timed: bool = True


def axes_of(shape: Sequence[int], layout: Layout | None, *, batched: bool = True) -> Axes:
    """Returns the axes of an output by its shape. See Note: [Which axis is time].

    Args:
        shape: the shape of the whole output, such as (B, C, T).
        layout: the layer's layout. If it is None, (B, C, T) is assumed.
        batched: whether the output has a batch axis.
    """
    rank = len(shape) - batched
    if rank < 1:
        return Axes(None, None)
    if rank == 1:
        told = layout is None or layout.exact or shape[-1] == layout.channels
        return Axes(-1, None, sure=told, timed=told)
    last, batch, channels, exact, sure = Layout(sure=False) if layout is None else layout
    batch = batch if batched and rank == 2 else 0
    if channels is not None:
        first_fits, last_fits = shape[-rank] == channels, shape[-1] == channels
        if first_fits != last_fits and not batch and (channels > 1 or not exact):
            last = last_fits
        elif not (exact or (first_fits and not last_fits)):  # the shape does not tell how the output was changed
            sure = False
    elif not exact:
        sure = False
    # With more than two axes, time is assumed to be the last axis other than the channels, as usual for signals.
    return Axes(-1 if last else -rank, -2 if last else -1, batch, sure, sure and rank == 2)


def axes_with_time(shape: Sequence[int], dim: int, layout: Layout | None, *, batched: bool = True) -> Axes | None:
    """Returns the axes of an output whose time axis is known.

    Args:
        shape: the shape of the whole output, such as (B, C, T).
        dim: the time axis, counted from the end.
        layout: the layer's layout, or None. It tells the channel axis of an output with more axes.
        batched: whether the output has a batch axis.

    Returns:
        The axes, or None if the output does not have the axis ``dim``.
    """
    rank = len(shape) - batched
    if rank < 2 or not -len(shape) <= dim < 0:
        return None
    if batched and dim == -len(shape):  # (T, B, C)
        return Axes(-1, -rank, batch=1)
    usual = axes_of(shape, layout, batched=batched)
    if rank > 2 and usual.channel != dim:
        return usual._replace(time=dim, batch=0, timed=True)
    return Axes(-1 if dim == -rank else -rank, dim, sure=rank == 2)


def after(axes: Axes, before: Sequence[int], now: Sequence[int]) -> Axes:
    """Returns the axes of a row after a function changed it.

    Args:
        axes: the axes of the row before the function.
        before: the shape of the row before the function, such as (C, T).
        now: the shape of the row after the function.
    """
    if len(now) < 2 or axes.channel is None or axes.time is None:
        is_time = len(now) == 1 and axes.time is not None and now[0] == before[axes.time]
        is_channel = len(now) == 1 and axes.channel is not None and now[0] == before[axes.channel]
        return Axes(None, -1) if is_time and not is_channel else Axes(-1 if now else None, None)
    if len(now) != len(before):
        return Axes(-len(now), -1, sure=False, timed=False)
    channels, frames = before[axes.channel], before[axes.time]
    kept = now[axes.channel] == channels or now[axes.time] == frames
    turned = now[axes.channel] == frames or now[axes.time] == channels
    if turned and not kept:
        return axes._replace(channel=axes.time, time=axes.channel)
    known = kept and not turned
    return axes._replace(sure=axes.sure and known, timed=axes.timed and known)
