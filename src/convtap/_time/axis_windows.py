"""What windows do to the time axis: convolution, pooling, padding and resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from convtap._errors import InvalidValue
from convtap._time.axis import IDENTITY
from convtap._time.axis_count import Affine, CeilPool, Fixed, Guess
from convtap._time.axis_op import Op
from convtap._time.mark import Mark, as_axis, reduced, resampled, unknown, windowed


def _one(value: Any, index: int, default: int = 0) -> int:
    """Reads a setting that is given once for all axes, or once an axis."""
    if isinstance(value, (list, tuple)):
        return int(value[index] if len(value) > 1 else value[0]) if value else default
    return default if value is None else int(value)


def _spatial(op: Op, mark: Mark, axes: int, each: Callable[[Mark, int, int, int], Mark]) -> Mark:
    """Applies a rule along each of the last ``axes`` axes that time lies on; it is given axis, size and place in settings."""
    shape = op.shape
    for dim in sorted(mark.dims):
        index = dim - (len(shape) - axes)
        if index < 0:
            continue
        axis = as_axis(mark, dim, shape[dim])
        if axis is None:
            return unknown(f"{op.what}: time shares the axis with something else")
        mark = each(axis, dim, shape[dim], index)
        if mark.unknown:
            return mark
    return mark


# -- windows


def convolution(op: Op) -> Mark | None:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    weight = op.args[1]
    axes = weight.dim() - 2
    channel = op.rank - axes - 1
    if _is_signal(op, mark) and (channel in mark.dims or (0 in mark.dims and op.time_dim == 0)):
        raise _off_axis(op, channel if channel in mark.dims else 0, channel)
    if channel in mark.dims:
        folded = _from_channels(op, mark, channel)
        if folded.unknown or not folded.digits:
            return folded
        mark = folded
    stride, padding, dilation = op.arg(3), op.arg(4), op.arg(5)
    transposed, extra = op.arg(6), op.arg(7)

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        kernel = int(weight.shape[2 + index])
        s, p, d = _one(stride, index), _one(padding, index), _one(dilation, index)
        if transposed:
            return _transposed(op, mark, dim, kernel, s, p, d, _one(extra, index))
        return _slide(op, mark, dim, kernel, s, p, d, zeros=True)

    return _spatial(op, mark, axes, each)


def _is_signal(op: Op, mark: Mark) -> bool:
    """Whether a tensor has the frames of the model's input as they are, each a sample, on one axis."""
    return op.time_dim is not None and len(mark.digits) == 1 and mark.first == mark.last == IDENTITY


def _off_axis(op: Op, dim: int, channel: int) -> InvalidValue:
    """A first convolution to which the time axis is not time."""
    kind = "channel" if dim == channel else "batch"
    other = "time_dim=1 for (B, T, C)" if op.time_dim == op.rank - 1 else "time_dim=-1 for (B, C, T)"
    return InvalidValue(
        f"time_dim says that axis {op.time_dim} of the model's input is time, and that makes time the {kind} axis of "
        f"{op.module!r}, whose input is {op.shape}. Pass the axis that is time: {other}."
    )


def _from_channels(op: Op, mark: Mark, channel: int) -> Mark:
    """The mark of a convolution's sum over channels that hold frames, as after framing or a fold into patches."""
    groups, channels, out = int(op.arg(8, default=1)), op.shape[channel], int(op.out.shape[channel])
    if groups == 1:
        return reduced(mark, [channel], op.what, mixes=True)
    digit = mark.on(channel)
    if groups == channels and digit is not None:
        times = out // channels
        moved = replace(digit, inner=digit.inner * times)
        return replace(mark, digits=tuple(moved if one is digit else one for one in mark.digits))
    return unknown(f"{op.what}: its {groups} groups of channels hold frames")


def _slide(
    op: Op, mark: Mark, dim: int, kernel: int, stride: int, padding: int, dilation: int, *, zeros: bool = False
) -> Mark:
    extent = dilation * (kernel - 1) + 1
    digit = mark.on(dim)
    assert digit is not None
    for last in reversed(digit.count.steps):
        if not isinstance(last, Guess):
            break
        last.aligns(extent - 2 * padding, stride)
    step = Affine(1, 2 * padding - extent + stride, stride)
    size = step(digit.size)
    return windowed(
        mark, dim, stride=stride, before=padding, taps=kernel, dilation=dilation, size=size, step=step, zeros=zeros
    )


def _transposed(
    op: Op, mark: Mark, dim: int, kernel: int, stride: int, padding: int, dilation: int, extra: int
) -> Mark:
    """Output frame y comes from input frame i where y + padding - i·stride is one of 0, dilation, … (kernel - 1)·dilation."""
    if dilation > 1 and stride > 1:
        return unknown(f"{op.what}: a transposed convolution with stride {stride} and dilation {dilation}")
    reach = dilation * (kernel - 1)
    step = Affine(stride, reach + extra + 1 - stride - 2 * padding, 1)
    if kernel < stride:
        return unknown(
            f"{op.what}: a transposed convolution with kernel {kernel} under its stride {stride} leaves gaps"
        )
    first = (1, padding - reach + stride - 1, stride)
    digit = mark.on(dim)
    assert digit is not None
    return resampled(mark, dim, first, (1, padding, stride), step(digit.size), step)


def pool(op: Op) -> Mark | None:
    """``max_pool(input, kernel, stride, padding, dilation, ceil_mode)``; ``avg_pool`` has no dilation."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    kernels, strides, paddings = op.arg(1), op.arg(2), op.arg(3, default=0)
    is_max = "max" in op.name
    dilations = op.arg(4, default=1) if is_max else 1
    ceil = bool(op.arg(5 if is_max else 4, default=False))

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        k = _one(kernels, index)
        s, p, d = _one(strides, index, k), _one(paddings, index), _one(dilations, index, 1)
        if not ceil:
            return _slide(op, mark, dim, k, s, p, d)
        step = CeilPool(k, s, p, d)
        return windowed(mark, dim, stride=s, before=p, taps=k, dilation=d, size=step(size), step=step)

    return _spatial(op, mark, _axes_in_name(op.name), each)


def _axes_in_name(name: str) -> int:
    return next(int(letter) for letter in name if letter in "123")


def adaptive_pool(op: Op) -> Mark | None:
    """``adaptive_avg_pool(input, frames)``: frame i sees ⌊i·n / frames⌋ to ⌈(i + 1)·n / frames⌉ - 1."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    frames = op.arg(1)

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        m = _one(frames, index)
        if m == size:
            return mark
        if m == 1:
            return reduced(mark, [dim], op.what, mixes=False)
        first, last = (size, 0, m), (size, size - 1, m)
        why = Mark(fixed=(f"{op.what} makes {m} frames of any length",))
        return resampled(mark, dim, first, last, m, Fixed(m)).with_reasons(why)

    return _spatial(op, mark, _axes_in_name(op.name), each)


def pad(op: Op) -> Mark | None:
    """``constant_pad_nd(input, [left, right, …])`` and the reflecting, repeating and circular ones: last axis first."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    amounts = op.arg(1)
    for dim in sorted(mark.dims):
        place = 2 * (op.rank - 1 - dim)
        if place >= len(amounts):
            continue
        left, right = int(amounts[place]), int(amounts[place + 1])
        axis = as_axis(mark, dim, op.shape[dim])
        if axis is None:
            return unknown(f"{op.what}: time shares the axis with something else")
        size = op.shape[dim] + left + right
        step: Any = Affine(1, left + right, 1)
        if not op.settled:
            step = Guess(op.what, op.shape[dim], size, step, Fixed(size), (left, right), pads=True)
        if op.name == "pad":  # the circular one: what is put in front comes from the end
            axis = axis.mixes(f"circular padding in {op.module!r}" if op.module else "circular padding", [dim])
        mark = windowed(axis, dim, stride=1, before=left, taps=1, dilation=1, size=size, step=step, what="padding")
    return mark


# -- resampling


def upsample(op: Op) -> Mark | None:
    """``upsample_nearest1d(input, size, scale)``, ``upsample_linear1d(input, size, align_corners, scale)``, and so in 2-D."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    axes = _axes_in_name(op.name)
    linear = "linear" in op.name
    if not linear and "nearest" not in op.name:
        return unknown(op.what)
    sizes = op.arg(1)
    scales = list(op.args[3 if linear else 2 :])

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        m = _one(sizes, index)
        scale = scales[index] if index < len(scales) else None
        ratio = Fraction(size, m)
        step: Any = Guess(op.what, size, m, Affine(m, 0, size), Fixed(m))
        if scale is not None:
            exact = Fraction(scale).limit_denominator(1 << 12)
            ratio = 1 / exact
            step = Affine(exact.numerator, 0, exact.denominator)
        if linear and op.arg(2):
            if m == 1:
                return unknown(f"{op.what}: one frame between aligned corners")
            ratio = Fraction(size - 1, m - 1)
            why = Mark(fixed=(f"{op.what} aligns the corners of this length",))
            first, last = _corners(ratio)
            return resampled(mark, dim, first, last, m, step).with_reasons(why)
        first, last = _linear(ratio) if linear else _nearest(ratio, exact="exact" in op.name)
        return resampled(mark, dim, first, last, m, step)

    return _spatial(op, mark, axes, each)


Floor = tuple[int, int, int]


def _nearest(ratio: Fraction, *, exact: bool) -> tuple[Floor, Floor]:
    a, b = ratio.numerator, ratio.denominator
    floor = (2 * a, a, 2 * b) if exact else (a, 0, b)
    return floor, floor


def _linear(ratio: Fraction) -> tuple[Floor, Floor]:
    """Half-pixel centres: (x + 1/2)·ratio - 1/2, between the frames below and above it."""
    a, b = ratio.numerator, ratio.denominator
    return (2 * a, a - b, 2 * b), (2 * a, a - b + 2 * b - 1, 2 * b)


def _corners(ratio: Fraction) -> tuple[Floor, Floor]:
    a, b = ratio.numerator, ratio.denominator
    return (a, 0, b), (a, b - 1, b)
