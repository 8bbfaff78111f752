"""What overlapping windows and sub-pixel shuffles do to the time axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from convtap._time.axis_count import Affine, Digit, Guess
from convtap._time.mark import Mark, as_axis, normal, resampled, unknown
from convtap._time.operation import Op
from convtap._time.reshape import permuted, reshaped


class _Windows(NamedTuple):
    """The settings of ``fold`` and ``unfold`` along the one of the two axes that has several windows."""

    axis: int  # 0 or 1
    kernel: int
    dilation: int
    padding: int
    stride: int
    inner: int  # how many channels lie between neighbouring places of a window
    total: int

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1


def _windows(sizes: Any, settings: Any) -> _Windows | None:
    found = []
    for i in (0, 1):
        kernel, dilation, padding, stride = (int(setting[i]) for setting in settings)
        inner = int(settings[0][1]) if i == 0 else 1
        total = (int(sizes[i]) + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        found.append(_Windows(i, kernel, dilation, padding, stride, inner, total))
    several = [one for one in found if one.total > 1]
    return several[0] if len(several) == 1 else None


def fold(op: Op, mark: Mark) -> Mark:
    """``col2im(input, sizes, kernel, dilation, padding, stride)``: windows (B, C·kernel, windows) are added up."""
    last, channel, batch = op.rank - 1, op.rank - 2, op.rank - 3
    one = _windows(op.args[1], op.args[2:6])
    windows, places = mark.on(last), mark.on(channel)
    if one is None or windows is None or windows.inner > 1 or len(mark.digits) > 1 + (places is not None):
        return unknown(f"{op.what}: windows along two axes, or along another one than time")
    size = int(op.args[1][one.axis])
    step = Guess(op.what, one.total, Affine(one.stride, size - one.stride * one.total, 1))
    dim = batch + 2 + one.axis
    if places is None:
        if one.dilation > 1 or one.kernel < one.stride:
            return unknown(f"{op.what}: windows with gaps")
        first = (1, one.padding - one.extent + one.stride, one.stride)
        found = resampled(mark, last, first, (1, one.padding, one.stride), size, step)
        return found.moved(lambda old: dim if old == last else old)
    unit = places.weight // one.dilation
    even = (places.weight, windows.weight) == (unit * one.dilation, unit * one.stride)
    if not even or (places.inner, places.size) != (one.inner, one.kernel):
        return unknown(f"{op.what}: frames are added to others than those they came from")
    whole = Digit(dim, size, 1, unit, windows.count.then(step))
    return normal(replace(mark.spread(-one.padding * unit, one.padding * unit), digits=(whole,))).within(size)


def unfold(op: Op, mark: Mark) -> Mark:
    """``im2col(input, kernel, dilation, padding, stride)``: windows of (B, C, H, W) as (B, C·kernel, windows)."""
    batch = op.rank - 4
    one = _windows(op.shape[-2:], op.args[1:5])
    dim = -1 if one is None else batch + 2 + one.axis
    axis = as_axis(mark, dim, op.shape[dim], op.what)
    if one is None or axis.unknown or len(axis.digits) > 1:
        return unknown(f"{op.what}: windows along two axes, or along another one than time")
    axis = normal(axis.looks(dim, "padding"))
    step = Affine(1, 2 * one.padding - one.extent + one.stride, one.stride)
    windows = Digit(batch + 2, one.total, 1, one.stride, axis.digits[0].count.then(step))
    places = Digit(batch + 1, one.kernel, one.inner, one.dilation)
    return replace(axis.spread(one.padding, -one.padding), digits=(windows, places))


def shuffle(op: Op, mark: Mark) -> Mark:
    """``pixel_shuffle(input, factor)`` and its inverse, as the views that they are made of."""
    factor = int(op.args[1])
    *batch, channels, height, width = op.shape
    if op.name == "pixel_shuffle":
        split = (*batch, channels // factor**2, factor, factor, height, width)
        order = (0, 3, 1, 4, 2)
    else:
        split = (*batch, channels, height // factor, factor, width // factor, factor)
        order = (0, 2, 4, 1, 3)
    order = (*range(len(batch)), *(len(batch) + place for place in order))
    found = permuted(reshaped(mark, op.shape, split, op.what), order)
    return reshaped(found, [split[place] for place in order], tuple(op.out.shape), op.what)
