"""Rules of the time axis for reshapes, slices and writes into slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from convtap._time.axis_count import Affine, Digit, Fixed, Guess, Window
from convtap._time.join import joined, longer
from convtap._time.mark import Mark, as_axis, normal, unknown, windowed

#: The end of a slice that has no end.
_END = (1 << 63) - 1


def _strides(shape: Sequence[int]) -> list[int]:
    """Returns the strides of a contiguous tensor, in elements."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def reshaped(mark: Mark, old: Sequence[int], new: Sequence[int], what: str = "view") -> Mark:
    """Returns the mark after a tensor was reshaped in row-major order."""
    if mark.unknown or not mark.digits:
        return mark
    strides = _strides(old)
    digits: list[Digit] = []
    for digit in mark.digits:
        parts = _split(digit, strides[digit.dim] * digit.inner, new)
        if parts is None:
            return unknown(f"{what} from {tuple(old)} to {tuple(new)}: it cuts across frames")
        digits.extend(parts)
    return normal(replace(mark, digits=_merged(digits)))


def _split(digit: Digit, low: int, shape: Sequence[int]) -> list[Digit] | None:
    """Returns the parts of a digit on the axes of a shape, or None.

    Args:
        low: the number of elements between neighbouring positions.
    """
    high = low * digit.size
    strides = _strides(shape)
    if digit.size == 1:
        # A single frame lies on every axis of size one. It stays on the one that is nearest to its old axis.
        ones = [dim for dim, size in enumerate(shape) if size == 1 and strides[dim] == low]
        here = ones or [dim for dim, stride in enumerate(strides) if stride <= low < stride * shape[dim]]
        dim = min(here, key=lambda one: abs(one - digit.dim), default=None)
        return None if dim is None else [replace(digit, dim=dim, inner=max(1, low // strides[dim]))]
    parts: list[Digit] = []
    for dim, stride in enumerate(strides):
        bottom, top = max(low, stride), min(high, stride * shape[dim])
        if shape[dim] == 1 or bottom >= top:
            continue
        if bottom % stride or bottom % low or top % bottom or (stride * shape[dim]) % top or high % top:
            return None
        faster, size = bottom // low, top // bottom
        count = digit.count
        if size != digit.size:
            count = count.then(_share(digit, faster, size, slowest=top == high))
        parts.append(Digit(dim, size, bottom // stride, digit.weight * faster, count, digit.stacked))
    return parts


def _share(digit: Digit, faster: int, size: int, *, slowest: bool) -> object:
    """Returns the count of a part. The slowest part grows if the others do not."""
    if not slowest:
        return Guess("a view into segments", digit.size, Fixed(size), Affine(size, 0, digit.size))
    return Guess("a view into segments", digit.size, Affine(1, 0, faster))


def _merged(digits: list[Digit]) -> tuple[Digit, ...]:
    """Joins neighbouring parts that lie on one axis in order."""
    found: list[Digit] = []
    for digit in sorted(digits, key=lambda one: (one.dim, -one.inner)):
        last, size = found[-1] if found else None, digit.size
        if last and (last.dim, last.inner, last.weight) == (digit.dim, digit.inner * size, digit.weight * size):
            count = last.count.then(Affine(size, 0, 1))
            found[-1] = Digit(digit.dim, last.size * size, digit.inner, digit.weight, count)
        else:
            found.append(digit)
    return tuple(found)


def permuted(mark: Mark, order: Sequence[int]) -> Mark:
    """Returns the mark after a permutation: axis i of the result was ``order[i]``."""
    return mark.moved([dim % len(order) for dim in order].index)


def dropped(mark: Mark, dims: Sequence[int]) -> Mark:
    """Returns the mark after axes that are not time were removed."""
    return mark.moved(lambda dim: dim - sum(1 for one in dims if one < dim))


def inserted(mark: Mark, dim: int) -> Mark:
    """Returns the mark after an axis was inserted before ``dim``."""
    return mark.moved(lambda one: one + (one >= dim))


def sliced(mark: Mark, dim: int, size: int, start: int | None, stop: int | None, step: int, what: str) -> Mark:
    """Returns the mark after a slice of an axis that had ``size`` frames."""
    if dim not in mark.dims:
        return mark
    mark = as_axis(mark, dim, size, what)
    if mark.unknown:
        return mark
    begin, end, _ = slice(start, stop).indices(size)
    frames = len(range(begin, end, step))
    if not frames:
        return unknown(f"{what}: no frame is left")
    cut = Affine(1, end - size - begin + step - 1, step)
    settled: object = cut
    last = stop if stop is not None and 0 <= stop < _END else None
    if start is not None and -size < start < 0:
        settled = Window(0, end - begin, step) if end == size else Guess(what, size, Fixed(frames), cut)
        mark = replace(mark, fixed=(*mark.fixed, f"{what} keeps the last {size - begin} frames"))
    elif begin or last is not None:
        still = cut if last is None else Window(begin, last, step)
        settled = Guess(what, size, cut, still, (begin, last))
    return windowed(mark, dim, settled, stride=step, before=-begin, what="padding")


def written_into(
    base: Mark | None, part: Mark, dim: int, size: int, start: int, step: int, *, selects: bool, what: str
) -> Mark:
    """Returns the mark of a tensor after ``part`` was written into a slice of an axis.

    With ``selects``, the part was written to a single position.
    """
    part = inserted(part, dim) if selects else part
    if dim not in part.dims:
        if base is not None and dim in base.dims:
            return unknown(f"{what}: frames were written one by one")
        return part if base is None else joined([base, part], what) or part
    piece = normal(part)
    digit = piece.on(dim)
    if step != 1 or digit is None or digit.inner != 1 or len(piece.digits) != 1:
        return unknown(f"{what}: frames were written with gaps")
    count = Guess(what, digit.size, Affine(1, size - digit.size, 1))
    whole = replace(digit, size=size, count=digit.count.then(count))
    placed = piece.spread(start, -start).swapped(digit, whole)
    if base is None:
        return placed
    base = normal(base)
    if (base.first, base.last, base.dims) != (placed.first, placed.last, placed.dims):
        return unknown(f"{what}: the pieces that were written do not continue each other")
    return longer(base.with_reasons(placed), placed)
