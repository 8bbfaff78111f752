"""Rules of the time axis for elementwise operations, normalization and reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convtap._time.join import joined, plain_axis, stacked
from convtap._time.mark import Mark, normal, reduced, unknown
from convtap._time.operation import Op
from convtap._time.products import hidden

# -- element by element

#: Elementwise operations after which zeros are still zeros.
KEEP_ZEROS = {
    *("mul", "div", "native_dropout", "dropout", "clone", "_to_copy", "to", "contiguous", "copy", "masked_fill"),
    *("index_put", "_index_put_impl", "relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "neg", "abs", "glu"),
}


def elementwise(op: Op) -> Mark | None:
    """The rule of elementwise operations, whose operands are broadcast."""
    values = [value for value in op.args if hasattr(value, "dim")]
    rank = max((value.dim() for value in values), default=0)
    marks = []
    for value in values:
        mark = op.mark(value)
        if mark is None:
            continue
        ahead = rank - value.dim()
        for digit in mark.digits:
            place = digit.dim - value.dim()
            size = max(one.shape[place] for one in values if one.dim() >= -place)
            if value.shape[digit.dim] == 1 and size > 1:
                return unknown(f"{op.what}: one frame is broadcast to {size}")
        mark = plain_axis(mark, value.shape, op.what)
        marks.append(mark.moved(lambda dim, ahead=ahead: dim + ahead) if ahead else mark)  # type: ignore[misc]
    found = joined(marks, op.what)
    if found is None or op.name not in KEEP_ZEROS:
        return found and replace(found, hides=None)
    blocked = _blocked(op)
    return found if blocked is None else zeroed(found, blocked)


def _blocked(op: Op) -> Tensor | None:
    """Returns where a product with a mask, or a fill of a mask, sets zeros, or None."""
    a, b = (*op.args, None)[:2]
    if op.name == "masked_fill":
        return b if isinstance(b, Tensor) and not op.args[2] else None
    if op.name != "mul" or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    mask = b if op.mark(b) is None else a if op.mark(a) is None else None
    return None if mask is None else (mask == 0).expand(op.out.shape)


def zeroed(mark: Mark, blocked: Tensor) -> Mark:
    """Returns the mark after values were set to zero, perhaps those of the padding."""
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or mark.edge is None or not digit.dim or digit.inner > 1 or blocked.dim() <= digit.dim:
        return mark
    rows = blocked.movedim(digit.dim, -1).reshape(blocked.shape[0], -1, blocked.shape[digit.dim])
    return replace(mark, zeroed=mark.edge) if hidden(rows, square=False) == "padding" else mark


def stack(op: Op) -> Mark | None:
    """The rule of ``stack(tensors, dim)``."""
    dim = int(op.arg(1, "dim", 0)) % (op.args[0][0].dim() + 1)
    plain = [(mark := op.mark(tensor)) and plain_axis(mark, tensor.shape, op.what) for tensor in op.args[0]]
    return stacked(plain, dim, op.what)


def scatter(op: Op) -> Mark | None:
    """The rule of ``scatter(input, dim, index, source)``, not along time."""
    marks = [mark for mark in map(op.mark, op.args) if mark is not None]
    dim = int(op.args[1]) % op.rank
    if any(dim in mark.dims for mark in marks):
        return unknown(f"{op.what}: frames were moved")
    return joined(marks, op.what)


def index_put(op: Op) -> Mark | None:
    """The rule of ``index_put(input, indices, values)`` with constant values."""
    mark, (mask, *others), value = op.mark(op.args[0]), op.args[1], op.args[2]
    if any(op.mark(one) is not None for one in (value, mask, *others)):
        return unknown(f"{op.what}: frames were written by index")
    is_mask = not others and mask is not None and mask.dtype == torch.bool and value.numel() == 1
    return mark if mark is None or mark.unknown or not is_mask or bool(value != 0) else zeroed(mark, mask)


# -- statistics


def scan(op: Op, mark: Mark) -> Mark:
    """The rule of cumulative sums, where a frame depends on all frames before it."""
    along = mark.dims.intersection(op.dims(op.arg(1, "dim")))
    return mark.with_reasons(Mark(whole=(op.what,))) if along else mark


def normalized(dims: Callable[[Op], Sequence[int]]) -> Callable[[Op, Mark], Mark]:
    """Makes the rule of a normalization by statistics over some axes."""

    def rule(op: Op, mark: Mark) -> Mark:
        over = dims(op)
        if not mark.dims.intersection(over):
            return mark
        return mark.with_reasons(Mark(statistics=(op.what,))).mixes(op.what, over)

    return rule


layer_norm = normalized(lambda op: range(op.rank - len(op.args[1]), op.rank))
group_norm = normalized(lambda op: range(1, op.rank))
_batch_norm = normalized(lambda op: [dim for dim in range(op.rank) if dim != 1])


def batch_norm(op: Op) -> Mark | None:
    """The rule of ``native_batch_norm``, which uses statistics in train mode only.

    Its arguments are ``input, weight, bias, mean, variance, training, …``.
    """
    training = op.flags(3)[:1] == [True]
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or not (training or op.trains):
        return mark
    if training:
        return _batch_norm(op, mark)
    # in train mode, in which the model was before this pass, it uses the statistics of the batch
    return mark.mixes(f"{op.what}, in train mode", [dim for dim in mark.dims if dim != 1])


def reduction(op: Op, mark: Mark) -> Mark:
    """The rule of means, sums, maxima and norms, which remove axes or keep size one."""
    out = op.out[0] if isinstance(op.out, (tuple, list)) else op.out
    is_norm = op.name in ("norm", "linalg_vector_norm")
    value = op.arg(2 if is_norm else 1, "dim")
    dims = op.dims(None if isinstance(value, (bool, torch.dtype)) else value)
    mark = reduced(mark, dims, op.what, mixes=False, sums=op.name == "sum")
    if out.dim() == op.rank:
        return mark
    return mark.moved(lambda dim: dim - sum(one < dim for one in dims))


def fourier(op: Op) -> Mark | None:
    """The rule of ``_fft_r2c(input, dims, …)``. Over time, frames become frequencies."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown or mark.digits:
        return mark and reduced(normal(mark), op.dims(op.arg(1)), op.what, mixes=True)
    return mark if op.name == "_fft_r2c" else unknown(f"{op.what}: from frequencies back to frames")
