"""What joining tensors along an axis does to the time axis: ``cat``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convtap._time.axis_count import Affine, Count, Fixed, Guess, Sum
from convtap._time.join import joined, longer, plain_axis
from convtap._time.mark import Mark, as_axis, normal, unknown
from convtap._time.operation import Op


def cat(op: Op) -> Mark | None:
    """``cat(tensors, dim)``: along time, a constant piece counts as padding, and the others must continue each other."""
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
        count: its own frames for a number of samples.
        offset: where it begins.
    """

    mark: Mark | None
    count: Count
    size: int
    offset: int


def _placed(mark: Mark | None, dim: int, size: int, offset: int, total: int) -> _Piece:
    """Puts a piece into the numbering of the whole."""
    if mark is None:
        return _Piece(None, Count((Fixed(size),)), size, offset)
    count = mark.digits[0].count
    mark = mark if offset + size == total else mark.looks(dim, "padding")
    return _Piece(mark.spread(offset, -offset), count, size, offset)


def _continued(pieces: Sequence[_Piece], what: str) -> Mark:
    """The mark of pieces that continue each other; a short copy of frames of the longest one counts as padding."""
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
    """From which frame of the longest piece on a piece copies, or None if it does not."""
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
    """How many frames the pieces make together."""
    known = [piece for piece in pieces if piece.mark is not None]
    if len(known) == 1:
        constant = sum(piece.size for piece in pieces if piece.mark is None)
        return known[0].count.then(Affine(1, constant, 1))
    counts = [piece.count for piece in pieces]
    return _tiled(counts) or Count((Sum(tuple(counts)),))


def _tiled(counts: list[Count]) -> Count | None:
    """The count of slices that together are all frames of one tensor, in order: that of the tensor. None for others."""
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
