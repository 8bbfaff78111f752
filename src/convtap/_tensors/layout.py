"""Finds the batch, channel and time axes of an output, from the layout of its layer and from its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Note: [Which axis is time]
# Assumption: an output is (B, C, T), (B, T, C) or (T, B, C), or has one axis less: (B, C), or (C, T) of a single signal.
# Failure: nothing in a tensor says which. Statistics and pictures of (B, T, C) that are read as (B, C, T) look as good as the
#   right ones.
# Choice: whoever knows is asked, in this order: the user (``channels_last=``), the timeline, which follows the time axis
#   through the model, and the layer's type (``LayerLayouts``). A count of channels that the shape contradicts turns a
#   layout that is not exact, such as that of what ``reduce`` made of an output. If none of them knows, it is (B, C, T), and
#   ``Axes`` says so, so that whoever shows something of it says what was assumed.


class Layout(NamedTuple):
    """Where a layer puts the axes of its output.

    Attributes:
        last: whether channels are on the last axis, (B, T, C); else they are axis 1, (B, C, T).
        batch: which axis is the inputs: 0, or 1 for (T, B, C).
        channels: how many channels there are, if the layer says it.
        exact: whether the output is the layer's own, and nothing that was made of it.
        sure: whether it is known, and not a guess.
    """

    last: bool = False
    batch: int = 0
    channels: int | None = None
    exact: bool = True
    sure: bool = True


class Axes(NamedTuple):
    """Which axis of one input's row of an output is what, counted from the end.

    Attributes:
        channel: the channels; None where there is no axis at all.
        time: the frames; None where the row has none, such as (C,).
        batch: the axis of the whole output that is the inputs, from 0.
        sure: whether the channels are known, and not assumed.
        timed: whether the time is known, and not assumed.
    """

    channel: int | None
    time: int | None
    batch: int = 0
    sure: bool = True
    timed: bool = True


def axes_of(shape: Sequence[int], layout: Layout | None, *, batched: bool = True) -> Axes:
    """Returns which axis is what in an output of some shape. See Note: [Which axis is time].

    Args:
        shape: of the whole output, such as (B, C, T).
        layout: the layer's; None if it is not known, and (B, C, T) is assumed.
        batched: whether one of the axes is the inputs.
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
        elif not (exact or (first_fits and not last_fits)):  # nothing tells what was made of the output
            sure = False
    elif not exact:
        sure = False
    # of more than two axes, the time is the last one but the channels: that is how signals are laid out, and no rule
    return Axes(-1 if last else -rank, -2 if last else -1, batch, sure, sure and rank == 2)


def axes_with_time(shape: Sequence[int], dim: int, layout: Layout | None, *, batched: bool = True) -> Axes | None:
    """Returns which axis is what in an output whose time axis is known, or None if it has no such axis.

    Args:
        shape: of the whole output, such as (B, C, T).
        dim: the axis that is time, counted from the end.
        layout: the layer's, which tells the channels of an output with more axes; None if it is not known.
        batched: whether one of the axes is the inputs.
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
    """Returns which axis is what in a row that a function made of another row.

    Args:
        axes: those of the row before.
        before: the shape of the row before, such as (C, T).
        now: its shape now.
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
