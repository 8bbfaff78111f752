"""Rules of the time axis for convolution, pooling, padding, roll and resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from convtap._errors import InvalidValue
from convtap._time.axis import IDENTITY, Floor
from convtap._time.axis_count import Affine, CeilPool, Fixed, Guess
from convtap._time.mark import Mark, as_axis, normal, reduced, resampled, unknown, windowed
from convtap._time.operation import Op


def _one(value: Any, index: int, default: int = 0) -> int:
    """Reads the setting of one axis, from one value for all axes or one per axis."""
    if isinstance(value, (list, tuple)):
        return int(value[index] if len(value) > 1 else value[0]) if value else default
    return default if value is None else int(value)


def _spatial(op: Op, mark: Mark, axes: int, each: Callable[[Mark, int, int, int], Mark]) -> Mark:
    """Applies a rule along each of the last ``axes`` axes that count frames.

    Args:
        each: a rule of the mark, the axis, its size and its place in the settings.
    """
    shape = op.shape
    for dim in sorted(mark.dims):
        index = dim - (len(shape) - axes)
        if index >= 0 and not mark.unknown:
            mark = as_axis(mark, dim, shape[dim], op.what)
            mark = mark if mark.unknown else each(mark, dim, shape[dim], index)
    return mark


def _axes_in_name(op: Op) -> int:
    return next(int(letter) for letter in op.name if letter in "123")


# -- windows


def convolution(op: Op, mark: Mark) -> Mark:
    """The rule of ``convolution``.

    Its arguments are ``input, weight, bias, stride, padding, dilation, transposed, output_padding, groups``.
    """
    weight = op.args[1]
    axes = weight.dim() - 2
    channel = op.rank - axes - 1
    if _is_signal(op, mark) and (channel in mark.dims or (0 in mark.dims and op.time_dim == 0)):
        raise _off_axis(op, channel if channel in mark.dims else 0, channel)
    if channel in mark.dims:
        mark = _from_channels(op, mark, channel)
    settings = [op.arg(position) for position in (3, 4, 5, 7)]

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        kernel = int(weight.shape[2 + index])
        stride, padding, dilation, extra = (_one(value, index) for value in settings)
        if op.arg(6):
            return _transposed(op, mark, dim, size, kernel, stride, padding, dilation, extra)
        return _slide(mark, dim, kernel, stride, padding, dilation, zeros=True)

    return mark if mark.unknown else _spatial(op, mark, axes, each)


def _is_signal(op: Op, mark: Mark) -> bool:
    """Returns whether a tensor's frames still are the samples of the model's input."""
    return op.time_dim is not None and len(mark.digits) == 1 and mark.first == mark.last == IDENTITY


def _off_axis(op: Op, dim: int, channel: int) -> InvalidValue:
    """Returns the error of a first convolution whose time axis is another one."""
    kind = "channel" if dim == channel else "batch"
    other = "time_dim=1 for (B, T, C)" if op.time_dim == op.rank - 1 else "time_dim=-1 for (B, C, T)"
    return InvalidValue(
        f"time_dim selects axis {op.time_dim} of the model's input, which is the {kind} axis of {op.module!r} with input "
        f"shape {op.shape}. Pass the axis that is time: {other}."
    )


def _from_channels(op: Op, mark: Mark, channel: int) -> Mark:
    """Returns the mark of a convolution over channels that hold frames.

    Channels hold frames after framing, or after a fold into patches.
    """
    groups, channels, out = int(op.arg(8, default=1)), op.shape[channel], int(op.out.shape[channel])
    if groups == 1:
        return reduced(mark, [channel], op.what, mixes=True)
    digit = mark.on(channel)
    if groups == channels and digit is not None:
        return mark.swapped(digit, replace(digit, inner=digit.inner * (out // channels)))
    return unknown(f"{op.what}: its {groups} groups of channels hold frames")


def _slide(
    mark: Mark,
    dim: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    *,
    ceil: bool = False,
    zeros: bool = False,
) -> Mark:
    extent = dilation * (kernel - 1) + 1
    step: Any = Affine(1, 2 * padding - extent + stride, stride)
    digit = mark.on(dim)
    assert digit is not None
    if ceil:
        step = CeilPool(kernel, stride, padding, dilation)
    else:
        for last in reversed(digit.count.steps):
            if not isinstance(last, Guess):
                break
            last.aligns(extent - 2 * padding, stride)
    return windowed(mark, dim, step, stride=stride, before=padding, taps=kernel, dilation=dilation, zeros=zeros)


def _transposed(
    op: Op, mark: Mark, dim: int, size: int, kernel: int, stride: int, padding: int, dilation: int, extra: int
) -> Mark:
    """Returns the mark after a transposed convolution.

    Output frame y depends on input frame i if y + padding - i·stride is one of 0, dilation, …, (kernel - 1)·dilation.
    """
    if dilation > 1 and stride > 1:
        return unknown(f"{op.what}: a transposed convolution with stride {stride} and dilation {dilation}")
    if kernel < stride:
        what = f"a transposed convolution with kernel {kernel} and a larger stride {stride}"
        return unknown(f"{op.what}: {what} leaves gaps")
    reach = dilation * (kernel - 1)
    step = Affine(stride, reach + extra + 1 - stride - 2 * padding, 1)
    first = (1, padding - reach + stride - 1, stride)
    return resampled(mark, dim, first, (1, padding, stride), step(size), step)


def pool(op: Op, mark: Mark) -> Mark:
    """The rule of ``max_pool`` and ``avg_pool``.

    Their arguments are ``input, kernel, stride, padding, dilation, ceil_mode``; ``avg_pool`` has no dilation.
    """
    kernels, strides, paddings = op.arg(1), op.arg(2), op.arg(3, default=0)
    is_max = "max" in op.name
    dilations = op.arg(4, default=1) if is_max else 1
    ceil = bool(op.arg(5 if is_max else 4, default=False))

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        kernel = _one(kernels, index)
        stride, padding, dilation = _one(strides, index, kernel), _one(paddings, index), _one(dilations, index, 1)
        return _slide(mark, dim, kernel, stride, padding, dilation, ceil=ceil)

    return _spatial(op, mark, _axes_in_name(op), each)


def adaptive_pool(op: Op, mark: Mark) -> Mark:
    """The rule of ``adaptive_avg_pool(input, frames)``.

    Frame i sees ⌊i·n / frames⌋ to ⌈(i + 1)·n / frames⌉ - 1.
    """

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        frames = _one(op.arg(1), index)
        if frames == size:
            return mark
        if frames == 1:
            return reduced(mark, [dim], op.what, mixes=False)
        why = Mark(fixed=(f"{op.what} makes {frames} frames of any length",))
        first, last = (size, 0, frames), (size, size - 1, frames)
        return resampled(mark, dim, first, last, frames, Fixed(frames)).with_reasons(why)

    return _spatial(op, mark, _axes_in_name(op), each)


# -- padding


def pad(op: Op, mark: Mark) -> Mark:
    """The rule of ``constant_pad_nd(input, [left, right, …])`` and other paddings.

    The amounts begin with the last axis. Other paddings are reflect, replicate and circular padding.
    """
    amounts = op.arg(1)

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        place = 2 * (op.rank - 1 - dim)
        left, right = int(amounts[place]), int(amounts[place + 1])
        step: Any = Affine(1, left + right, 1)
        if not op.settled:
            step = Guess(op.what, size, step, given=(left, right), pads=True)
        if op.name == "pad":  # circular: the frames in front come from the end
            mark = mark.mixes(f"circular padding in {op.module!r}" if op.module else "circular padding", [dim])
        return windowed(mark, dim, step, before=left, what="padding")

    return _spatial(op, mark, len(amounts) // 2, each)


def roll(op: Op, mark: Mark) -> Mark:
    """The rule of ``roll(input, shifts, dims)``.

    Frames that wrap around count as padding.
    """
    given = op.arg(2, "dims")
    dims = op.dims(given)
    if not mark.dims.intersection(dims):
        return mark
    if not given:
        return unknown(f"{op.what}: the frames were rolled along with other axes")
    for shift, dim in zip(op.args[1], dims, strict=True):
        if dim not in mark.dims or not shift:
            continue
        size = op.shape[dim]
        axis = as_axis(mark, dim, size, op.what)
        if axis.unknown or len(axis.digits) > 1:
            return unknown(f"{op.what}: segments were rolled")
        axis = normal(axis)
        # frames that come from the end to the front come from the padding, if there is any
        axis = axis.mixes(op.what, [dim]) if shift > 0 else axis.looks(dim, "roll")
        (digit,) = axis.digits
        count = digit.count.then(Guess(op.what, size, Affine(1, 0, 1)))
        mark = axis.spread(shift, -shift).swapped(digit, replace(digit, count=count)).within(size)
    return mark


# -- resampling


def upsample(op: Op, mark: Mark) -> Mark:
    """The rule of upsampling in 1-D and 2-D.

    The operations are ``upsample_nearest1d(input, size, scale)``, ``upsample_linear1d(input, size, align_corners, scale)``
    and their 2-D forms.
    """
    linear = "linear" in op.name
    corners = linear and bool(op.arg(2))
    scales = list(op.args[3 if linear else 2 :])

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        frames = _one(op.arg(1), index)
        scale = scales[index] if index < len(scales) else None
        ratio = Fraction(size, frames)
        step: Any = Guess(op.what, size, Affine(frames, 0, size))
        if scale is not None:
            exact = Fraction(scale).limit_denominator(1 << 12)
            ratio, step = 1 / exact, Affine(exact.numerator, 0, exact.denominator)
        if corners and 1 in (frames, size):
            return unknown(f"{op.what}: one frame between aligned corners")
        if corners:
            ratio = Fraction(size - 1, frames - 1)
        found = resampled(mark, dim, *_seen(op, ratio, linear, corners), frames, step)
        return found.with_reasons(Mark(fixed=(f"{op.what} aligns the corners of this length",))) if corners else found

    return _spatial(op, mark, _axes_in_name(op), each)


def _seen(op: Op, ratio: Fraction, linear: bool, corners: bool) -> tuple[Floor, Floor]:
    """Returns the first and last frame that a frame of an upsampling sees.

    Args:
        ratio: frames before the upsampling per frame after it.
    """
    a, b = ratio.numerator, ratio.denominator
    if corners:  # x·ratio, between the frames below and above it
        return (a, 0, b), (a, b - 1, b)
    if linear:  # half-pixel centres: (x + 1/2)·ratio - 1/2, between the frames below and above it
        return (2 * a, a - b, 2 * b), (2 * a, a - b + 2 * b - 1, 2 * b)
    nearest = (2 * a, a, 2 * b) if "exact" in op.name else (a, 0, b)
    return nearest, nearest
