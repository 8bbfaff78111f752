"""The operations that return a view, as rules of the time axis; and what a write into such a view does to its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from convtap._time.axis_count import Affine
from convtap._time.axis_op import Op
from convtap._time.axis_shape import dropped, expanded, inserted, permuted, reshaped, sliced, written
from convtap._time.mark import Digit, Mark, as_axis, normal, reduced, unknown


def _of(rule: Callable[[Op, Mark], Mark]) -> Callable[[Op], Mark | None]:
    """Leaves out the cases in which there is nothing to do."""

    def guarded(op: Op) -> Mark | None:
        mark = op.mark(op.args[0])
        return mark if mark is None or mark.unknown or not mark.digits else rule(op, mark)

    return guarded


def _out_shape(op: Op) -> tuple[int, ...]:
    return tuple(op.out.shape)


def _view(op: Op, mark: Mark) -> Mark:
    return reshaped(mark, op.shape, _out_shape(op), op.what)


def _order(op: Op) -> list[int]:
    rank = op.rank
    if op.name == "permute":
        return [int(dim) % rank for dim in op.args[1]]
    order = list(range(rank))
    a, b = (0, rank - 1) if op.name == "t" else (int(op.args[1]) % rank, int(op.args[2]) % rank)
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return order


def _permute(op: Op, mark: Mark) -> Mark:
    return permuted(mark, _order(op))


def _squeezed(op: Op) -> list[int]:
    """Which axes a squeeze removed."""
    dims = op.dims(op.args[1]) if len(op.args) > 1 else range(op.rank)
    return [dim for dim in dims if op.shape[dim] == 1]


def _squeeze(op: Op, mark: Mark) -> Mark:
    gone = _squeezed(op)
    if mark.dims.intersection(gone):
        return unknown(f"{op.what}: the axis of the only frame was removed")
    return dropped(mark, gone)


def _unsqueeze(op: Op, mark: Mark) -> Mark:
    return inserted(mark, int(op.args[1]) % (op.rank + 1))


def _slice(op: Op, mark: Mark) -> Mark:
    dim = int(op.arg(1, default=0)) % op.rank
    return sliced(mark, dim, op.shape[dim], op.arg(2), op.arg(3), int(op.arg(4, default=1)), op.what)


def _select(op: Op, mark: Mark) -> Mark:
    dim = int(op.args[1]) % op.rank
    if dim not in mark.dims:
        return dropped(mark, [dim])
    if len(mark.digits) > 1 and (digit := mark.on(dim)) is not None:
        at = int(op.args[2]) % op.shape[dim]
        left = replace(mark, digits=tuple(one for one in mark.digits if one is not digit))
        return dropped(normal(left.spread(-at * digit.weight, at * digit.weight)), [dim])
    return unknown(f"{op.what}: a single frame was taken")


def _expand(op: Op, mark: Mark) -> Mark:
    return expanded(mark, op.shape, _out_shape(op), op.what)


def _repeat(op: Op, mark: Mark) -> Mark:
    ahead = len(op.args[1]) - op.rank
    moved = mark.moved(lambda dim: dim + ahead)
    repeats = [dim for dim in moved.dims if op.args[1][dim] != 1]
    return unknown(f"{op.what}: the frames are repeated") if repeats else moved


def _unfold(op: Op, mark: Mark) -> Mark:
    """``unfold(dim, size, step)``: windows, with the place in the window on a new last axis."""
    dim, size, step = int(op.args[1]) % op.rank, int(op.args[2]), int(op.args[3])
    if dim not in mark.dims:
        return mark
    axis = as_axis(mark, dim, op.shape[dim])
    digit = None if axis is None else axis.on(dim)
    if axis is None or digit is None:
        return unknown(f"{op.what}: time shares the axis with something else")
    count = digit.count.then(Affine(1, step - size, step))
    windows = Digit(dim, _out_shape(op)[dim], 1, digit.weight * step, count)
    places = Digit(op.rank, size, 1, digit.weight)
    others = tuple(one for one in axis.digits if one is not digit)
    return replace(axis, digits=(*others, windows, places))


def _as_strided(op: Op, mark: Mark) -> Mark:
    """Overlapping windows over the last axis (as ``stft`` makes them); any other use is not followed."""
    sizes, strides = list(op.args[1]), list(op.args[2])
    old, rank = op.shape, op.rank
    tensor = op.args[0]
    if sizes == list(old) and strides == list(tensor.stride()):
        return mark
    same = len(sizes) == rank + 1 and sizes[:-2] == list(old[:-1]) and strides[:-2] == list(tensor.stride()[:-1])
    if not same or tensor.stride()[-1] != 1 or strides[-1] != 1 or op.arg(3) not in (None, tensor.storage_offset()):
        return unknown(f"{op.what} is not followed")
    return _unfold(Op("unfold", (tensor, -1, sizes[-1], strides[-2]), {}, op.out, op.module, None, op.mark), mark)


def _same(op: Op, mark: Mark) -> Mark:
    return mark


def _index_select(op: Op, mark: Mark) -> Mark:
    dim = int(op.args[1]) % op.rank
    return unknown(f"{op.what}: frames were picked by number") if dim in mark.dims else mark


def _index(op: Op, mark: Mark) -> Mark:
    """``x[:, index]``: one index of one axis that is not time; anything else is not followed."""
    given = [dim for dim, index in enumerate(op.args[1]) if index is not None]
    if len(given) == 1 and given[0] not in mark.dims and op.args[1][given[0]].dim() == 1:
        return mark
    return unknown(f"{op.what}: frames were picked by number")


def _flip(op: Op, mark: Mark) -> Mark:
    dims = op.dims(op.arg(1))
    return unknown(f"{op.what}: the frames were reordered") if mark.dims.intersection(dims) else mark


def _complex(op: Op, mark: Mark) -> Mark:
    """``view_as_complex``: the last axis, of two, is put together."""
    return reduced(mark, [op.rank - 1], op.what, mixes=False)


def pieces(op: Op, mark: Mark | None) -> list[Mark | None]:
    """What is known of each of the views that ``split``, ``chunk`` and ``unbind`` return."""
    if mark is None or mark.unknown or not mark.digits:
        return [mark] * len(op.out)
    if op.name == "unbind":
        dim = int(op.arg(1, default=0)) % op.rank
        return [_select(_with_args(op, "select", (dim, i)), mark) for i in range(len(op.out))]
    dim = int(op.arg(2, "dim", 0)) % op.rank
    found: list[Mark | None] = []
    start = 0
    for part in op.out:
        stop = start + int(part.shape[dim])
        found.append(sliced(mark, dim, op.shape[dim], start, stop, 1, op.what))
        start = stop
    return found


def _with_args(op: Op, name: str, args: Sequence[Any]) -> Op:
    return Op(name, (op.args[0], *args), {}, op.out, op.module, None, op.mark)


VIEWS: dict[str, Callable[[Op], Mark | None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"), _of(_view)),
    **dict.fromkeys(("permute", "transpose", "t"), _of(_permute)),
    "squeeze": _of(_squeeze),
    "unsqueeze": _of(_unsqueeze),
    "slice": _of(_slice),
    "select": _of(_select),
    "expand": _of(_expand),
    "repeat": _of(_repeat),
    "unfold": _of(_unfold),
    "as_strided": _of(_as_strided),
    **dict.fromkeys(("detach", "alias", "view_as_real"), _of(_same)),
    "view_as_complex": _of(_complex),
    **dict.fromkeys(("index_select", "gather"), _of(_index_select)),
    "index": _of(_index),
    "flip": _of(_flip),
}

MANY = {"split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"}

_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze")
_PERMUTES = ("permute", "transpose", "t")

#: Views that show every element of their base.
COVERING = {*_RESHAPES, *_PERMUTES, "detach", "alias"}


def base_after(op: Op, base: Mark | None, part: Mark, index: int | None = None) -> Mark:
    """Returns the mark of a base after a view of it, which ``op`` made, was written to.

    Args:
        base: the mark of the base before.
        part: the mark of the view after the write.
        index: which of several views it was.
    """
    if part.unknown:
        return part
    if part.across is not None or (base is not None and base.across is not None):
        return unknown(f"a write through {op.what}: frames against frames")
    if op.name in _RESHAPES:
        return reshaped(part, tuple(op.out.shape), op.shape, op.what)
    if op.name in _PERMUTES:
        order = _order(op)
        return permuted(part, [order.index(dim) for dim in range(len(order))])
    if op.name in ("detach", "alias"):
        return part
    where = _written_at(op, index)
    if where is None:
        return unknown(f"a write through {op.what}")
    dim, start, step = where
    selects = op.name in ("select", "unbind")
    return written(base, part, dim, op.shape[dim], start, step, selects=selects, what=f"a write through {op.what}")


def _written_at(op: Op, index: int | None) -> tuple[int, int, int] | None:
    """The axis, the first position and the step of a view that is a part of its base."""
    if op.name in ("slice", "select"):
        dim = int(op.arg(1, default=0)) % op.rank
        size = op.shape[dim]
        start = int(op.arg(2, default=0) or 0)
        start = max(0, start + size) if start < 0 else min(start, size)
        return dim, start, int(op.arg(4, default=1)) if op.name == "slice" else 1
    if index is not None and op.name == "unbind":
        return int(op.arg(1, default=0)) % op.rank, index, 1
    if index is not None:
        dim = int(op.arg(2, "dim", 0)) % op.rank
        return dim, sum(int(part.shape[dim]) for part in op.out[:index]), 1
    return None
