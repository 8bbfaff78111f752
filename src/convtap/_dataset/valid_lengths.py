"""Finds how many frames of each layer are real, from the numbers of real input samples."""

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

#: Over how many lengths the most frames that differ are looked for, at most.
_LENGTHS = 512


class ValidLengths:
    """The rule of each layer, found by following the time axis of a batch through the model.

    Args:
        options: those of the extraction.
        time_dim: the axis of the signal that is time; None for that of the options, or the last one.

    Attributes:
        times: by layer and the path of a tensor, the time axis of each of its runs, once a batch was followed.
        differences: the tensors of layers whose frames are not those of each input alone, and why.
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
        """Notes the lengths of a batch, and follows a first batch through the model, and the first padded one.

        Only a padded batch has a mask of the padding; later ones need no look.

        Args:
            lengths: how many samples of the signal are real, for each row.
            layers: the selected layers, by which the signal is told from the other arguments.

        Raises:
            InvalidValue: no tensor can be the signal, or a length is longer than it.
        """
        example = as_example(self._model, args, kwargs, self._method)
        is_first = self._path is None
        path = self._find(example, lengths, set(layers)) if self._path is None else self._path
        signal = dict(walk_tensors(example)).get(path)
        if signal is None:
            raise InvalidValue(
                f"the lengths are of the input {argument_of(path)!r}, and a batch has no such tensor. Return the same "
                "arguments for each batch with inputs=."
            )
        self._path, self._lengths, self._full = path, lengths, int(signal.shape[time_axis(signal, self._time_dim)])
        for number in lengths:
            if number > self._full:
                raise InvalidValue(
                    f"lengths(batch) returned {number}, and the padded input has {self._full} samples: a row's length lies "
                    "between."
                )
        self._is_padded = any(number < self._full for number in lengths)
        if self._is_padded and not is_first and not self._learned_padded:
            self.times, _ = self._follow(example, path, lengths)
            self._counts.clear()
        self._learned_padded |= self._is_padded

    def _find(self, example: Any, lengths: list[int], layers: set[str]) -> str:
        """Finds the signal: the named tensor, or of those that can be it, the first that reaches the most layers."""
        forward = forward_of(self._model, self._method)
        if self._signal is not None:
            path, signal = signal_of(example, self._signal, forward)
            if signal.dim() < 2:
                raise InvalidValue(
                    f"lengths= needs an input tensor (B, T) or (B, C, T), and signal={self._signal!r} has shape "
                    f"{tuple(signal.shape)}. Name another argument: signal='audio'."
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
        """Returns the time axis of each tensor of each layer, and which layers depend on the signal."""
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
        """Returns which axis of a tensor is time, counted from the end, or None if it is not known, or there is none."""
        dims = {one.dim if one.unknown is None else None for one in self.times.get((layer, path), [])}
        return dims.pop() if len(dims) == 1 else None

    def cut(self, layer: str, path: str, tensor: Tensor, batch: int = 0) -> list[Tensor] | None:
        """Cuts each row of a tensor to its real frames; None for one that is to be left whole.

        Left whole is what does not come from the signal, beside something that does: a mask, a conditioning vector.

        Args:
            layer: the layer.
            path: which tensor of its output, or input.
            tensor: it, such as (B, C, T).
            batch: its axis that is the samples; 1 for (T, B, C).

        Raises:
            Unsupported: the number of real frames is not known.
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
            why = f"for {self._full} input samples there are {seen} frames, and the geometry gives {expected}"
            raise Unsupported(_unknown(layer + path, why))

    def _ask(self, key: str, times: list[LayerTime], question: Callable[[LayerTime], Any]) -> Any:
        if not times:
            raise Unsupported(_unknown(key, "nothing of it depends on the signal"))
        if len(times) > 1:
            raise Unsupported(_unknown(key, f"{key!r} ran {len(times)} times, each with a time axis of its own"))
        try:
            return question(times[0])
        except ConvtapError as error:
            raise Unsupported(_unknown(key, str(error))) from error

    # -- what padding changes

    def _compare(self, key: str, time: LayerTime) -> None:
        """Notes whether a tensor's frames differ from those of each input alone.

        It is looked at in its first padded batch: at the lengths of that, and at those around the longest one, after
        which the numbers of frames repeat themselves.
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
            self.differences.setdefault(key, "what lies between the convolution and its activation is not followed")

    def unwarned(self) -> dict[str, str]:
        """Returns the differences when there are any for the first time, and nothing after that."""
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
        f"lengths= needs the number of real frames of {layer!r}, and it is not known: {why.rstrip('.')}. Leave the layer "
        "out (or that part of it, with 'layer[0]'), or extract without lengths= and cut the rows yourself."
    )


def checked_lengths(found: Any, size: int) -> list[int]:
    """Checks what the user's ``lengths`` returned for a batch: one number of input samples a row.

    Raises:
        InvalidType: it is not a sequence of ints.
        InvalidValue: there are more or fewer than rows, or one is negative.
    """
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
        if number < 0:
            raise InvalidValue(f"lengths(batch) returned {number}, and a row has no fewer than 0 samples.")
    return numbers
