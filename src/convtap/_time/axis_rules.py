"""What joining, normalization and reduction do to the time axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convtap._time.axis_join import appended, joined, stacked
from convtap._time.axis_op import Op
from convtap._time.axis_products import hidden
from convtap._time.axis_shape import dropped
from convtap._time.mark import Mark, as_axis, normal, reduced, unknown

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
    dim = int(op.arg(1, "dim", 0)) % (op.args[0][0].dim() + 1)
    plain = [(mark := op.mark(tensor)) and _plain_axis(mark, tensor.shape) for tensor in op.args[0]]
    return stacked(plain, dim, op.what)


#: Elementwise operations after which zeros are still zeros.
KEEP_ZEROS = {
    *("mul", "div", "native_dropout", "dropout", "clone", "_to_copy", "to", "contiguous", "copy", "masked_fill"),
    *("index_put", "_index_put_impl", "relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "neg", "abs", "glu"),
}


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
    found = joined(marks, op.what)
    if found is None or op.name not in KEEP_ZEROS:
        return found and replace(found, hides=None)
    blocked = _blocked(op)
    return found if blocked is None else zeroed(found, blocked)


def _blocked(op: Op) -> Tensor | None:
    """Where a product with a mask, or a fill of it, sets zero; None if it does not."""
    a, b = (*op.args, None)[:2]
    if op.name == "masked_fill":
        return b if isinstance(b, Tensor) and not op.args[2] else None
    if op.name != "mul" or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    mask = b if op.mark(b) is None else a if op.mark(a) is None else None
    return None if mask is None else (mask == 0).expand(op.out.shape)


def zeroed(mark: Mark, blocked: Tensor) -> Mark:
    """Returns the mark after values were set to zero, which may be those of the padding of some rows."""
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or mark.edge is None or not digit.dim or digit.inner > 1 or blocked.dim() <= digit.dim:
        return mark
    rows = blocked.movedim(digit.dim, -1).reshape(blocked.shape[0], -1, blocked.shape[digit.dim])
    return replace(mark, zeroed=mark.edge) if hidden(rows, square=False) == "padding" else mark


def _plain_axis(mark: Mark, shape: Sequence[int]) -> Mark:
    """Numbers the frames of an axis that repeats them, so that they compare with another operand's."""
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or digit.inner == 1:
        return mark
    return as_axis(mark, digit.dim, int(shape[digit.dim])) or mark


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if hasattr(value, "dim")]  # a tensor, or the shape of one


def _broadcast_size(op: Op, dim: int, rank: int) -> int:
    sizes = (v.shape[dim - (rank - v.dim())] for v in _tensors(op.args) if dim - (rank - v.dim()) >= 0)
    return max(sizes, default=1)


# -- frame by frame


def embedding(op: Op) -> Mark | None:
    """``embedding(weight, indices)``: features are added after the last axis."""
    return op.mark(op.args[1])


# -- statistics


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
    mark = op.mark(op.args[0])
    if op.trains and not training and mark is not None and not mark.unknown:
        # in train mode, which the model was in before this pass, it takes the statistics of its batch
        return mark.mixes(f"{op.what}, in train mode", [dim for dim in mark.dims if dim != 1])
    return _normalized(op, [dim for dim in range(op.rank) if dim != 1] if training else [])


def _normalized(op: Op, dims: Sequence[int]) -> Mark | None:
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or not mark.dims.intersection(dims):
        return mark
    return mark.with_reasons(Mark(statistics=(op.what,))).mixes(op.what, dims)


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
    mark = reduced(mark, dims, op.what, mixes=False, sums=op.name == "sum")
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
    if broken:
        return unknown(f"{op.what}: frames were put by number")
    mark, value, mask = op.mark(op.args[0]), op.args[2], op.args[1][0]
    is_mask = len(op.args[1]) == 1 and mask is not None and mask.dtype == torch.bool and value.numel() == 1
    if mark is None or mark.unknown or not is_mask or bool(value != 0):
        return mark
    return zeroed(mark, mask)


def nothing(op: Op) -> Mark | None:
    """The result has a shape like an argument, and no value of it."""
    return None


def fourier(op: Op) -> Mark | None:
    """``_fft_r2c(input, dims, …)``: over time, frames become frequencies."""
    mark = op.mark(op.args[0])
    dims = op.dims(op.arg(1))
    if mark is not None and not mark.digits and not mark.unknown and op.name != "_fft_r2c":
        return unknown(f"{op.what}: from frequencies back to frames")
    if mark is None or mark.unknown or not mark.dims.intersection(dims):
        return mark
    return reduced(normal(mark), dims, op.what, mixes=True)
