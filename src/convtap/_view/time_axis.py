"""Places the frames of each layer on one time axis, in input samples or seconds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

from convtap._errors import ConvtapError, InvalidType, InvalidValue, OutOfRange, brief

#: What ``span=`` accepts: the start and stop of the part of the input to show, or None for all of it.
Span: TypeAlias = "tuple[float, float] | None"


class Place(NamedTuple):
    """The place of a call on the time axis.

    Attributes:
        entry: the timeline's entry for the call, or None.
        dim: the time axis of the output, counted from the end, or None if the timeline does not contain it.
        path: the tensor of a structured output that the entry describes; None for any.
    """

    entry: Any = None
    dim: int | None = None
    path: str | None = None

    def dim_of(self, path: str) -> int | None:
        """Returns the time axis of one of the call's tensors, or None if it is unknown."""
        return self.dim if self.path in (None, path) else None


class TimeAxis:
    """The unit of a picture's time axis, and each layer's place on it.

    Args:
        timeline: the result of ``convtap.timeline``, or None. ``timeline[layer]`` has a ``stride`` in input samples and
            ``centre(t)``, the input sample at the centre of frame t. It may have ``dim``, the time axis.
        sample_rate: input samples per second, or None to count in samples.
        has_signal: whether the model's input is drawn too.
        span: the part of the axis to show, as ``(start, stop)`` in its unit; None for all of it.

    Attributes:
        scale: seconds per input sample, or 1.
        signal_dim: the time axis of the model's input, counted from the end, or None if unknown.
        span: the part of the axis to show, as passed by the user, or None.
    """

    def __init__(
        self, timeline: Any, sample_rate: float | None = None, has_signal: bool = False, span: Span = None
    ) -> None:
        if timeline is not None and not hasattr(type(timeline), "__getitem__"):
            raise InvalidType(
                f"timeline is a {type(timeline).__name__}, not a timeline. Pass timeline=convtap.timeline(model, x)."
            )
        self._timeline = timeline
        self.signal_dim = getattr(timeline, "time_dim", None)
        self.has_timeline = timeline is not None
        self.scale = 1.0 if sample_rate is None else 1.0 / checked_rate(sample_rate)
        if sample_rate is not None and timeline is None and not has_signal:
            raise InvalidValue(
                f"sample_rate={sample_rate} has no effect without a signal or a timeline. Pass the input as signal=x, or "
                "timeline=convtap.timeline(model, x)."
            )
        self.unit = "input samples" if sample_rate is None else "seconds"
        self.span = None if span is None else _checked_span(span)
        if self.span is not None and timeline is None:
            raise InvalidValue(
                f"span={brief(span)} is in {self.unit}, but the places of the frames in the input are unknown. Pass "
                "timeline=convtap.timeline(model, x)."
            )
        self._whole: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends of the shown part of the axis, or None until they are known."""
        half = 0.5 * self.scale
        return self._whole if self.span is None else (self.span[0] - half, self.span[1] - half)

    @property
    def short_unit(self) -> str:
        """The label of an axis that has no room for the unit."""
        return "sample" if self.unit == "input samples" else "time (s)"

    def place(self, name: str, number: int | None, separator: str, part: str = "") -> Place:
        """Returns the place of a layer's only call in its pass, or of the call ``number``.

        A layer that ran several times in a pass has several places, so only ``name#0``, … is looked up.
        """
        if self._timeline is None:
            return Place()
        try:
            entry = self._timeline[name if number is None else f"{name}{separator}{number}"]
        except (LookupError, ConvtapError):
            return Place()
        path: str | None = getattr(entry, "path", None)
        if path is not None and part:  # the picture shows this part, so its path within the part is empty
            path = path.removeprefix(part) if path.startswith(part) else "none"
        return Place(entry, getattr(entry, "dim", -1), path)

    def extent(self, place: Place, path: str, frames: int) -> tuple[float, float] | None:
        """Returns the start of the first frame and the end of the last one, or None.

        A frame lies around its centre and is as wide as the stride.
        """
        entry = place.entry
        if entry is None or place.path not in (None, path):
            return None
        try:
            if getattr(entry, "segments", 1) != 1:  # time is cut into segments along another axis
                return None
            half = entry.stride / 2
            first, last = float(entry.centre(0) - half), float(entry.centre(frames - 1) + half)
        except (TypeError, ConvtapError):  # the place is unknown
            return None
        if not (math.isfinite(first) and math.isfinite(last) and first < last):
            return None
        return first * self.scale, last * self.scale

    def signal_extent(self, samples: int) -> tuple[float, float]:
        """Returns the start and end of a signal. Sample n is drawn around n."""
        return -0.5 * self.scale, (samples - 0.5) * self.scale

    def columns_for(self, extent: tuple[float, float] | None, columns: int) -> int:
        """Returns the number of columns of a map, fewer if it covers a part of the axis."""
        if extent is None or self.bounds is None:
            return columns
        share = (extent[1] - extent[0]) / (self.bounds[1] - self.bounds[0])
        return max(2, min(columns, math.floor(columns * share)))

    def widen(self, *extents: tuple[float, float] | None) -> None:
        """Extends the axis to include these extents."""
        ends = [extent for extent in (self._whole, *extents) if extent is not None]
        if ends:
            self._whole = min(first for first, _ in ends), max(last for _, last in ends)

    def check_span(self, shape: tuple[int, ...] | None) -> None:
        """Checks that the span lies on the axis, after ``widen`` with every extent.

        ``shape`` is the shape of the model's input. Its last samples may lie outside every frame.

        Raises:
            OutOfRange: the span begins before the axis, or ends after it.
        """
        if self.span is None:
            return
        dim = -1 if self.signal_dim is None else self.signal_dim
        samples = getattr(self._timeline, "input_length", None) if shape is None else (1, *shape)[dim]
        self.widen(self.signal_extent(samples) if isinstance(samples, int) else None)
        if self._whole is None:
            return  # no layer has a place on the axis, and the notes of each layer say so
        half, (first, last), (start, stop) = 0.5 * self.scale, self._whole, self.span
        first, last = first + half, last + half
        if self.scale == 1:  # whole samples
            first, last = math.floor(first), math.ceil(last)
        slack = 1e-9 * (last - first)
        if start < first - slack or stop > last + slack:
            room = f"from {first:,.10g} to {last:,.10g} {self.unit}"
            known = f"{max(start, first):.10g}, {min(stop, last):.10g}"
            inside = known if max(start, first) < min(stop, last) else f"{first:.10g}, {last:.10g}"
            raise OutOfRange(
                f"span=({start:.10g}, {stop:.10g}) is not within the time axis, which runs {room}. Write for example "
                f"span=({inside})."
            )

    def visible(self, extent: tuple[float, float] | None, frames: int) -> tuple[slice, tuple[float, float] | None]:
        """Returns the frames of an output within the span, and their extent.

        Without a span, or if the place of the output is unknown, these are all frames.
        """
        if extent is None or self.span is None or self.bounds is None:
            return slice(0, frames), extent
        (first, last), (start, stop) = extent, self.bounds
        step = (last - first) / frames
        low = min(frames, max(0, math.floor((start - first) / step + 1e-6)))
        high = max(low, min(frames, math.ceil((stop - first) / step - 1e-6)))
        return slice(low, high), (first + low * step, first + high * step)


def checked_rate(sample_rate: Any) -> float:
    """Returns a sample rate as a float.

    Raises:
        InvalidType, InvalidValue: the rate is not a positive number.
    """
    hint = "Pass input samples per second: sample_rate=16000."
    try:
        rate = float(sample_rate)
    except (TypeError, ValueError):
        raise InvalidType(f"sample_rate is {sample_rate!r}, not a number. {hint}") from None
    if isinstance(sample_rate, bool) or not (math.isfinite(rate) and rate > 0):
        raise InvalidValue(f"sample_rate={sample_rate!r} is not a positive number. {hint}")
    return rate


def _checked_span(span: Any) -> tuple[float, float]:
    hint = "Write its start and stop: span=(start, stop)."
    try:
        start, stop = (float(end) for end in span)
    except (TypeError, ValueError, OverflowError):
        raise InvalidType(f"span is {brief(span)}, not a pair of numbers. {hint}") from None
    if isinstance(span, (str, bytes, set, frozenset, dict)) or any(isinstance(end, bool) for end in span):
        raise InvalidType(f"span is {brief(span)}, not a pair of numbers. {hint}")
    if not (math.isfinite(start) and math.isfinite(stop)):
        raise InvalidValue(f"span={brief(span)} is not finite. {hint}")
    if start == stop:
        raise InvalidValue(f"span={brief(span)} is empty. {hint}")
    if start > stop:
        raise InvalidValue(f"span={brief(span)} ends before it begins. Write span=({stop:.10g}, {start:.10g}).")
    return start, stop
