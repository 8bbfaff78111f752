"""Finds the number of real frames of each layer from the lengths of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from convtap._dataset.options import ExtractOptions
from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported
from convtap._select.batch import as_example
from convtap._select.example import forward_of
from convtap._tensors.nested import walk_tensors
from convtap._time.layer_time import LayerTime, difference_of, layer_times
from convtap._time.lengths import follow
from convtap._time.padded import Differences
from convtap._time.record import Pass
from convtap._time.signal import argument_of, likely_signals, signal_of, time_axis

#: The largest number of lengths over which the most differing frames are searched.
_LENGTHS = 512


class ValidLengths:
    """Maps input lengths to frames by following time through the model.

    Args:
        options: the options of the extraction.
        time_dim: the axis of the signal that is time; None for that of the options, or the last one.

    Attributes:
        times: the time axis of each run of a layer, by layer and path of the tensor, after the first batch.
        differences: the causes by which frames differ from those of each input alone, by layer and path.
    """

    def __init__(self, options: ExtractOptions, time_dim: int | None = None) -> None:
        self.differences: dict[str, str] = {}
        self._model = options.model
        self._at = options.capture.at
        self._method = options.method
        self._signal = options.signal
        self._time_dim = next((dim for dim in (time_dim, options.time_dim) if dim is not None), -1)
        self._path: str | None = None
        self._lengths: list[int] = []
        self._full = 0
        self.times: dict[tuple[str, str], list[LayerTime]] = {}
        self._counts: dict[tuple[str, str, int], int] = {}
        self._is_padded = False
        self._learned_padded = False
        self._compared: set[str] = set()
        self._has_warned = False

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: list[int], layers: Iterable[str]) -> None:
        """Notes the lengths of a batch, and follows the first and the first padded batch.

        Only a padded batch has a mask of the padding. Later batches are not followed.

        Args:
            lengths: the number of real samples of the signal, for each row.
            layers: the selected layers, which distinguish the signal from the other arguments.

        Raises:
            InvalidValue: no tensor can be the signal, or a length exceeds it.
        """
        example = as_example(self._model, args, kwargs, self._method)
        is_first = self._path is None
        path = self._find(example, lengths, set(layers)) if self._path is None else self._path
        signal = dict(walk_tensors(example)).get(path)
        if signal is None:
            raise InvalidValue(
                f"a batch lacks the input {argument_of(path)!r}, which the lengths measure. Return the same arguments for each "
                "batch from inputs=."
            )
        self._path, self._lengths, self._full = path, lengths, int(signal.shape[time_axis(signal, self._time_dim)])
        for number in lengths:
            if number > self._full:
                raise InvalidValue(
                    f"lengths(batch) returned {number}, but the padded input has {self._full} samples. Return the number of "
                    "real samples of each row."
                )
        self._is_padded = any(number < self._full for number in lengths)
        if self._is_padded and not is_first and not self._learned_padded:
            self.times, _ = self._follow(example, path, lengths)
            self._counts.clear()
        self._learned_padded |= self._is_padded

    def _find(self, example: Any, lengths: list[int], layers: set[str]) -> str:
        """Returns the named signal, or the first candidate that reaches the most layers."""
        forward = forward_of(self._model, self._method)
        if self._signal is not None:
            path, signal = signal_of(example, self._signal, forward)
            if signal.dim() < 2:
                raise InvalidValue(
                    f"signal={self._signal!r} has shape {tuple(signal.shape)}, but lengths= needs (B, T) or (B, C, T). Name "
                    "another argument: signal='audio'."
                )
            self.times, _ = self._follow(example, path, lengths)
            return path
        best, most, failure = "", -1, None
        for path in likely_signals(example, max(lengths, default=0), self._time_dim, forward):
            try:
                times, reached = self._follow(example, path, lengths)
            except ConvtapError as error:  # that axis is not time
                failure = failure or error
                continue
            if len(reached & layers) > most:
                best, most, self.times = path, len(reached & layers), times
            if most == len(layers):
                break
        if most < 0 and failure is not None:
            raise failure
        return best

    def _follow(
        self, example: Any, path: str, lengths: list[int]
    ) -> tuple[dict[tuple[str, str], list[LayerTime]], set[str]]:
        """Returns the time axis of each tensor, and the layers that use the signal."""
        signal = dict(walk_tensors(example))[path]
        axis = time_axis(signal, self._time_dim)
        samples = int(signal.shape[axis])
        zeros = any(length < samples for length in lengths) and _has_zeros(signal.movedim(axis, -1), lengths)
        every = "input" if self._at == "input" else "output"
        how = Pass(self._model, path, axis, self._method, zeros, every)
        records, _ = follow(how, example)
        found: dict[tuple[str, str], list[LayerTime]] = {}
        times = layer_times(records, [record.name + record.path for record in records], samples)
        for record, time in zip(records, times, strict=True):
            found.setdefault((record.name, record.path), []).append(time)
        return found, {record.name for record in records if record.depends}

    def axis(self, layer: str, path: str) -> int | None:
        """Returns a tensor's time axis, counted from the end, or None if none is known."""
        dims = {one.dim if one.unknown is None else None for one in self.times.get((layer, path), [])}
        return dims.pop() if len(dims) == 1 else None

    def cut(self, layer: str, path: str, tensor: Tensor, batch: int = 0) -> list[Tensor] | None:
        """Cuts each row of a tensor to its real frames; returns None to keep it whole.

        A tensor is kept whole if it does not depend on the signal but another one of the layer does, such as a mask or a
        conditioning vector.

        Args:
            layer: the layer.
            path: the path of the tensor in the layer's output, or input.
            tensor: the tensor, such as (B, C, T).
            batch: the axis of the samples; 1 for (T, B, C).

        Raises:
            Unsupported: the number of real frames is unknown.
        """
        times = self.times.get((layer, path), [])
        if not times and path and any(name == layer for name, _ in self.times):
            return None
        self._check(layer, path, times, tensor)
        self._compare(layer + path, times[0])
        axis = times[0].dim
        assert axis is not None
        counts = [self._frames(layer, path, times, length) for length in self._lengths]
        axis = axis + 1 if batch else axis  # of a row, which has no axis of samples
        return [row.narrow(axis, 0, count) for row, count in zip(tensor.movedim(batch, 0), counts, strict=True)]

    def _frames(self, layer: str, path: str, times: list[LayerTime], length: int) -> int:
        found = self._counts.get((layer, path, length))
        if found is None:
            found = int(self._ask(layer + path, times, lambda time: time.frames_of(length)))
            self._counts[layer, path, length] = found
        return found

    def _check(self, layer: str, path: str, times: list[LayerTime], tensor: Tensor) -> None:
        """Compares the rule with the output of the padded batch."""
        expected = self._frames(layer, path, times, self._full)
        seen = tensor.shape[self._ask(layer + path, times, lambda time: time.dim)]
        if expected != seen:
            why = f"{self._full} input samples have {seen} frames, but the layers' geometry has {expected}"
            raise Unsupported(_unknown(layer + path, why))

    def _ask(self, key: str, times: list[LayerTime], question: Callable[[LayerTime], Any]) -> Any:
        if not times:
            raise Unsupported(_unknown(key, "it does not depend on the signal"))
        if len(times) > 1:
            raise Unsupported(_unknown(key, f"{key!r} ran {len(times)} times, each with a time axis of its own"))
        try:
            return question(times[0])
        except ConvtapError as error:
            raise Unsupported(_unknown(key, str(error))) from error

    # -- effects of padding

    def _compare(self, key: str, time: LayerTime) -> None:
        """Notes whether a tensor's frames differ from those of each input alone.

        The check runs in the first padded batch, for its lengths and for those around the longest one, after which the
        numbers of frames repeat.
        """
        if not self._is_padded or key in self._compared:
            return
        self._compared.add(key)
        found = Differences()
        period = min(Fraction(time.stride).numerator, _LENGTHS)
        for length in set(self._lengths):
            found.add(key, difference_of(time, length, self._full))
        for length in range(max(1, self._full - period), self._full):
            found.add(key, difference_of(time, length, self._full + period))
        self.differences.update(found.described())
        if self._at == "activation":
            self.differences.setdefault(key, "the layers between the convolution and its activation are not followed")

    def unwarned(self) -> dict[str, str]:
        """Returns the differences the first time that they exist, and later an empty dict."""
        if self._has_warned or not self.differences:
            return {}
        self._has_warned = True
        return self.differences


def _has_zeros(rows: Tensor, lengths: list[int]) -> bool:
    """Whether the padding of a batch (B, ..., T) is zero everywhere."""
    return len(rows) == len(lengths) and not any(
        bool(row[..., length:].any()) for row, length in zip(rows, lengths, strict=True)
    )


def _unknown(layer: str, why: str) -> str:
    return (
        f"the number of real frames of {layer!r} is unknown, but lengths= needs it: {why.rstrip('.')}. Deselect the layer (or "
        "select a part of it: 'layer[0]'), or extract without lengths= and cut the rows yourself."
    )


def checked_lengths(found: Any, size: int) -> list[int]:
    """Returns the checked result of the user's ``lengths``: one int for each row.

    Raises:
        InvalidType: the result is not a sequence of ints.
        InvalidValue: the result has more or fewer lengths than rows, or a negative one.
    """
    try:
        values = torch.as_tensor(found).reshape(-1)
        good = not values.is_floating_point() and values.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InvalidType(
            f"lengths(batch) returned a {type(found).__name__}, which is not a sequence of ints. Return one number of input "
            "samples for each row, such as batch['attention_mask'].sum(1)."
        )
    numbers: list[int] = values.tolist()
    if len(numbers) != size:
        raise InvalidValue(f"lengths(batch) returned {len(numbers)} lengths for {size} rows. Return one for each row.")
    for number in numbers:
        if number < 0:
            raise InvalidValue(f"lengths(batch) returned {number}. Return the number of real samples, 0 or more.")
    return numbers
