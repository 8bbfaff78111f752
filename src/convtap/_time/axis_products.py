"""What products do to the time axis: matrices, attention, softmax, recurrence; and what a mask hides from a frame."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convtap._time.axis_join import joined, paired
from convtap._time.axis_op import Op
from convtap._time.mark import Mark, reduced, unknown

#: How many arguments stand before the factors of a product.
AHEAD = {"addmm": 1, "baddbmm": 1, "addmv": 1, "addbmm": 1, "_addmm_activation": 1}


def product(op: Op) -> Mark | None:
    """``mm``, ``bmm``, ``addmm``, ``mv``, …: the last axis of the first factor is summed with one of the second."""
    ahead = AHEAD.get(op.name, 0)
    a, b = op.args[ahead], op.args[ahead + 1]
    row = _matrix_product(op, a.dim(), b.dim(), op.mark(a), op.mark(b))
    bias = op.mark(op.args[0]) if ahead else None
    if bias is None or row is None:
        return row if bias is None else unknown(op.what)
    return joined([row, bias], op.what)


def _matrix_product(op: Op, a: int, b: int, left: Mark | None, right: Mark | None) -> Mark | None:
    """The mark of a product of two matrices, two batches of them, or a matrix and a vector, of ranks ``a`` and ``b``."""
    summed = b - 2 if b > 1 else 0
    hides = next(
        (one.hides for one, dim in ((left, a - 1), (right, summed)) if one and dim in one.dims and one.hides), None
    )
    if left is not None and not left.unknown:
        left = _summed(left, a - 1, hides, op.what)
    if right is not None and not right.unknown:
        right = _summed(right, summed, hides, op.what)
    if left is None or right is None:
        return left if right is None else right
    if left.unknown or right.unknown:
        return left if left.unknown else right
    if left.digits and right.digits and left.dims != right.dims:
        return paired(left, right, op.what)
    return joined([left, right], op.what)


def _summed(mark: Mark, dim: int, hides: str | None, what: str) -> Mark:
    return reduced(replace(mark, hides=hides) if dim in mark.dims else mark, [dim], what, mixes=True, sums=True)


def linear(op: Op) -> Mark | None:
    """``linear(input, weight, bias)``: over the last axis."""
    mark = op.mark(op.args[0])
    if op.mark(op.args[1]) is not None:
        return unknown(f"{op.what}: its weight depends on the input")
    return mark if mark is None or mark.unknown else reduced(mark, [op.rank - 1], op.what, mixes=True)


def attention(op: Op) -> Mark | None:
    """Scaled dot-product attention: ``(query, key, value, …)``, time on the last axis but one."""
    query, key, value = (op.mark(tensor) for tensor in op.args[:3])
    broken = next((mark for mark in (query, key, value) if mark is not None and mark.unknown), None)
    if broken is not None:
        return broken
    frames, features = op.rank - 2, op.rank - 1
    hides = _hidden_by_mask(op)
    if hides == "later" and not (query and key and query.first == key.first):
        hides = None
    if query is not None:
        query = reduced(query, [features], op.what, mixes=True)
    others = [key and reduced(key, [features], op.what, mixes=True), value]
    found = query
    for mark in others:
        if mark is not None:
            mark = _summed(mark, frames, hides, op.what)
            found = mark if found is None else paired(found, mark, op.what)
    return None if found is None else replace(found, paired=False, hides=None)


#: A score that is added to, or set, so that a softmax makes nothing of it: minus infinity, or what models write for it.
_BLOCKED = -9e3


def _hidden_by_mask(op: Op) -> str | None:
    """What the arguments of an attention hide from each frame: ``"later"`` frames, the ``"padding"``, or nothing."""
    flags = [value for value in op.args[3:] if isinstance(value, bool)]
    place = 1 if "efficient" in op.name or "cudnn" in op.name else 0  # these say first whether to compute a logarithm
    causal = bool(op.kwargs.get("is_causal", flags[place] if len(flags) > place else False))
    if causal:
        return "later"
    given = (op.kwargs.get("attn_mask"), op.kwargs.get("attn_bias"), *op.args[3:4])
    mask = next((one for one in given if isinstance(one, Tensor)), None)
    if mask is None or mask.dim() < 2:
        return None
    return hidden(~mask if mask.dtype == torch.bool else mask <= _BLOCKED, square=True)


def hidden(blocked: Tensor, *, square: bool) -> str | None:
    """Reads what is blocked, (…, queries, keys): all ``"later"`` keys, the last keys of a row as ``"padding"``, or nothing."""
    queries, keys = int(blocked.shape[-2]), int(blocked.shape[-1])
    if square and queries == keys > 1:
        later = torch.ones(queries, keys, dtype=torch.bool, device=blocked.device).triu(1)
        if bool(blocked[..., later].all()):
            return "later"
    ends = blocked[..., -1].all(-1)
    return "padding" if bool(ends.any()) and not bool(blocked.all(-1).all()) else None


def recurrence(op: Op) -> Mark | None:
    """``lstm``, ``gru``, ``rnn_tanh``: every frame after every other; features change, time stays where it is."""
    mark = op.mark(op.args[0])
    if mark is None or mark.unknown:
        return mark
    flags = [value for value in op.args[2:] if isinstance(value, bool)]
    if len(flags) != 4:
        return unknown(f"{op.what}: a packed sequence")
    _, _, both_ways, batch_first = flags
    mark = reduced(mark, [op.rank - 1], op.what, mixes=True)
    sequence = 1 if batch_first and op.rank == 3 else 0
    if sequence not in mark.dims:
        return mark
    found = mark.with_reasons(Mark(whole=(op.what,)))
    return found.mixes(op.what, [sequence]) if both_ways else found


def over(op: Op) -> Mark | None:
    """Softmax and the like: each value is scaled by what stands on an axis with it."""
    mark = op.mark(op.args[0])
    dims = op.dims(op.arg(1, "dim"))
    if mark is None or mark.unknown or not mark.dims.intersection(dims):
        return mark
    if not mark.paired or op.partner is None:
        return mark.with_reasons(Mark(statistics=(op.what,))).mixes(op.what, dims)
    # the weights of an attention: the product that follows mixes the frames, and what they hide stays hidden
    blocked = op.args[0] <= _BLOCKED
    other = next(iter(op.partner.dims), None)
    if other is None or len(mark.dims) != 1:
        return mark.mixes(op.what, dims)
    hides = hidden(blocked.movedim((other, dims[0]), (-2, -1)), square=mark.first == op.partner.first)
    return replace(mark, hides=hides).mixes(op.what, dims)
