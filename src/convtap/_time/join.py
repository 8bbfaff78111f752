"""Rules of the time axis for operations that join tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from convtap._time.axis import LONGEST, Line, TooFine, line
from convtap._time.axis_count import Affine, Count, Digit, Fixed, Guess, Sum
from convtap._time.mark import Mark, as_axis, collapsed, normal, unknown
from convtap._time.operation import Op


def joined(marks: Sequence[Mark], what: str) -> Mark | None:
    """Returns the mark of tensors that are combined element by element."""
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
    places = [[(digit.dim, digit.size, digit.inner, digit.weight) for digit in mark.digits] for mark in (a, b)]
    if places[0] != places[1]:
        return unknown(f"{what}: the time axes of its operands do not align")
    if a.first.slope != b.first.slope:
        return unknown(f"{what}: its operands have {a.first.slope} and {b.first.slope} samples per frame")
    return replace(
        a.with_reasons(b),
        digits=tuple(_surer(x, y) for x, y in zip(a.digits, b.digits, strict=True)),
        first=a.first.with_(b.first, min),
        last=a.last.with_(b.last, max),
        clear=(max(a.clear[0], b.clear[0]), min(a.clear[1], b.clear[1])),
    )


def _surer(a: Digit, b: Digit) -> Digit:
    """Returns the digit whose count has fewer guesses."""
    return b if len(b.count.guesses()) < len(a.count.guesses()) else a


def plain_axis(mark: Mark, shape: Sequence[int], what: str) -> Mark:
    """Renumbers an axis that repeats its frames, to compare it with another operand's."""
    digit = mark.digits[0] if len(mark.digits) == 1 else None
    if digit is None or digit.inner == 1:
        return mark
    axis = as_axis(mark, digit.dim, int(shape[digit.dim]), what)
    return mark if axis.unknown else axis


def longer(a: Mark, b: Mark) -> Mark:
    """Returns ``a`` with the clear frames of ``b`` added.

    If the two ranges do not touch, the longer one is kept.
    """
    if a.clear[1] >= b.clear[0]:
        return replace(a, clear=(a.clear[0], max(a.clear[1], b.clear[1])))
    return a if a.clear[1] - a.clear[0] >= b.clear[1] - b.clear[0] else replace(a, clear=b.clear)


def stacked(marks: Sequence[Mark | None], dim: int, what: str) -> Mark | None:
    """Returns the mark of tensors stacked along a new axis ``dim``.

    If their frames see different samples, the new axis counts frames too. Stacking two tensors and merging the axes is an
    upsampling whose even frames come from one tensor and whose odd frames come from the other.
    """
    found = joined([mark for mark in marks if mark is not None], what)
    if found is None or found.unknown:
        return found
    parts = [mark and normal(collapsed(mark, what)) for mark in marks]
    known = [mark for mark in parts if mark is not None]
    found = joined(known, what) or found
    found = found.moved(lambda one: one + (one >= dim))
    lines = {mark and (mark.first, mark.last) for mark in parts}
    if len(lines) < 2 or len(found.digits) != 1 or not all(mark.digits for mark in known):
        return found
    times, digit = len(parts), found.digits[0]
    clear = (max(mark.clear[0] for mark in known), min(mark.clear[1] for mark in known))
    found = replace(found, clear=clear).seeing((1, 0, times), (1, 0, times))
    new = Digit(dim, times, count=Count((Fixed(times),)), stacked=True)
    return replace(
        found,
        digits=(replace(digit, weight=times), new),
        first=_interleaved([None if mark is None else mark.first for mark in parts], ahead=True),
        last=_interleaved([None if mark is None else mark.last for mark in parts], ahead=False),
    )


def _interleaved(lines: Sequence[Line | None], *, ahead: bool) -> Line:
    """Returns t ↦ lines[t mod k](⌊t / k⌋).

    A constant (None) takes the next line (``ahead``), or the previous one.
    """
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


# -- piece after piece


def cat(op: Op) -> Mark | None:
    """The rule of ``cat(tensors, dim)``.

    Along time, a constant piece counts as padding, and the others must continue each other.
    """
    tensors = [tensor for tensor in op.args[0] if tensor.dim() > 1 or tensor.numel()]
    dim = int(op.arg(1, "dim", 0)) % tensors[0].dim()
    marks = [(mark := op.mark(tensor)) and plain_axis(mark, tensor.shape, op.what) for tensor in tensors]
    known = [mark for mark in marks if mark is not None]
    broken = next((mark for mark in known if mark.unknown), None)
    if broken is not None or not any(dim in mark.dims for mark in known):
        return broken or joined(known, op.what)
    pieces: list[_Piece] = []
    offset, total = 0, sum(int(tensor.shape[dim]) for tensor in tensors)
    for mark, tensor in zip(marks, tensors, strict=True):
        size = int(tensor.shape[dim])
        piece = mark and as_axis(mark, dim, size, op.what)
        if piece is not None and len(piece.digits) != 1:
            return unknown(f"{op.what} along time: one of its pieces has no time axis there")
        pieces.append(_placed(piece and normal(piece), dim, size, offset, total))
        offset += size
    found = _continued(pieces, op.what)
    if found.unknown:
        return found
    return replace(found, digits=(replace(found.digits[0], size=total, count=_count(pieces)),))


@dataclass(frozen=True)
class _Piece:
    """A piece of a concatenation.

    Attributes:
        mark: its mark in the numbering of the whole; None for a constant.
        count: its number of frames for a number of samples.
        size: its number of frames for the example.
        offset: its first frame in the whole.
    """

    mark: Mark | None
    count: Count
    size: int
    offset: int


def _placed(mark: Mark | None, dim: int, size: int, offset: int, total: int) -> _Piece:
    """Renumbers the frames of a piece as frames of the whole."""
    if mark is None:
        return _Piece(None, Count((Fixed(size),)), size, offset)
    count = mark.digits[0].count
    mark = mark if offset + size == total else mark.looks(dim, "padding")
    return _Piece(mark.spread(offset, -offset), count, size, offset)


def _continued(pieces: Sequence[_Piece], what: str) -> Mark:
    """Returns the mark of pieces that continue each other.

    A short copy of frames of the longest piece counts as padding.
    """
    known = [i for i, piece in enumerate(pieces) if piece.mark is not None]
    body = max(known, key=lambda i: pieces[i].size)
    whole = pieces[body].mark or Mark()
    for i in sorted(known, key=lambda i: abs(i - body))[1:]:
        mark = pieces[i].mark or Mark()
        if (mark.first, mark.last) == (whole.first, whole.last):
            whole = longer(whole.with_reasons(mark), mark) if i > body else longer(mark.with_reasons(whole), whole)
            continue
        source = _copied_from(pieces[i], pieces[body])
        if source is None:
            return unknown(f"{what} along time: its pieces do not continue each other")
        # frames near the end that are copied to the front come from the padding, if there is any
        whole = whole.mixes(what) if i < body and source > 0 else whole
    return whole


def _copied_from(piece: _Piece, body: _Piece) -> int | None:
    """Returns the frame of the longest piece that a copy starts with, or None."""
    if piece.mark is None or body.mark is None:
        return None
    a, b = piece.mark.first.of(1, piece.offset), body.mark.first.of(1, body.offset)
    ahead = a(0) - b(0)
    if piece.size >= body.size or a.slope != b.slope or not b.rise or (ahead * b.period) % b.rise:
        return None
    at = ahead * b.period // b.rise
    same = all(
        theirs.of(1, piece.offset) == ours.of(1, body.offset + at)
        for theirs, ours in ((piece.mark.first, body.mark.first), (piece.mark.last, body.mark.last))
    )
    return at if same and -piece.size <= at <= body.size else None


def _count(pieces: Sequence[_Piece]) -> Count:
    """Returns the number of frames of all pieces together."""
    known = [piece for piece in pieces if piece.mark is not None]
    if len(known) == 1:
        constant = sum(piece.size for piece in pieces if piece.mark is None)
        return known[0].count.then(Affine(1, constant, 1))
    counts = [piece.count for piece in pieces]
    return _tiled(counts) or Count((Sum(tuple(counts)),))


def _tiled(counts: list[Count]) -> Count | None:
    """Returns a tensor's count if the pieces are slices that make up the tensor.

    Returns None for other pieces.
    """
    before = counts[0].steps[:-1]
    at: int | None = 0
    frames = 0
    for count in counts:
        last = count.steps[-1] if count.steps else None
        if count.steps[:-1] != before or not isinstance(last, Guess) or last.given is None or last.given[0] != at:
            return None
        at, frames = last.given[1], last.n
    if at not in (None, frames):
        return None
    return Count(before).then(Guess("pieces joined again", frames, Affine(1, 0, 1)))


# -- one axis against another

# Note: [Frames against frames]
# Assumption: a tensor has one time axis.
# Failure: the scores of an attention have two, queries and keys. The next operation sums over one of them, so the result
#   has the frames of the other one, and a mask decides what these see.
# Choice: such a mark has a second one, ``across``. A rule looks at one of the two at a time, as if the other axis were not
#   time, and the results are combined.


def paired(a: Mark, b: Mark, what: str) -> Mark:
    """Returns the mark of a product of two tensors, whose time axes may differ."""
    if a.unknown or b.unknown:
        return a if a.unknown else b
    if a.across or b.across:
        return unknown(f"{what}: its result has frames on three axes")
    if not a.digits or not b.digits or a.dims == b.dims:
        return _pair(a, b, what)
    if a.dims < b.dims or b.dims < a.dims:
        # one axis within segments, and the segments themselves
        kept, gone = (b, a) if a.dims < b.dims else (a, b)
        return kept.with_reasons(gone).with_reasons(Mark(whole=(what,))).mixes(what)
    first, second = sorted((a, b), key=lambda mark: sorted(mark.dims))
    return replace(first, paired=True, across=replace(second, paired=True))


def halves(mark: Mark) -> tuple[Mark, Mark]:
    """Returns the two axes of a mark of frames against frames, as two marks."""
    assert mark.across is not None
    return replace(mark, across=None), mark.across


def each_axis(rule: Callable[[int], Mark | None], what: str) -> Mark | None:
    """Runs a rule for each of the two axes and combines the results."""
    first, second = rule(0), rule(1)
    if first is None or second is None:
        return second if first is None else first
    return paired(replace(first, paired=False), replace(second, paired=False), what)
