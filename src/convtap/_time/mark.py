"""What is known of the time axis of one tensor: where it lies, and which input samples each of its frames reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convtap._time.axis import IDENTITY, Line
from convtap._time.axis_count import NO_STEPS, Affine, Count, Fixed, Guess, Sum


@dataclass(frozen=True)
class Digit:
    """One axis of a tensor, or a part of one, that counts frames.

    Cutting time into segments gives two of them: the segment and the frame in it. Frame numbers are sums: position on
    the axis times ``weight``, over all digits.

    Attributes:
        dim: the tensor's axis.
        size: how many positions.
        inner: the size of what varies faster within the same axis (1 unless axes were merged).
        weight: frames from one position to the next.
        count: positions for a given number of input samples.
    """

    dim: int
    size: int
    inner: int = 1
    weight: int = 1
    count: Count = NO_STEPS


@dataclass(frozen=True)
class Mark:
    """The time axis of one tensor.

    Attributes:
        digits: where time lies, slowest first; none if there is no time axis (any more).
        first: the first input sample of frame t.
        last: the last one.
        clear: the frames that see no padding, from the first to the one after the last.
        whole: what mixes all frames, such as an attention: the receptive field is the whole input then.
        statistics: what gave every frame a statistic over all frames, such as a GroupNorm.
        fixed: why the places of the frames hold for this input length only.
        unknown: why nothing is known, or None.
    """

    digits: tuple[Digit, ...] = ()
    first: Line = IDENTITY
    last: Line = IDENTITY
    clear: tuple[int, int] = (0, 0)
    whole: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    unknown: str | None = None

    @property
    def dims(self) -> set[int]:
        """The axes that time lies on."""
        return {digit.dim for digit in self.digits}

    def on(self, dim: int) -> Digit | None:
        """Returns the digit on an axis, if there is exactly one."""
        found = [digit for digit in self.digits if digit.dim == dim]
        return found[0] if len(found) == 1 else None

    def moved(self, where: Callable[[int], int]) -> Mark:
        """Returns the mark with the axes renumbered."""
        return replace(self, digits=tuple(replace(digit, dim=where(digit.dim)) for digit in self.digits))

    def with_reasons(self, other: Mark) -> Mark:
        """Returns the mark with another's remarks added."""
        return replace(
            self,
            whole=_union(self.whole, other.whole),
            statistics=_union(self.statistics, other.statistics),
            fixed=_union(self.fixed, other.fixed),
        )

    def spread(self, before: int, after: int) -> Mark:
        """Returns the mark of frames that each reach from ``before`` frames earlier to ``after`` later."""
        clear = (self.clear[0] + before, self.clear[1] - after)
        return replace(self, first=self.first.of(1, -before), last=self.last.of(1, after), clear=clear)

    def within(self, frames: int) -> Mark:
        """Returns the mark of a tensor that has frames 0 to ``frames`` - 1, and so no others to see."""
        low, high = max(0, self.clear[0]), min(frames, self.clear[1])
        return replace(self, clear=(low, max(low, high)))


def unknown(why: str) -> Mark:
    """Returns the mark of a tensor that depends on the input in a way that is not followed."""
    return Mark(unknown=why)


def _union(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return a if not b else tuple(dict.fromkeys((*a, *b)))


def normal(mark: Mark) -> Mark:
    """Writes a mark on one axis so that positions are frames, which makes equal marks compare equal."""
    if len(mark.digits) != 1 or mark.digits[0].weight == 1:
        return mark
    digit = mark.digits[0]
    times = digit.weight
    return replace(
        mark,
        digits=(replace(digit, weight=1),),
        first=mark.first.of(times, 0),
        last=mark.last.of(times, 0),
        clear=(-(-mark.clear[0] // times), -(-mark.clear[1] // times)),
    )


def as_axis(mark: Mark, dim: int, size: int) -> Mark | None:
    """Returns the mark with an axis of that size counting frames and nothing else, or None where it does not.

    An axis that holds each frame several times over (a repetition, or a sub-pixel shuffle) has finer frames.
    """
    digit = mark.on(dim)
    if digit is None:
        return None
    if digit.inner == 1 and digit.size == size:
        return mark
    if digit.inner * digit.size != size or len(mark.digits) > 1:
        return None
    times = digit.inner
    whole = replace(mark, digits=(replace(digit, inner=1),))
    return resampled(whole, dim, (1, 0, times), (1, 0, times), size, Affine(times, 0, 1))


def windowed(mark: Mark, dim: int, *, stride: int, before: int, taps: int, dilation: int, size: int, step: Any) -> Mark:
    """Returns the mark after a window slides over an axis: frame x sees x·stride - before + dilation·(0, …, taps - 1)."""
    digit = mark.on(dim)
    assert digit is not None
    if not (mark.first.grows and mark.last.grows):
        return unknown("a window over frames that a strided and dilated transposed convolution left in no order")
    reach = dilation * (taps - 1) - before
    moved = mark.spread(before * digit.weight, reach * digit.weight)
    new = replace(digit, size=size, weight=digit.weight * stride, count=digit.count.then(step))
    found = normal(replace(moved, digits=tuple(new if one is digit else one for one in mark.digits)))
    return found.within(size) if len(mark.digits) == 1 else found


def resampled(
    mark: Mark, dim: int, first: tuple[int, int, int], last: tuple[int, int, int], size: int, step: Any
) -> Mark:
    """Returns the mark after an axis is resampled: frame x sees ⌊(a·x + b) / c⌋ for (a, b, c) = first, to that of last."""
    mark = normal(mark)
    digit = mark.on(dim)
    if digit is None or len(mark.digits) > 1:
        return unknown("segments were resampled")
    new = replace(digit, size=size, count=digit.count.then(step))
    # The first frame with ⌊(a·x + b) / c⌋ >= low, and the first with ⌊(a·x + b) / c⌋ >= high.
    low = -((first[1] - mark.clear[0] * first[2]) // first[0])
    high = -((last[1] - mark.clear[1] * last[2]) // last[0])
    moved = replace(mark, digits=(new,), first=mark.first.of(*first), last=mark.last.of(*last), clear=(low, high))
    return moved.within(size)


def reduced(mark: Mark, dims: Sequence[int], why: str, *, mixes: bool) -> Mark:
    """Returns the mark after axes were reduced, the axes themselves kept.

    If time is left on other axes, each frame sees the frames that were reduced into it. If none is left, the result sees
    the whole input: as a statistic (``mixes=False``), or as something that mixes frames.
    """
    gone = [digit for digit in mark.digits if digit.dim in dims]
    if not gone:
        return mark
    left = tuple(digit for digit in mark.digits if digit.dim not in dims)
    if not left:
        reason = Mark(whole=(why,) if mixes else (), statistics=() if mixes else (why,))
        return replace(mark, digits=()).with_reasons(reason)
    reach = sum((digit.size - 1) * digit.weight for digit in gone)
    return normal(replace(mark.spread(0, reach), digits=left))


def joined(marks: Sequence[Mark], what: str) -> Mark | None:
    """Returns the mark of frames that are computed from the frames of several tensors at the same place."""
    found: Mark | None = None
    for mark in marks:
        found = mark if found is None else _pair(found, mark, what)
    return found


def _pair(a: Mark, b: Mark, what: str) -> Mark:
    if a.unknown or b.unknown:
        return a if a.unknown else b
    if not a.digits or not b.digits:
        return (a if a.digits else b).with_reasons(b if a.digits else a)
    a, b = normal(a), normal(b)
    both = replace(a.with_reasons(b), clear=(max(a.clear[0], b.clear[0]), min(a.clear[1], b.clear[1])))
    if (a.first, a.last) == (b.first, b.last) and _same_places(a, b):
        return replace(both, digits=_certain(a, b))
    if not _same_places(a, b):
        return unknown(f"{what}: the time axes of its operands do not lie on each other")
    if a.first.slope != b.first.slope:
        return unknown(f"{what}: its operands have {a.first.slope} and {b.first.slope} samples a frame")
    first, last = a.first.with_(b.first, min), a.last.with_(b.last, max)
    return replace(both, digits=_certain(a, b), first=first, last=last)


def _same_places(a: Mark, b: Mark) -> bool:
    key = [[(digit.dim, digit.size, digit.inner, digit.weight) for digit in mark.digits] for mark in (a, b)]
    return key[0] == key[1]


def _certain(a: Mark, b: Mark) -> tuple[Digit, ...]:
    """The digits of two operands, each with the count that was less guessed."""
    pairs = zip(a.digits, b.digits, strict=True)
    return tuple(y if len(y.count.guesses()) < len(x.count.guesses()) else x for x, y in pairs)


def appended(pieces: Sequence[tuple[Mark | None, int]], dim: int, what: str) -> Mark | None:
    """Returns the mark of tensors joined along an axis; ``pieces`` are their marks and sizes there.

    Along time, a piece without a mark counts as padding, and the others must continue each other.
    """
    marks = [mark for mark, _ in pieces if mark is not None]
    if not marks:
        return None
    broken = next((mark for mark in marks if mark.unknown), None)
    if broken is not None:
        return broken
    if not any(dim in mark.dims for mark in marks):
        return joined(marks, what)
    total = sum(size for _, size in pieces)
    found: Mark | None = None
    counts: list[Count] = []
    offset = 0
    for mark, size in pieces:
        if mark is None:
            counts.append(Count((Fixed(size),)))
        else:
            clean = as_axis(mark, dim, size)
            if clean is None:
                return unknown(f"{what} along time: one of its pieces has no time axis there")
            piece = normal(clean)
            counts.append(piece.digits[0].count)
            placed = _placed(piece, dim, offset, total)
            if placed is None or (found is not None and not _continues(found, placed)):
                return unknown(f"{what} along time: its pieces do not continue each other")
            found = placed if found is None else longer(found.with_reasons(placed), placed)
        offset += size
    assert found is not None
    return _with_count(found, counts, len(marks), pieces)


def _placed(mark: Mark, dim: int, offset: int, total: int) -> Mark | None:
    """A piece's mark in the numbering of the whole."""
    if len(mark.digits) != 1:
        return None
    moved = mark.spread(offset, -offset)
    return replace(moved, digits=(replace(mark.digits[0], size=total),))


def longer(a: Mark, b: Mark) -> Mark:
    """Adds a piece's clear frames: to those before, if they go on there, or instead of them, if they are more."""
    if a.clear[1] >= b.clear[0]:
        return replace(a, clear=(a.clear[0], max(a.clear[1], b.clear[1])))
    return a if a.clear[1] - a.clear[0] >= b.clear[1] - b.clear[0] else replace(a, clear=b.clear)


def _continues(a: Mark, b: Mark) -> bool:
    return (a.first, a.last) == (b.first, b.last)


def _with_count(mark: Mark, counts: list[Count], marked: int, pieces: Sequence[tuple[Mark | None, int]]) -> Mark:
    digit = mark.digits[0]
    if marked == 1:
        own = next(normal(piece).digits[0].count for piece, _ in pieces if piece is not None)
        count = own.then(Affine(1, sum(size for piece, size in pieces if piece is None), 1))
    else:
        count = _tiled(counts) or Count((Sum(tuple(counts)),))
    return replace(mark, digits=(replace(digit, count=count),))


def _tiled(counts: list[Count]) -> Count | None:
    """The count of slices that together are all frames of one tensor, in order: that of the tensor. None for others."""
    before = counts[0].steps[:-1]
    at: int | None = 0
    for count in counts:
        last = count.steps[-1] if count.steps else None
        if count.steps[:-1] != before or not isinstance(last, Guess) or last.given is None or last.given[0] != at:
            return None
        at = last.given[1]
    frames = last.n if isinstance(last, Guess) else 0
    if at not in (None, frames):
        return None
    return Count(before).then(Guess("pieces joined again", frames, frames, Affine(1, 0, 1), Fixed(frames)))
