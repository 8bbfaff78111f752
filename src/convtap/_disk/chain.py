"""How many frames of each layer are real, from how many samples of the input are: asked of the model's timeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported
from convtap._example import entry
from convtap._time.padded import Differences
from convtap._time.signal import signal_of, time_axis
from convtap._time.timeline import Timeline, followed

#: Over how many lengths the most frames that differ are looked for, at most.
_LENGTHS = 512


class ValidLengths:
    """The rule of each layer, found by following the time axis of a batch through the model.

    Args:
        model: the model.
        method: the method that is run, or None.
        signal: which input has the lengths; None for the first floating-point tensor.
        time_dim: the axis of it that is time.

    Attributes:
        differences: the layers whose frames are not those of each input alone, and why.
        axis_of: the signal and its axis, for an identity; None for the default.
    """

    def __init__(
        self, model: nn.Module, method: str | None = None, signal: str | int | None = None, time_dim: int = -1
    ) -> None:
        self.differences: dict[str, str] = {}
        self.axis_of = None if (signal, time_dim) == (None, -1) else f"{signal}, axis {time_dim}"
        self._model = model
        self._method = method
        self._signal = signal
        self._time_dim = time_dim
        self._times: Timeline | None = None
        self._counts: dict[tuple[str, int], int] = {}
        self._is_padded = False
        self._lengths: list[int] = []
        self._learned_padded = False
        self._compared: set[str] = set()

    def samples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Returns how many samples a batch has on its time axis, the padding included.

        Raises:
            InvalidValue: the model is given no tensor that has one.
        """
        example = _example(self._model, self._method, args, kwargs)
        signal = signal_of(example, self._signal, forward_of(self._model, self._method))[1]
        if signal.dim() < 2:
            raise InvalidValue(
                f"lengths= needs an input tensor (B, T) or (B, C, T), and the model is given {tuple(signal.shape)}. Name "
                "the argument that is the signal: signal='audio'."
            )
        return int(signal.shape[time_axis(signal, self._time_dim)])

    def expect(self, lengths: list[int], full: int) -> None:
        """Tells of the lengths in the batch that comes next."""
        self._is_padded = any(length < full for length in lengths)
        self._lengths = lengths

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a first batch through the model, and the first padded one: only that has a mask of the padding."""
        if self._times is None or (self._is_padded and not self._learned_padded):
            example = _example(self._model, self._method, args, kwargs)
            zeros = self._is_padded and self._has_zeros(example)
            self._times = followed(self._model, example, self._time_dim, self._signal, self._method, zeros=zeros)
            self._learned_padded = self._is_padded

    def _has_zeros(self, example: Any) -> bool:
        """Whether the padding of a batch is zero everywhere."""
        signal = signal_of(example, self._signal, forward_of(self._model, self._method))[1]
        frames = signal.movedim(self._time_dim, -1)
        rows = zip(frames, self._lengths, strict=False)
        return len(frames) == len(self._lengths) and not any(bool(row[..., length:].any()) for row, length in rows)

    def compare(self, layers: list[str], lengths: list[int], full: int) -> bool:
        """Notes which of the layers' frames differ from those of each input alone. Returns whether it has found any first.

        A layer is looked at in its first padded batch: at the lengths of that, and at those around the longest one, after
        which the numbers of frames repeat themselves.
        """
        fresh = [layer for layer in dict.fromkeys(layers) if layer not in self._compared]
        if not self._is_padded or not fresh or self._times is None:
            return False
        found = Differences()
        for layer in fresh:
            self._compared.add(layer)
            time = self._ask(layer, lambda time: time)
            strides = [one.stride for one in (time,) if one.unknown is None and one.dim is not None]
            period = min(max((Fraction(one).numerator for one in strides), default=1), _LENGTHS)
            pairs = [(length, full) for length in set(lengths)]
            pairs += [(length, full + period) for length in range(max(1, full - period), full)]
            for length, padded in pairs:
                found.add(layer, time._difference(length, padded))
        had = bool(self.differences)
        self.differences.update(found.described())
        return bool(self.differences) and not had

    def frames(self, layer: str, length: int) -> int:
        """Returns how many frames of a layer are real for an input of ``length`` samples.

        Raises:
            Unsupported: nobody knows.
        """
        found = self._counts.get((layer, length))
        if found is None:
            found = self._counts[layer, length] = int(self._ask(layer, lambda time: time.frames_of(length)))
        return found

    def axis(self, layer: str) -> int:
        """Returns which axis of a layer's output is time, counted from the end (-1 for (B, C, T))."""
        dim = self._ask(layer, lambda time: time.dim)
        if dim is None:
            raise Unsupported(_unknown(layer, "its output has no time axis"))
        return int(dim)

    def check(self, layer: str, full: int, seen: int) -> None:
        """Compares the rule with what was seen for a padded batch of ``full`` samples.

        Raises:
            Unsupported: they differ.
        """
        expected = self.frames(layer, full)
        if expected != seen:
            raise Unsupported(
                _unknown(layer, f"for {full} input samples it gave {seen} frames, and its geometry gives {expected}")
            )

    def _ask(self, layer: str, question: Callable[[Any], Any]) -> Any:
        assert self._times is not None
        try:
            return question(self._times[layer])
        except ConvtapError as error:
            raise Unsupported(_unknown(layer, str(error))) from error


def forward_of(model: nn.Module, method: str | None) -> Any:
    """Returns the function whose arguments a batch is."""
    return model.forward if method is None else entry(model, method)


def _example(model: nn.Module, method: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Writes a call as an example: a tuple or a dict; a call with both becomes a dict by the names of the forward."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    try:
        bound = inspect.signature(forward_of(model, method)).bind(*args, **kwargs)
        by_name = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
    except (TypeError, ValueError) as error:
        raise Unsupported(f"lengths= needs inputs that can all be given by keyword: {error}.") from error
    return by_name


def _unknown(layer: str, why: str) -> str:
    return (
        f"lengths= needs the number of real frames of {layer!r}, and it is not known: {why.rstrip('.')}. Leave the layer "
        "out, or extract without lengths= and cut the rows yourself."
    )


def checked_lengths(lengths: Callable[[Any], Any], batch: Any, size: int, full: int) -> list[int]:
    """Calls the user's ``lengths`` on a batch, and checks what it returns: one number of input samples a row.

    Raises:
        InvalidType: it is not a sequence of ints.
        InvalidValue: there are more or fewer than rows, or one is longer than the padded input.
    """
    found = lengths(batch)
    try:
        values = torch.as_tensor(found).reshape(-1)
        good = not values.is_floating_point() and values.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InvalidType(
            f"lengths(batch) returned a {type(found).__name__} that is no sequence of ints. Return one number of input "
            "samples for each row, such as batch['attention_mask'].sum(1)."
        )
    numbers: list[int] = values.tolist()
    if len(numbers) != size:
        raise InvalidValue(f"lengths(batch) returned {len(numbers)} lengths for {size} rows. Return one for each row.")
    for number in numbers:
        if not 0 <= number <= full:
            raise InvalidValue(
                f"lengths(batch) returned {number}, and the padded input has {full} samples: a row's length lies between."
            )
    return numbers
