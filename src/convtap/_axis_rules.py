"""What each operation does to the time axis: convolution, pooling, resampling, products, normalization, reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from convtap._axis import Affine, CeilPool, Fixed, Guess
from convtap._axis_op import Op
from convtap._axis_shape import dropped
from convtap._errors import InvalidValue
from convtap._mark import Mark, appended, as_axis, joined, normal, reduced, resampled, unknown, windowed


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
    if channel in mark.dims or (0 in mark.dims and op.time_dim == 0):
        return _off_axis(op, mark, channel)
    stride, padding, dilation = op.arg(3), op.arg(4), op.arg(5)
    transposed, extra = op.arg(6), op.arg(7)

    def each(mark: Mark, dim: int, size: int, index: int) -> Mark:
        kernel = int(weight.shape[2 + index])
        s, p, d = _one(stride, index), _one(padding, index), _one(dilation, index)
        if transposed:
            return _transposed(op, mark, dim, kernel, s, p, d, _one(extra, index))
        return _slide(op, mark, dim, kernel, s, p, d)

    return _spatial(op, mark, axes, each)


def _off_axis(op: Op, mark: Mark, channel: int) -> Mark:
    """A convolution to which the time axis is not time."""
    dim = channel if channel in mark.dims else 0
    if op.time_dim is None:
        return unknown(f"{op.what}: time lies on axis {dim} of its input {op.shape}, which it does not slide over")
    kind = "channel" if dim == channel else "batch"
    raise InvalidValue(
        f"time_dim={op.time_dim} makes axis {dim} of the input {op.shape} of {op.module!r} time, and to this convolution "
        f"that is the {kind} axis. Say which axis of the model's input is time: timeline(model, example, time_dim=1) for "
        "(B, T, C)."
    )


def _slide(op: Op, mark: Mark, dim: int, kernel: int, stride: int, padding: int, dilation: int) -> Mark:
    extent = dilation * (kernel - 1) + 1
    digit = mark.on(dim)
    assert digit is not None
    last = digit.count.steps[-1] if digit.count.steps else None
    if isinstance(last, Guess):
        last.aligns(extent - 2 * padding, stride)
    step = Affine(1, 2 * padding - extent + stride, stride)
    size = step(digit.size)
    return windowed(mark, dim, stride=stride, before=padding, taps=kernel, dilation=dilation, size=size, step=step)


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
            step = Guess(op.what, op.shape[dim], size, step, Fixed(size))
        mark = windowed(axis, dim, stride=1, before=left, taps=1, dilation=1, size=size, step=step)
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


# -- joining


def cat(op: Op) -> Mark | None:
    """``cat(tensors, dim)``."""
    tensors = [tensor for tensor in op.args[0] if tensor.dim() > 1 or tensor.numel()]
    dim = int(op.arg(1, "dim", 0)) % tensors[0].dim()
    marks = [op.mark(tensor) for tensor in tensors]
    plain = [mark and _plain_axis(mark, tensor.shape) for mark, tensor in zip(marks, tensors, strict=True)]
    sizes = [int(tensor.shape[dim]) for tensor in tensors]
    return appended(list(zip(plain, sizes, strict=True)), dim, op.what)


def stack(op: Op) -> Mark | None:
    """``stack(tensors, dim)``."""
    marks = [mark for mark in map(op.mark, op.args[0]) if mark is not None]
    dim = int(op.arg(1, "dim", 0)) % (op.args[0][0].dim() + 1)
    mark = joined(marks, op.what)
    return mark if mark is None else mark.moved(lambda one: one + (one >= dim))


def elementwise(op: Op) -> Mark | None:
    """Any operation whose result at a place comes from its operands at that place; they are broadcast."""
    rank = max((value.dim() for value in _tensors(op.args)), default=0)
    marks = []
    for value in _tensors(op.args):
        mark = op.mark(value)
        if mark is None:
            continue
        ahead = rank - value.dim()
        for digit in mark.digits:
            size = _broadcast_size(op, digit.dim + ahead, rank)
            if value.shape[digit.dim] == 1 and size > 1:
                return unknown(f"{op.what}: one frame is given to {size}")
        mark = _plain_axis(mark, value.shape)
        marks.append(mark.moved(lambda dim, ahead=ahead: dim + ahead) if ahead else mark)  # type: ignore[misc]
    return joined(marks, op.what)


def _plain_axis(mark: Mark, shape: Sequence[int]) -> Mark:
    """Numbers the frames of an axis that repeats them, so that they compare with another operand's."""
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or digit.inner == 1:
        return mark
    return as_axis(mark, digit.dim, int(shape[digit.dim])) or mark


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _broadcast_size(op: Op, dim: int, rank: int) -> int:
    sizes = (v.shape[dim - (rank - v.dim())] for v in _tensors(op.args) if dim - (rank - v.dim()) >= 0)
    return max(sizes, default=1)


# -- products


def product(op: Op) -> Mark | None:
    """``mm``, ``bmm``, ``addmm``, ``mv``, …: the last axis of the first factor is summed with one of the second."""
    ahead = {"addmm": 1, "baddbmm": 1, "addmv": 1, "addbmm": 1, "_addmm_activation": 1}.get(op.name, 0)
    a, b = op.args[ahead], op.args[ahead + 1]
    left, right = op.mark(a), op.mark(b)
    row = joined_product(op, a, b, left, right)
    bias = op.mark(op.args[0]) if ahead else None
    if bias is None or row is None:
        return row if bias is None else unknown(op.what)
    return joined([row, bias], op.what)


def joined_product(op: Op, a: Tensor, b: Tensor, left: Mark | None, right: Mark | None) -> Mark | None:
    """The mark of ``a @ b`` for two matrices, two batches of them, or a matrix and a vector."""
    if left is not None and not left.unknown:
        left = reduced(left, [a.dim() - 1], op.what, mixes=True)
    if right is not None and not right.unknown:
        summed = b.dim() - 2 if b.dim() > 1 else 0
        right = reduced(right, [summed], op.what, mixes=True)
    if left is None or right is None:
        return left if right is None else right
    if left.unknown or right.unknown:
        return left if left.unknown else right
    if left.digits and right.digits and left.dims != right.dims:
        # Frames against frames, as in an attention: the rows keep their places, and see everything.
        return left.with_reasons(right).with_reasons(Mark(whole=(op.what,)))
    return joined([left, right], op.what)


def linear(op: Op) -> Mark | None:
    """``linear(input, weight, bias)``: over the last axis."""
    mark = op.mark(op.args[0])
    return mark if mark is None or mark.unknown else reduced(mark, [op.rank - 1], op.what, mixes=True)


def attention(op: Op) -> Mark | None:
    """Scaled dot-product attention: ``(query, key, value, …)``, time on the last axis but one."""
    query, key, value = (op.mark(tensor) for tensor in op.args[:3])
    dim = op.rank - 2
    if query is None:
        others = [mark for mark in (key, value) if mark is not None]
        found = joined(others, op.what)
        return found if found is None or found.unknown else reduced(found, [dim], op.what, mixes=True)
    mixed = query
    for mark in (key, value):
        if mark is not None and mark.unknown:
            return mark
        if mark is not None and dim in mark.dims:
            mixed = mixed.with_reasons(mark).with_reasons(Mark(whole=(op.what,)))
        elif mark is not None:
            mixed = joined([mixed, mark], op.what) or mixed
    return mixed


def recurrence(op: Op) -> Mark | None:
    """``lstm``, ``gru``, ``rnn_tanh``: every frame after every other; features change, time stays where it is."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    return mark.with_reasons(Mark(whole=(op.what,)))


def embedding(op: Op) -> Mark | None:
    """``embedding(weight, indices)``: features are added after the last axis."""
    return op.mark(op.args[1])


# -- statistics


def over(op: Op) -> Mark | None:
    """Softmax and the like: each value is scaled by what stands on an axis with it."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or not mark.dims.intersection(op.dims(op.arg(1, "dim"))):
        return mark
    return mark.with_reasons(Mark(statistics=(op.what,)))


def scan(op: Op) -> Mark | None:
    """Cumulative sums and the like: each frame after all before it."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or not mark.dims.intersection(op.dims(op.arg(1, "dim"))):
        return mark
    return mark.with_reasons(Mark(whole=(op.what,)))


def layer_norm(op: Op) -> Mark | None:
    """``native_layer_norm(input, shape, …)``: statistics over the last axes."""
    return _normalized(op, range(op.rank - len(op.args[1]), op.rank))


def group_norm(op: Op) -> Mark | None:
    """``native_group_norm``: statistics over all axes but the batch."""
    return _normalized(op, range(1, op.rank))


def batch_norm(op: Op) -> Mark | None:
    """``native_batch_norm(input, weight, bias, mean, variance, training, …)``: statistics only while training."""
    position = {"_native_batch_norm_legit": 5, "_batch_norm_with_update": 99}.get(op.name, 5)
    values = [value for value in op.args[3:] if isinstance(value, bool)]
    training = bool(values[0]) if position == 5 and values else position == 99
    return _normalized(op, [dim for dim in range(op.rank) if dim != 1] if training else [])


def _normalized(op: Op, dims: Sequence[int]) -> Mark | None:
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or not mark.dims.intersection(dims):
        return mark
    return mark.with_reasons(Mark(statistics=(op.what,)))


def reduction(op: Op) -> Mark | None:
    """Means, sums, maxima, norms: axes are reduced to nothing, or to size one."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    out = op.out[0] if isinstance(op.out, (tuple, list)) else op.out
    position = 2 if op.name in ("norm", "linalg_vector_norm") else 1
    value = op.arg(position, "dim")
    dims = op.dims(value if not isinstance(value, (bool, torch.dtype)) else None)
    if op.name in ("norm", "linalg_vector_norm") and len(op.args) < 3 and "dim" not in op.kwargs:
        dims = op.dims(None)
    mark = reduced(mark, dims, op.what, mixes=False)
    if out.dim() == op.rank or not mark.digits:
        return mark
    return dropped(mark, dims)


def ordering(op: Op) -> Mark | None:
    """Sorts and picks of the largest: along time, frames lose their places."""
    mark = op.mark(op.args[0])
    position = 2 if op.name in ("topk", "kthvalue") else 1
    if mark is None or mark.unknown or not mark.dims.intersection(op.dims(op.arg(position, "dim", -1))):
        return mark
    return unknown(f"{op.what}: frames were put in another order")


def glu(op: Op) -> Mark | None:
    """``glu(input, dim)``: one half gates the other."""
    mark = op.mark(op.args[0])
    dim = int(op.arg(1, "dim", -1)) % op.rank
    if mark is not None and dim in mark.dims:
        return unknown(f"{op.what}: one half of the frames gates the other")
    return mark


def scatter(op: Op) -> Mark | None:
    """``scatter(input, dim, index, source)``: values are put somewhere along an axis that is not time."""
    marks = [mark for mark in (op.mark(value) for value in _tensors(op.args)) if mark is not None]
    dim = int(op.args[1]) % op.rank
    if any(dim in mark.dims for mark in marks):
        return unknown(f"{op.what}: frames were put elsewhere")
    return joined(marks, op.what)


def index_put(op: Op) -> Mark | None:
    """``index_put(input, indices, values)``: of constants, nothing moves."""
    given = [op.args[2], *(index for index in op.args[1] if index is not None)]
    broken = [mark for mark in map(op.mark, given) if mark is not None]
    return unknown(f"{op.what}: frames were put by number") if broken else op.mark(op.args[0])


def nothing(op: Op) -> Mark | None:
    """The result has a shape like an argument, and no value of it."""
    return None


def fourier(op: Op) -> Mark | None:
    """``_fft_r2c(input, dims, …)``: over time, frames become frequencies."""
    mark = op.mark(op.args[0])
    dims = op.dims(op.arg(1))
    if mark is None or mark.unknown or not mark.dims.intersection(dims):
        return mark
    return reduced(normal(mark), dims, op.what, mixes=True)
