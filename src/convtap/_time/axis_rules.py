"""What joining, products, normalization and reduction do to the time axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convtap._time.axis_op import Op
from convtap._time.axis_shape import dropped
from convtap._time.mark import Mark, appended, as_axis, joined, normal, reduced, unknown

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
