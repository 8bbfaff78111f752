"""Rules of the time axis for products, attention, softmax and recurrence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convtap._time.join import joined, paired
from convtap._time.mark import Mark, reduced, unknown
from convtap._time.operation import Op

#: How many arguments stand before the factors of a product.
AHEAD = {"addmm": 1, "baddbmm": 1, "addmv": 1, "addbmm": 1, "_addmm_activation": 1}


def product(op: Op) -> Mark | None:
    """The rule of ``mm``, ``bmm``, ``addmm``, ``mv``, ….

    They sum over the last axis of the first factor and an axis of the second.
    """
    ahead = AHEAD.get(op.name, 0)
    a, b = op.args[ahead], op.args[ahead + 1]
    factors = [(op.mark(a), a.dim() - 1), (op.mark(b), max(0, b.dim() - 2))]
    hides = next((mark.hides for mark, dim in factors if mark and dim in mark.dims and mark.hides), None)
    marks = [_summed(mark, dim, hides, op.what) for mark, dim in factors if mark is not None]
    axes = [mark.dims for mark in marks if mark.digits]
    is_matrix = len(axes) == 2 and axes[0] != axes[1]
    found = paired(marks[0], marks[1], op.what) if is_matrix else joined(marks, op.what)
    bias = op.mark(op.args[0]) if ahead else None
    if bias is None:
        return found
    return unknown(op.what) if found is None else joined([found, bias], op.what)


def _summed(mark: Mark, dim: int, hides: str | None, what: str) -> Mark:
    mark = replace(mark, hides=hides) if dim in mark.dims else mark
    return reduced(mark, [dim], what, mixes=True, sums=True)


def linear(op: Op) -> Mark | None:
    """The rule of ``linear(input, weight, bias)``, which sums over the last axis."""
    mark = op.mark(op.args[0])
    if op.mark(op.args[1]) is not None:
        return unknown(f"{op.what}: its weight depends on the input")
    return mark and reduced(mark, [op.rank - 1], op.what, mixes=True)


def attention(op: Op) -> Mark | None:
    """The rule of scaled dot-product attention, with time on the second to last axis."""
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


#: Scores up to this value count as masked, since a softmax makes them 0: minus infinity, or a number that stands for it.
_BLOCKED = -9e3


def _hidden_by_mask(op: Op) -> str | None:
    """Returns the frames that an attention hides: ``"later"``, ``"padding"`` or None."""
    flags = op.flags(3)
    place = (
        1 if "efficient" in op.name or "cudnn" in op.name else 0
    )  # their first flag says whether to compute a logarithm
    causal = bool(op.kwargs.get("is_causal", flags[place] if len(flags) > place else False))
    if causal:
        return "later"
    given = (op.kwargs.get("attn_mask"), op.kwargs.get("attn_bias"), *op.args[3:4])
    mask = next((one for one in given if isinstance(one, Tensor)), None)
    if mask is None or mask.dim() < 2:
        return None
    return hidden(~mask if mask.dtype == torch.bool else mask <= _BLOCKED, square=True)


def hidden(blocked: Tensor, *, square: bool) -> str | None:
    """Returns the keys that a mask hides: ``"later"`` ones, the ``"padding"`` or None.

    Args:
        blocked: the mask, (…, queries, keys).
        square: whether queries and keys are the same frames.
    """
    queries, keys = int(blocked.shape[-2]), int(blocked.shape[-1])
    if square and queries == keys > 1:
        later = torch.ones(queries, keys, dtype=torch.bool, device=blocked.device).triu(1)
        if bool(blocked[..., later].all()):
            return "later"
    ends = blocked[..., -1].all(-1)
    return "padding" if bool(ends.any()) and not bool(blocked.all(-1).all()) else None


def recurrence(op: Op, mark: Mark) -> Mark:
    """The rule of ``lstm``, ``gru`` and ``rnn_tanh``, which run frame by frame."""
    flags = op.flags(2)
    if len(flags) != 4:
        return unknown(f"{op.what}: a packed sequence")
    _, _, both_ways, batch_first = flags
    mark = reduced(mark, [op.rank - 1], op.what, mixes=True)
    sequence = 1 if batch_first and op.rank == 3 else 0
    if sequence not in mark.dims:
        return mark
    found = mark.with_reasons(Mark(whole=(op.what,)))
    return found.mixes(op.what, [sequence]) if both_ways else found


def softmax(op: Op, mark: Mark) -> Mark:
    """The rule of softmax, which scales each value by the others on its axis."""
    dims = op.dims(op.arg(1, "dim"))
    if not mark.dims.intersection(dims):
        return mark
    if not mark.paired or op.partner is None:
        return mark.with_reasons(Mark(statistics=(op.what,))).mixes(op.what, dims)
    # the weights of an attention: the product that follows mixes the frames, and what they hide stays hidden
    other = next(iter(op.partner.dims), None)
    if other is None or len(mark.dims) != 1:
        return mark.mixes(op.what, dims)
    blocked = (op.args[0] <= _BLOCKED).movedim((other, dims[0]), (-2, -1))
    hides = hidden(blocked, square=mark.first == op.partner.first)
    return replace(mark, hides=hides).mixes(op.what, dims)
