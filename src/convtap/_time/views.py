"""Rules of the time axis for operations that rearrange a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from convtap._time.axis_count import Affine, Digit, Guess
from convtap._time.mark import Mark, as_axis, normal, reduced, resampled, unknown
from convtap._time.operation import Op, Rule, not_along, of_input
from convtap._time.reshape import dropped, inserted, permuted, reshaped, sliced, written_into


def _out_shape(op: Op) -> tuple[int, ...]:
    return tuple(op.out.shape)


def _order(op: Op) -> list[int]:
    rank = op.rank
    if op.name == "permute":
        return [int(dim) % rank for dim in op.args[1]]
    order = list(range(rank))
    a, b = (0, rank - 1) if op.name == "t" else (int(op.args[1]) % rank, int(op.args[2]) % rank)
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return order


def _squeeze(op: Op, mark: Mark) -> Mark:
    dims = op.dims(op.args[1]) if len(op.args) > 1 else range(op.rank)
    gone = [dim for dim in dims if op.shape[dim] == 1]
    if mark.dims.intersection(gone):
        return unknown(f"{op.what}: the axis of the only frame was removed")
    return dropped(mark, gone)


def _slice(op: Op, mark: Mark) -> Mark:
    dim = op.dim(1)
    return sliced(mark, dim, op.shape[dim], op.arg(2), op.arg(3), int(op.arg(4, default=1)), op.what)


def _select(op: Op, mark: Mark) -> Mark:
    dim = op.dim(1)
    digit = mark.on(dim)
    if dim not in mark.dims:
        return dropped(mark, [dim])
    if len(mark.digits) == 1 or digit is None:
        return unknown(f"{op.what}: a single frame was selected")
    at = int(op.args[2]) % op.shape[dim] * digit.weight
    return dropped(normal(mark.swapped(digit).spread(-at, at)), [dim])


def _repeated(op: Op, mark: Mark) -> Mark:
    """The rule of ``expand`` and ``repeat``, which may add axes in front."""
    new = _out_shape(op)
    ahead = len(new) - op.rank
    if any(new[dim + ahead] != op.shape[dim] for dim in mark.dims):
        return unknown(f"{op.what}: {'one frame is' if op.name == 'expand' else 'the frames are'} repeated along time")
    return mark.moved(lambda dim: dim + ahead)


def _unfold(op: Op, mark: Mark) -> Mark:
    """The rule of ``unfold(dim, size, step)``.

    It makes windows, and the place in the window is a new last axis.
    """
    dim, size, step = int(op.args[1]) % op.rank, int(op.args[2]), int(op.args[3])
    if dim not in mark.dims:
        return mark
    axis = as_axis(mark, dim, op.shape[dim], op.what)
    digit = axis.on(dim)
    if digit is None:
        return axis
    count = digit.count.then(Affine(1, step - size, step))
    windows = Digit(dim, _out_shape(op)[dim], 1, digit.weight * step, count)
    places = Digit(op.rank, size, 1, digit.weight)
    return replace(axis, digits=(*axis.swapped(digit).digits, windows, places))


def _as_strided(op: Op, mark: Mark) -> Mark:
    """The rule of ``as_strided`` for overlapping windows, as ``stft`` makes them.

    Any other use is not followed.
    """
    sizes, strides, tensor = list(op.args[1]), list(op.args[2]), op.args[0]
    old, steps = list(op.shape), list(tensor.strides)
    if (sizes, strides) == (old, steps):
        return mark
    same = len(sizes) == op.rank + 1 and sizes[:-2] == old[:-1] and strides[:-2] == steps[:-1]
    if not same or steps[-1] != 1 or strides[-1] != 1 or op.arg(3) not in (None, tensor.offset):
        return unknown(f"{op.what} is not followed")
    return _unfold(replace(op, name="unfold", args=(tensor, -1, sizes[-1], strides[-2])), mark)


def _index(op: Op, mark: Mark) -> Mark:
    """The rule of ``x[:, index]`` on one axis that is not time.

    Any other index is not followed.
    """
    given = [dim for dim, index in enumerate(op.args[1]) if index is not None]
    if len(given) == 1 and given[0] not in mark.dims and op.args[1][given[0]].dim() == 1:
        return mark
    return unknown(f"{op.what}: frames were selected by index")


def pieces(op: Op) -> list[Op]:
    """Returns each result of ``split``, ``chunk`` or ``unbind`` as an operation."""
    if op.name == "unbind":
        named: list[tuple[str, tuple[Any, ...]]] = [("select", (op.args[0], op.dim(1), i)) for i in range(len(op.out))]
    else:
        dim = op.dim(2)
        ends = [0, *accumulate(int(out.shape[dim]) for out in op.out)]
        named = [("slice", (op.args[0], dim, start, stop)) for start, stop in pairwise(ends)]
    return [
        replace(op, name=name, args=args, kwargs={}, out=out, label=op.name)
        for (name, args), out in zip(named, op.out, strict=True)
    ]


# -- overlapping windows and sub-pixel shuffles


class _Windows(NamedTuple):
    """The settings of ``fold`` and ``unfold`` along the axis with several windows."""

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
    """The rule of ``col2im``, which adds up windows (B, C·kernel, windows).

    Its arguments are ``input, sizes, kernel, dilation, padding, stride``.
    """
    last, channel, batch = op.rank - 1, op.rank - 2, op.rank - 3
    one = _windows(op.args[1], op.args[2:6])
    windows, places = mark.on(last), mark.on(channel)
    if one is None or windows is None or windows.inner > 1 or len(mark.digits) > 1 + (places is not None):
        return unknown(f"{op.what}: windows along two axes, or along an axis other than time")
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
        return unknown(f"{op.what}: frames are added up at other places than they came from")
    whole = Digit(dim, size, 1, unit, windows.count.then(step))
    return normal(replace(mark.spread(-one.padding * unit, one.padding * unit), digits=(whole,))).within(size)


def unfold(op: Op, mark: Mark) -> Mark:
    """The rule of ``im2col``, which makes windows (B, C·kernel, windows).

    Its arguments are ``input, kernel, dilation, padding, stride``, where the input is (B, C, H, W).
    """
    batch = op.rank - 4
    one = _windows(op.shape[-2:], op.args[1:5])
    dim = -1 if one is None else batch + 2 + one.axis
    axis = as_axis(mark, dim, op.shape[dim], op.what)
    if one is None or axis.unknown or len(axis.digits) > 1:
        return unknown(f"{op.what}: windows along two axes, or along an axis other than time")
    axis = normal(axis.looks(dim, "padding"))
    step = Affine(1, 2 * one.padding - one.extent + one.stride, one.stride)
    windows = Digit(batch + 2, one.total, 1, one.stride, axis.digits[0].count.then(step))
    places = Digit(batch + 1, one.kernel, one.inner, one.dilation)
    return replace(axis.spread(one.padding, -one.padding), digits=(windows, places))


def shuffle(op: Op, mark: Mark) -> Mark:
    """The rule of ``pixel_shuffle(input, factor)`` and its inverse, as views."""
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


# -- views and their bases

_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze")
_PERMUTES = ("permute", "transpose", "t")

#: The rule of each view.
_RULES: dict[str, Callable[[Op, Mark], Mark]] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"),
        lambda op, mark: reshaped(mark, op.shape, _out_shape(op), op.what),
    ),
    **dict.fromkeys(_PERMUTES, lambda op, mark: permuted(mark, _order(op))),
    "squeeze": _squeeze,
    "unsqueeze": lambda op, mark: inserted(mark, int(op.args[1]) % (op.rank + 1)),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("expand", "repeat"), _repeated),
    "unfold": _unfold,
    "as_strided": _as_strided,
    **dict.fromkeys(("detach", "alias", "view_as_real"), lambda op, mark: mark),
    "view_as_complex": lambda op, mark: reduced(mark, [op.rank - 1], op.what, mixes=False),  # the last axis, of two
    "index": _index,
    **dict.fromkeys(("index_select", "gather"), not_along(1, 0, "frames were selected by index")),
    "flip": not_along(1, None, "the frames were reordered"),
}
VIEWS: dict[str, Rule] = {name: of_input(rule) for name, rule in _RULES.items()}

MANY = {"split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"}

#: Views that show every element of their base.
COVERING = {*_RESHAPES, *_PERMUTES, "detach", "alias"}


def base_after(op: Op, base: Mark | None, part: Mark) -> Mark:
    """Returns the mark of a base after a write into a view of it, which ``op`` made.

    Args:
        base: the mark of the base before.
        part: the mark of the view after the write.
    """
    what = f"a write through {op.what}"
    if part.unknown:
        return part
    if part.across is not None or (base is not None and base.across is not None):
        return unknown(f"{what}: frames against frames")
    if op.name in _RESHAPES:
        return reshaped(part, _out_shape(op), op.shape, op.what)
    if op.name in _PERMUTES:
        order = _order(op)
        return permuted(part, [order.index(dim) for dim in range(len(order))])
    if op.name in ("detach", "alias"):
        return part
    if op.name not in ("slice", "select"):
        return unknown(what)
    dim, selects = op.dim(1), op.name == "select"
    start, _, _ = slice(op.arg(2, default=0), None).indices(op.shape[dim])
    step = 1 if selects else int(op.arg(4, default=1))
    return written_into(base, part, dim, op.shape[dim], start, step, selects=selects, what=what)
