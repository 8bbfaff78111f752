"""What joining tensors does to the time axis: element by element, piece after piece, and as one axis against another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from convtap._time.axis import LONGEST, Line, TooFine, line
from convtap._time.axis_count import Affine, Count, Fixed, Guess, Sum
from convtap._time.mark import Digit, Mark, as_axis, collapsed, normal, unknown


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
    if a.dims != b.dims:
        a, b = normal(collapsed(a, what)), normal(collapsed(b, what))
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
    placed: list[tuple[Mark, Count, int] | None] = []
    offset = 0
    for mark, size in pieces:
        piece = None if mark is None else as_axis(mark, dim, size)
        if mark is not None and (piece is None or len(piece.digits) != 1):
            return unknown(f"{what} along time: one of its pieces has no time axis there")
        placed.append(None if piece is None else _placed(normal(piece), offset, total, ends=offset + size == total))
        offset += size
    sizes = [size for _, size in pieces]
    body = max((i for i, piece in enumerate(placed) if piece is not None), key=lambda i: sizes[i])
    found = _continued(placed, sizes, body, what)
    return found if found.unknown else _with_count(found, placed, sizes)


#: A piece of a concatenation: its mark in the numbering of the whole, its own count, and where it begins.
_Piece = tuple[Mark, Count, int]


def _placed(mark: Mark, offset: int, total: int, *, ends: bool) -> _Piece:
    """Puts a piece into the numbering of the whole."""
    digit = mark.digits[0]
    moved = mark if ends else mark.looks(digit.dim, "padding")
    return replace(moved.spread(offset, -offset), digits=(replace(digit, size=total),)), digit.count, offset


def _continued(placed: Sequence[_Piece | None], sizes: Sequence[int], body: int, what: str) -> Mark:
    """The mark of pieces that continue each other; a short copy of frames of the longest one counts as padding."""
    longest = placed[body]
    assert longest is not None
    found = longest[0]
    for i in sorted(range(len(placed)), key=lambda i: abs(i - body))[1:]:
        piece = placed[i]
        if piece is None:
            continue
        mark = piece[0]
        if (mark.first, mark.last) == (found.first, found.last):
            found = longer(found.with_reasons(mark), mark) if i > body else longer(mark.with_reasons(found), found)
            continue
        at = _copy_of(piece, longest, sizes[i], sizes[body])
        if at is None:
            return unknown(f"{what} along time: its pieces do not continue each other")
        # frames near the end that are copied to the front come from the padding, if there is any
        found = found.mixes(what) if i < body and at > 0 else found
    return found


def _copy_of(piece: _Piece, body: _Piece, size: int, whole: int) -> int | None:
    """From which frame of the longest piece on a piece copies, or None if it does not."""
    a, b = piece[0].first.of(1, piece[2]), body[0].first.of(1, body[2])
    ahead = a(0) - b(0)
    if size >= whole or a.slope != b.slope or not b.rise or (ahead * b.period) % b.rise:
        return None
    at = ahead * b.period // b.rise
    same = all(
        theirs.of(1, piece[2]) == ours.of(1, body[2] + at)
        for theirs, ours in ((piece[0].first, body[0].first), (piece[0].last, body[0].last))
    )
    return at if same and -size <= at <= whole else None


def longer(a: Mark, b: Mark) -> Mark:
    """Adds a piece's clear frames: to those before, if they go on there, or instead of them, if they are more."""
    if a.clear[1] >= b.clear[0]:
        return replace(a, clear=(a.clear[0], max(a.clear[1], b.clear[1])))
    return a if a.clear[1] - a.clear[0] >= b.clear[1] - b.clear[0] else replace(a, clear=b.clear)


def _with_count(mark: Mark, placed: Sequence[_Piece | None], sizes: Sequence[int]) -> Mark:
    digit = mark.digits[0]
    marked = [piece for piece in placed if piece is not None]
    if len(marked) == 1:
        constant = sum(size for piece, size in zip(placed, sizes, strict=True) if piece is None)
        return replace(mark, digits=(replace(digit, count=marked[0][1].then(Affine(1, constant, 1))),))
    pairs = zip(placed, sizes, strict=True)
    counts = [Count((Fixed(size),)) if piece is None else piece[1] for piece, size in pairs]
    return replace(mark, digits=(replace(digit, count=_tiled(counts) or Count((Sum(tuple(counts)),))),))


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


def stacked(marks: Sequence[Mark | None], dim: int, what: str) -> Mark | None:
    """Returns the mark of tensors stacked along a new axis ``dim``.

    If their frames see different samples, the new axis counts frames too: stacking two of them and merging the axes is an
    upsampling, whose even and odd frames come from one tensor each.
    """
    known = [mark for mark in marks if mark is not None]
    found = joined(known, what)
    if found is None or found.unknown:
        return found
    parts = [mark and normal(collapsed(mark, what)) for mark in marks]
    found = joined([mark for mark in parts if mark is not None], what) or found
    found = found.moved(lambda one: one + (one >= dim))
    lines = {mark and (mark.first, mark.last) for mark in parts}
    if len(lines) < 2 or len(found.digits) != 1 or not all(mark is None or mark.digits for mark in parts):
        return found
    times, digit = len(parts), found.digits[0]
    clear = [mark.clear for mark in parts if mark is not None]
    new = Digit(dim, times, count=Count((Fixed(times),)), stacked=True)
    return replace(
        found,
        digits=(replace(digit, weight=times), new),
        first=_interleaved([None if mark is None else mark.first for mark in parts], ahead=True),
        last=_interleaved([None if mark is None else mark.last for mark in parts], ahead=False),
        clear=(max(low for low, _ in clear) * times, min(high for _, high in clear) * times),
        edge=None if found.edge is None else found.edge.of(1, 0, times),
    )


def _interleaved(lines: Sequence[Line | None], *, ahead: bool) -> Line:
    """Returns t ↦ lines[t mod k](⌊t / k⌋). For what is constant, the next one that is not, or the one before."""
    times = len(lines)
    known = [one for one in lines if one is not None]
    period = math.lcm(*(one.period for one in known))
    if period * times > LONGEST:
        raise TooFine

    def value(t: int) -> int:
        while (one := lines[t % times]) is None:
            t += 1 if ahead else -1
        return one(t // times)

    return line([value(t) for t in range(period * times)], known[0].rise * period // known[0].period)


# -- one axis against another

# Note: [Frames against frames]
# Assumption: a tensor has one time axis.
# Failure: the scores of an attention have two, queries and keys. Which of them is summed away next decides on whose frames
#   the result has, and a mask over the other one on what these see.
# Choice: such a mark has a second one, ``across``. A rule looks at one of the two at a time, as if the other axis were not
#   time, and the results are put together again.


def paired(a: Mark, b: Mark, what: str) -> Mark:
    """Returns the mark of frames against frames, each on its own axis, or of what is left of them."""
    if a.unknown or b.unknown:
        return a if a.unknown else b
    if a.across or b.across:
        return unknown(f"{what}: frames against frames against frames")
    if not a.digits or not b.digits:
        return (a if a.digits else b).with_reasons(b if a.digits else a)
    if a.dims == b.dims:
        return joined([a, b], what) or a
    if a.dims < b.dims or b.dims < a.dims:
        # one axis within segments, and the segments themselves
        kept, gone = (b, a) if a.dims < b.dims else (a, b)
        return kept.with_reasons(gone).with_reasons(Mark(whole=(what,))).mixes(what)
    first, second = sorted((a, b), key=lambda mark: sorted(mark.dims))
    return replace(first, paired=True, across=replace(second, paired=True))


def halves(mark: Mark) -> tuple[Mark, Mark]:
    """Returns the two axes of a mark of frames against frames, each as a mark of its own."""
    assert mark.across is not None
    return replace(mark, across=None), mark.across


def each_axis(rule: Callable[[int], Mark | None], what: str) -> Mark | None:
    """Runs a rule for the first axis and for the second one, and puts the results together."""
    first, second = rule(0), rule(1)
    if first is None or second is None:
        return second if first is None else first
    return paired(replace(first, paired=False), replace(second, paired=False), what)
