"""How many frames of each layer are real, from how many samples of the input are: asked of the model's timeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convtap._batch import as_example
from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported
from convtap._structure import walk_tensors
from convtap._time.layer_time import LayerTime
from convtap._time.lengths import follow, settle


class ValidLengths:
    """The rule of each layer, found by following the time axis of the first batch through the model.

    Args:
        at: ``"input"`` for what layers are given, else for what they return.
        time_dim: the axis of the signal that is time.

    Attributes:
        times: by layer and the path of a tensor, the time axis of each of its runs, once a batch was followed.
    """

    def __init__(self, model: nn.Module, at: str = "output", time_dim: int = -1) -> None:
        self._model = model
        self._dim = time_dim
        self._every = "input" if at == "input" else "output"
        self._path: str | None = None
        self._lengths: list[int] = []
        self._full = 0
        self.times: dict[tuple[str, str], list[LayerTime]] = {}
        self._counts: dict[tuple[str, str, int], int] = {}

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: list[int], layers: Iterable[str]) -> None:
        """Notes the lengths of a batch, and follows a first batch through the model; later ones need no look.

        Args:
            lengths: how many samples of the signal are real, for each row.
            layers: the selected layers, by which the signal is told from the other arguments.

        Raises:
            InvalidValue: there is no tensor that can be the signal, or a length is longer than it.
        """
        example = as_example(self._model, args, kwargs)
        if self._path is None:
            self._find(example, lengths, set(layers))
        self._lengths, self._full = lengths, int(dict(walk_tensors(example))[str(self._path)].shape[self._dim])
        for number in lengths:
            if number > self._full:
                raise InvalidValue(
                    f"lengths(batch) returned {number}, and the padded input has {self._full} samples: a row's length lies "
                    "between."
                )

    def _find(self, example: Any, lengths: list[int], layers: set[str]) -> None:
        """Finds the signal: of the tensors that can be it, the first that reaches the most layers."""
        most, failure = -1, None
        for path in _signals(example, self._model, max(lengths, default=0), self._dim):
            try:
                times = self._follow(example, path)
            except ConvtapError as error:  # its last axis is not time
                failure = failure or error
                continue
            reached = len({name for name, _ in times} & layers)
            if reached > most:
                most, self._path, self.times = reached, path, times
            if reached == len(layers):
                return
        if self._path is None and failure is not None:
            raise failure

    def _follow(self, example: Any, path: str) -> dict[tuple[str, str], list[LayerTime]]:
        signal = dict(walk_tensors(example))[path]
        axis = self._dim % signal.dim()
        records, _ = follow(self._model, example, path, axis, self._every)
        doubts = settle(records, self._model, example, path, axis, self._every)
        found: dict[tuple[str, str], list[LayerTime]] = {}
        for number, record in enumerate(records):
            key = record.name + record.path
            time = LayerTime(record, key, int(signal.shape[axis]), doubts.get(number))
            found.setdefault((record.name, record.path), []).append(time)
        return found

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
            Unsupported: nobody knows how many frames are real.
        """
        times = self.times.get((layer, path), [])
        if not times and path and any(name == layer for name, _ in self.times):
            return None
        axis = self._ask(layer + path, times, lambda time: time.dim)
        if axis is None:
            raise Unsupported(_unknown(layer + path, "it has no time axis"))
        self._check(layer, path, times, tensor.shape[axis])
        counts = [self._frames(layer, path, times, length) for length in self._lengths]
        axis = axis + 1 if batch else axis  # of a row, which has no axis of samples
        return [row.narrow(axis, 0, count) for row, count in zip(tensor.movedim(batch, 0), counts, strict=True)]

    def _frames(self, layer: str, path: str, times: list[LayerTime], length: int) -> int:
        found = self._counts.get((layer, path, length))
        if found is None:
            found = int(self._ask(layer + path, times, lambda time: time.frames_of(length)))
            self._counts[layer, path, length] = found
        return found

    def _check(self, layer: str, path: str, times: list[LayerTime], seen: int) -> None:
        """Compares the rule with what was seen for the padded batch."""
        expected = self._frames(layer, path, times, self._full)
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


def _signals(example: Any, model: nn.Module, longest: int, dim: int) -> list[str]:
    """Returns the paths of the tensors that lengths can count samples of, the likeliest first.

    Those come first whose time axis is as long as the longest row, then those that are longer; of these, numbers of
    floating point, and what is not called a mask.

    Raises:
        InvalidValue: there is none.
    """
    names = _argument_names(model)
    found = []
    for number, (path, tensor) in enumerate(walk_tensors(example)):
        if tensor.dim() < 2 or not -tensor.dim() <= dim < tensor.dim():
            continue
        samples = int(tensor.shape[dim])
        size = 0 if samples == longest else 1 if samples > longest else 2
        mask = "mask" in path or (isinstance(example, tuple) and "mask" in names.get(path.partition("]")[0] + "]", ""))
        found.append((size, mask, not (tensor.is_floating_point() or tensor.is_complex()), number, path))
    if not found:
        raise InvalidValue("lengths= needs an input tensor (B, T) or (B, C, T), and the model is given none.")
    return [path for *_, path in sorted(found)]


def _argument_names(model: nn.Module) -> dict[str, str]:
    """By the place of a positional argument, ``[0]``, its name."""
    try:
        return {f"[{place}]": name for place, name in enumerate(inspect.signature(model.forward).parameters)}
    except (TypeError, ValueError):  # not written in Python
        return {}


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
