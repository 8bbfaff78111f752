"""The mark of a tensor: where its time axis lies and which samples its frames see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convtap._time.axis import IDENTITY, Floor, Line
from convtap._time.axis_count import Affine, Digit
from convtap._time.edge import Edge, Mixed, Moved, PastEnd, earliest


@dataclass(frozen=True)
class Mark:
    """The time axis of one tensor.

    Attributes:
        digits: the axes that count frames, slowest first; empty without a time axis.
        first: the first input sample of frame t.
        last: the last input sample of frame t.
        clear: the frames that see no padding, from the first to the one after the last.
        whole: the operations that mix all frames, such as an attention. The receptive field is then the whole input.
        statistics: the operations that use a statistic over all frames, such as a GroupNorm.
        fixed: why the places of the frames hold for this input length only.
        unknown: why the time axis is unknown, or None.
        edge: the first frame of a padded input that may differ from the input alone. See Note: [Padded inputs].
        across: the second time axis of a matrix of frames against frames, such as attention scores, or None.
        paired: whether it is one of the two axes of such a matrix.
        zeroed: the edge when a mask set the padding to zero, if no operation has changed that since; else None.
        hides: the frames that the weights along such an axis hide: ``"later"`` ones, the ``"padding"``, or None.
    """

    digits: tuple[Digit, ...] = ()
    first: Line = IDENTITY
    last: Line = IDENTITY
    clear: tuple[int, int] = (0, 0)
    whole: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    unknown: str | None = None
    edge: Edge | None = None
    across: Mark | None = None
    paired: bool = False
    zeroed: Edge | None = None
    hides: str | None = None

    @property
    def dims(self) -> set[int]:
        """The axes of the tensor that count frames."""
        return {digit.dim for digit in self.digits}

    @property
    def grows(self) -> bool:
        """Whether a later frame never sees earlier samples."""
        return self.first.grows and self.last.grows

    def on(self, dim: int) -> Digit | None:
        """Returns the digit on an axis, if there is exactly one."""
        found = [digit for digit in self.digits if digit.dim == dim]
        return found[0] if len(found) == 1 else None

    def moved(self, where: Callable[[int], int]) -> Mark:
        """Returns the mark with the axes renumbered."""
        across = None if self.across is None else self.across.moved(where)
        return replace(self, digits=tuple(replace(digit, dim=where(digit.dim)) for digit in self.digits), across=across)

    def swapped(self, digit: Digit, *new: Digit) -> Mark:
        """Returns the mark with one digit replaced by others, or removed."""
        at = next(i for i, one in enumerate(self.digits) if one is digit)
        return replace(self, digits=(*self.digits[:at], *new, *self.digits[at + 1 :]))

    def with_reasons(self, other: Mark) -> Mark:
        """Returns the mark with the remarks of another one added."""
        return replace(
            self,
            whole=_union(self.whole, other.whole),
            statistics=_union(self.statistics, other.statistics),
            fixed=_union(self.fixed, other.fixed),
            edge=earliest((self.edge, other.edge)),
        )

    # -- what the frames see

    def seeing(self, first: Floor, last: Floor) -> Mark:
        """Returns the mark of frames t that see frames ⌊first(t)⌋ to ⌊last(t)⌋.

        Both are (times·t + plus) / over.
        """
        # the first t whose window begins at a clear frame, and the first whose window ends past them
        low = -((first[1] - self.clear[0] * first[2]) // first[0])
        high = -((last[1] - self.clear[1] * last[2]) // last[0])
        edge = self.edge if self.edge is None or last == (1, 0, 1) else Edge(Moved(*last), self.edge)
        return replace(self, first=self.first.of(*first), last=self.last.of(*last), clear=(low, high), edge=edge)

    def spread(self, before: int, after: int) -> Mark:
        """Returns the mark of frames t that see frames t - ``before`` to t + ``after``."""
        return self.seeing((1, -before, 1), (1, after, 1))

    def within(self, frames: int) -> Mark:
        """Returns the mark of a tensor that has only the frames 0 to ``frames`` - 1."""
        low, high = max(0, self.clear[0]), min(frames, self.clear[1])
        return replace(self, clear=(low, max(low, high)))

    def mixes(self, what: str, dims: Sequence[int] | None = None, *, sums: bool = False) -> Mark:
        """Returns the mark after the operation ``what`` has mixed the frames on some axes.

        Its edge is the first frame. A sum (``sums=True``) does not depend on padding that was set to zero.
        """
        edge = self.edge
        if edge is None or self.hides == "later":
            return self
        gone = [digit for digit in self.digits if dims is None or digit.dim in dims]
        slowest = max(gone, key=lambda digit: digit.weight, default=None)
        if slowest is not None and (self.hides == "padding" or (sums and self.zeroed is edge)):
            return replace(self, edge=Edge(Mixed(what, masked=slowest), edge))
        edge = edge if slowest is None else Edge(PastEnd(slowest, what), edge)
        return replace(self, edge=Edge(Mixed(what), edge))

    def looks(self, dim: int, what: str, *, zeros: bool = False) -> Mark:
        """Returns the mark after an operation that may look past an axis's last frame.

        With ``zeros``, the operation's own padding is zeros.
        """
        digit = self.on(dim)
        if self.edge is None or digit is None:
            return self
        zeros = zeros and self.zeroed is self.edge
        return replace(self, edge=Edge(PastEnd(digit, what, zeros), self.edge))


def unknown(why: str) -> Mark:
    """Returns the mark of a tensor that depends on the input in an unknown way."""
    return Mark(unknown=why)


def _union(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return a if not b else tuple(dict.fromkeys((*a, *b)))


def normal(mark: Mark) -> Mark:
    """Renumbers the frames of a mark on one axis, so that equal marks compare equal.

    Positions on the axis are then frames.
    """
    if len(mark.digits) != 1 or mark.digits[0].weight == 1:
        return mark
    (digit,) = mark.digits
    every = (digit.weight, 0, 1)
    return replace(mark.seeing(every, every), digits=(replace(digit, weight=1),))


def as_axis(mark: Mark, dim: int, size: int, what: str) -> Mark:
    """Returns the mark with an axis that counts only frames, or an unknown mark.

    An axis that holds each frame several times over (a repetition, or a sub-pixel shuffle) has finer frames.
    """
    digit = mark.on(dim)
    if digit is not None and digit.inner == 1 and digit.size == size:
        return mark
    if digit is None or digit.inner * digit.size != size or len(mark.digits) > 1:
        return unknown(f"{what}: time shares the axis with something else")
    times = digit.inner
    whole = mark.swapped(digit, replace(digit, inner=1))
    return resampled(whole, dim, (1, 0, times), (1, 0, times), size, Affine(times, 0, 1))


#: The maximum number of frames whose hull is computed one by one.
_MOST = 256


def hull(mark: Mark, places: Sequence[int]) -> Mark:
    """Returns the mark of frames t that see the frames t + ``places``, in order."""
    wide = mark.spread(-places[0], places[-1])
    if len(places) == 1 or mark.grows:
        return wide
    if len(places) > _MOST:
        return unknown("a window over frames that lie in no order")
    first, last = mark.first.of(1, places[0]), mark.last.of(1, places[0])
    for place in places[1:]:
        first = first.with_(mark.first.of(1, place), min)
        last = last.with_(mark.last.of(1, place), max)
    return replace(wide, first=first, last=last)


def windowed(
    mark: Mark,
    dim: int,
    step: Any,
    *,
    stride: int = 1,
    before: int,
    taps: int = 1,
    dilation: int = 1,
    what: str = "same padding",
    zeros: bool = False,
) -> Mark:
    """Returns the mark after a window has slid over an axis.

    Frame x sees x·stride - before + dilation·(0, …, taps - 1).
    """
    mark = mark.looks(dim, what, zeros=zeros)
    digit = mark.on(dim)
    assert digit is not None
    moved = hull(mark, [(dilation * tap - before) * digit.weight for tap in range(taps)])
    if moved.unknown:
        return moved
    size = step(digit.size)
    new = replace(digit, size=size, weight=digit.weight * stride, count=digit.count.then(step))
    found = normal(moved.swapped(digit, new))
    if len(mark.digits) == 1:
        return found.within(size)
    # if each segment is padded, every frame may see padding
    inside = before <= 0 and (size - 1) * stride - before + dilation * (taps - 1) < digit.size
    return found if inside else replace(found, clear=(0, 0))


def resampled(mark: Mark, dim: int, first: Floor, last: Floor, size: int, step: Any) -> Mark:
    """Returns the mark after an axis was resampled.

    Frame x sees frames ⌊first(x)⌋ to ⌊last(x)⌋.
    """
    mark = normal(mark)
    digit = mark.on(dim)
    if digit is None or len(mark.digits) > 1:
        return unknown("segments were resampled")
    if not mark.grows and first != last:
        return unknown("frames that lie in no order were resampled")
    new = replace(digit, size=size, count=digit.count.then(step))
    return replace(mark.looks(dim, "resampling").seeing(first, last), digits=(new,)).within(size)


def reduced(mark: Mark, dims: Sequence[int], why: str, *, mixes: bool, sums: bool = False) -> Mark:
    """Returns the mark after a reduction over axes that keeps the axes.

    If other axes still count frames, each frame sees the frames that were reduced into it. If none does, the result sees
    the whole input, as a statistic (``mixes=False``) or as a mix of frames. ``sums`` says that it is a sum.
    """
    gone = [digit for digit in mark.digits if digit.dim in dims]
    left = tuple(digit for digit in mark.digits if digit.dim not in dims)
    if not gone:
        return mark
    if not left:
        reason = Mark(whole=(why,) if mixes else (), statistics=() if mixes else (why,))
        found = mark.mixes(why, dims, sums=sums).with_reasons(reason)
        return replace(found, digits=(), paired=False, hides=None)
    places = [0]
    for digit in gone:
        # the last position is enough if spans grow with the frames
        ends = (0, digit.size - 1) if mark.grows else range(digit.size)
        places = sorted({at + i * digit.weight for at in places for i in ends})
    found = hull(mark, places)
    return found if found.unknown else normal(replace(found, digits=left))


def collapsed(mark: Mark, what: str) -> Mark:
    """Returns the mark with stacked tensors merged into one.

    Its frames see the samples that a frame of any of them sees.
    """
    dims = [digit.dim for digit in mark.digits if digit.stacked]
    return reduced(mark, dims, what, mixes=False) if dims and len(dims) < len(mark.digits) else mark


def in_pieces(mark: Mark, shape: tuple[int, ...]) -> str | None:
    """Returns why an output's frames cannot be numbered, or None."""
    if mark.across is not None:
        return f"its output {shape} has frames on two axes, those of the queries and those of the keys"
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or shape[digit.dim] in (digit.size, digit.inner * digit.size):
        return None
    return f"time shares axis {digit.dim} of its output {shape} with something else"
