"""The time axis of one layer's output: stride, receptive field, spans and lengths."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, OutOfRange, Unsupported, listed
from convtap._public import public
from convtap._result.samples import whole_numbers
from convtap._spelling import printable
from convtap._time.axis_count import Digit
from convtap._time.edge import NEVER, Difference, Edges
from convtap._time.record import Record


@public
class LayerTime:
    """The time axis of one layer's output, in samples of the model's input.

    Frame t sees the input samples ``first`` to ``stop - 1``, where ``first, stop = span(t)``. Numbers below 0 and past the
    end are padding, also if samples of the signal fill it (reflect or circular padding). If a recurrence or an attention
    has mixed the frames, ``receptive_field`` is infinite and ``span`` is the whole input, while ``stride`` and ``centre``
    still locate a frame. If the time axis is unknown or was reduced, reading any of these raises ``Unsupported``.

    Attributes:
        name: the layer.
        key: its key in the timeline: the name, or ``name#1`` for one of several calls.
        dim: the axis of the output that is time, counted from the end (-1 for the last); None without a time axis.
        path: the place of the tensor in a structured output, such as ``"[0]"``; empty if the output is a tensor.
        frames: the number of frames for the example, or None.
        input_length: the number of samples of the example.
        whole: the operations that make every frame see the whole input, such as ``"lstm in 'encoder'"``.
        statistics: the operations that use a statistic over all frames, such as a GroupNorm's mean. Such a statistic does not
            count as part of the receptive field.
        unknown: why the time axis is unknown, or None.
        notes: facts that hold for the example's length only.
    """

    _place: int | None = None  # missing in pickles of version 0.1.0

    def __init__(self, record: Record, key: str, input_length: int, edges: Edges, place: int | None) -> None:
        mark = record.mark
        self.name = record.name
        self.key = key
        self.kind = record.kind
        self.input_length = input_length
        self.whole = mark.whole
        self.statistics = mark.statistics
        self.unknown = mark.unknown
        self.notes = mark.fixed
        self._mark = replace(mark, edge=None, across=None, zeroed=None)
        self._digit = mark.digits[-1] if mark.digits and not mark.unknown else None
        self.dim = None if self._digit is None else self._digit.dim - len(record.shape)
        self.path = record.path
        self.frames = None if self._digit is None else self._digit.size
        self._doubt = record.doubt
        self._shape = record.shape
        self._numbers = record.numbers
        self._edges = edges
        self._place = place

    # -- what holds for every frame

    @property
    def stride(self) -> int | Fraction:
        """The input samples from one frame to the next; a Fraction after some upsampling."""
        return _exact(self._step)

    @property
    def receptive_field(self) -> int | float:
        """The largest number of input samples that one frame spans.

        It includes the gaps of a dilation, and is ``math.inf`` for the whole input.
        """
        self._known()
        if self.whole:
            return math.inf
        period = math.lcm(self._mark.first.period, self._mark.last.period)
        return max(self._mark.last(t) - self._mark.first(t) + 1 for t in range(period))

    @property
    def start(self) -> int:
        """The first input sample that frame 0 sees; negative if it is padding."""
        return self.span(0)[0]

    @property
    def unpadded(self) -> range:
        """The frames of the example, or of a segment, that see no padding."""
        digit = self._known()
        first, stop = (-(-end // digit.weight) for end in self._mark.clear)
        return range(max(0, first), max(0, first, min(stop, digit.size)))

    @property
    def segments(self) -> int:
        """The number of segments that the time axis is cut into (1 if it is not cut)."""
        return math.prod(digit.size for digit in self._mark.digits[:-1])

    # -- one frame

    def span(self, t: int) -> tuple[int, int]:
        """Returns the half-open range of input samples of frame t, ``(first, stop)``.

        Raises:
            InvalidType: t is not an int.
            OutOfRange: t is negative.
        """
        digit = self._known()
        frame = self._frame(t) * digit.weight
        if self.whole:
            return 0, self.input_length
        return self._mark.first(frame), self._mark.last(frame) + 1

    def centre(self, t: int) -> int | Fraction:
        """Returns the place of frame t on the input's axis, in samples.

        Places are ``stride`` apart. The place is the middle of ``span(t)``, or the middle on average if several frames have
        the same span, as after a transposed convolution.

        Raises:
            InvalidType: t is not an int.
            OutOfRange: t is negative.
        """
        return _exact(self._step * self._frame(t) + self._middle())

    def seconds(self, sample_rate: float) -> Tensor:
        """Returns the place of each frame in seconds, as a (T,) float64 tensor.

        Args:
            sample_rate: input samples per second.

        Raises:
            InvalidType, InvalidValue: the rate is not a positive number.
        """
        step = float(self._step)
        if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, float)):
            raise InvalidType(f"sample_rate is a {type(sample_rate).__name__}. Pass a number: seconds(16000).")
        if not (sample_rate > 0 and math.isfinite(sample_rate)):
            raise InvalidValue(f"sample_rate={sample_rate!r} is not positive. Pass samples per second: seconds(16000).")
        places = torch.arange(self._known().size, dtype=torch.float64) * step + float(self._middle())
        return places / sample_rate

    @property
    def _step(self) -> Fraction:
        return self._mark.first.slope * self._known().weight

    def _middle(self) -> Fraction:
        """Returns the middle of frame 0, averaged over the period of the spans."""
        first, last = self._mark.first, self._mark.last
        period = math.lcm(first.period, last.period)
        return sum((Fraction(first(t) + last(t), 2) - first.slope * t for t in range(period)), Fraction(0)) / period

    def _frame(self, t: int) -> int:
        try:
            frame = operator.index(t)
        except TypeError:
            raise InvalidType(f"frame {t!r} is a {type(t).__name__}. Pass an int, counted from 0.") from None
        if frame < 0:
            raise OutOfRange(f"frame {frame} does not exist. Pass an int, counted from 0.")
        return frame

    # -- lengths

    def valid_lengths(self, lengths: Any, length: int | None = None) -> Tensor:
        """Returns the number of frames of inputs of these lengths, as a (B,) int64 tensor.

        It is the number of frames of each input alone, by the formulas of the operations, so the lengths may differ from
        the example's. An input that is too short for the model has 0 frames.

        Args:
            lengths: the number of samples of each input, (B,).
            length: the number of samples that the inputs were padded to, to check the lengths against it.

        Raises:
            InvalidValue: a length is negative, or longer than ``length``.
            Unsupported: the time axis is unknown or was reduced, or a number in the model depends on the length in an
                unknown way.
        """
        digit = self._known()
        samples = whole_numbers(lengths, "lengths")
        if length is not None and any(one > length for one in samples):
            raise InvalidValue(
                f"lengths holds {max(samples)}, but the input has {length} samples on its time axis. Pass samples of the "
                "input, not frames."
            )
        if self.segments > 1:
            raise Unsupported(
                f"{self.key!r} runs on {self.segments} segments of {digit.size} frames, so it has several numbers "
                "of valid frames. Read a layer before the time axis is cut."
            )
        self._trusted(digit, samples)
        counts = {one: digit.count(one) for one in set(samples)}
        return torch.tensor([counts[one] for one in samples], dtype=torch.int64)

    def mask(self, lengths: Any, length: int | None = None) -> Tensor:
        """Returns which frames are valid, as a (B, T) tensor of bool.

        Args:
            lengths: the number of samples of each input, (B,).
            length: the number of samples that the inputs were padded to; None for that of the longest input.

        Raises:
            InvalidValue, Unsupported: as ``valid_lengths``.
        """
        samples = whole_numbers(lengths, "lengths")
        padded = max(samples, default=0) if length is None else length
        valid = self.valid_lengths(samples, padded)
        frames = int(self.valid_lengths([padded])[0]) if samples or length is not None else 0
        return torch.arange(frames) < valid[:, None]

    def frames_of(self, length: int) -> int:
        """Returns the number of frames of one input. See ``valid_lengths``."""
        return int(self.valid_lengths([length])[0])

    def shape_of_one(self, length: int) -> tuple[int, ...]:
        """Returns the shape of the output for one input, without the batch axis.

        Raises:
            Unsupported: as ``valid_lengths``.
        """
        frames, axis = self.frames_of(length), self.row_dim
        row = list(self._shape[:1] + self._shape[2:] if self.is_time_first else self._shape[1:])
        return (*row[:axis], frames, *row[axis:][1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the example's output."""
        return tuple(self._shape)

    @property
    def is_time_first(self) -> bool:
        """Whether time is axis 0 and the batch is axis 1, as in (T, B, C)."""
        return self.dim is not None and len(self._shape) > 2 and self.dim == -len(self._shape)

    @property
    def row_dim(self) -> int | None:
        """The time axis of one input's output, counted from the end, or None."""
        return None if self.dim is None else self.dim + self.is_time_first

    def _trusted(self, digit: Digit, samples: list[int]) -> None:
        """Raises if the number of frames is not known for these lengths."""
        others = [one for one in samples if one != self.input_length]
        doubts = [guess.what for guess in digit.count.guesses() if guess.is_open]
        if self._doubt is not None:
            doubts.append(self._doubt)
        if others and doubts:
            raise Unsupported(
                f"the number of frames of {self.key!r} for {others[0]} samples is not known: the model computes a number in "
                f"{listed(dict.fromkeys(doubts), 3)}, and the timeline is of {self.input_length} samples. "
                f"Make the timeline with an example of {others[0]} samples."
            )

    def _known(self) -> Digit:
        if self.unknown is not None:
            raise Unsupported(f"the time axis of {self.key!r} is unknown: {self.unknown}. Choose an earlier layer.")
        if self._digit is None:
            why = listed([*self.whole, *self.statistics], 2)
            gone = f"its input was reduced over time ({why})" if self.whole or self.statistics else "it is constant"
            raise Unsupported(f"{self.key!r} has no time axis: {gone}. Choose an earlier layer.")
        return self._digit

    def __repr__(self) -> str:
        stride, field, start, frames = cells_of(self)
        known = f"stride {stride}, receptive field {field}, start {start}, {frames} frames"
        return printable(f"<LayerTime {self.key}: {stride if field is None else known}>")


def cells_of(layer: LayerTime) -> tuple[Any, ...]:
    """Returns a layer's stride, receptive field, start and frames for a table."""
    if layer.unknown is not None or layer._digit is None:
        return ("no time axis" if layer.unknown is None else "unknown", None, None, None)
    field = "whole input" if layer.whole else layer.receptive_field
    frames: Any = layer.frames if layer.segments == 1 else f"{layer.segments} × {layer.frames}"
    return (layer.stride, field, layer.start, frames)


def difference_of(layer: LayerTime, length: int, padded: int) -> Difference | None:
    """Returns how the frames of padded samples differ from those of the samples alone."""
    frames = None if layer._digit is None else layer._digit.count(length)
    if length >= padded or layer._place is None or frames == 0:
        return None
    if layer._numbers:
        return Difference(None, f"{layer._numbers[0]}, read as a Python number")
    at, what, mixes = layer._edges.at(layer._place, length, padded)
    if frames is None:
        return None if at == NEVER else Difference(None, what)
    if layer.notes:
        return Difference(None, layer.notes[0])
    if at >= frames:
        return None
    return Difference(None if mixes else frames - at, what)


def layer_times(records: Sequence[Record], keys: Sequence[str], input_length: int) -> list[LayerTime]:
    """Returns the time axes of the records of one pass, each under its key."""
    edges = Edges([record.mark.edge for record in records])
    triples = zip(records, keys, edges.places, strict=True)
    return [LayerTime(record, key, input_length, edges, place) for record, key, place in triples]


def _exact(value: Fraction) -> int | Fraction:
    """Returns a whole number as an int."""
    return value.numerator if value.denominator == 1 else value
