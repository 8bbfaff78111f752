"""Splits the outputs of a capture by input."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, OutOfRange, Unsupported, listed, plural
from convtap._result.call import Call, is_convolution, layout_of, record_of, shown_value
from convtap._result.keys import positions
from convtap._result.log import Log
from convtap._tensors.layout import axes_of
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import shapes, shapes_text

#: Cuts one input's tensor. Takes the call, the tensor's path in its output, the tensor without batch axis, and the input's row.
Cut: TypeAlias = "Callable[[Call, str, Tensor, int], Tensor]"


class Pass:
    """The calls and the inputs of one forward pass."""

    def __init__(self, calls: list[Call], shape: tuple[int, ...] | None) -> None:
        self.calls = calls
        self._keys = _keys(calls)
        self.shape = shape
        self.single = shape is not None and _is_single(calls, shape)
        self.unsqueezed = shape is not None and len(shape) == 1
        if self.single:
            self.size = 1
        elif shape is not None:
            self.size = shape[0]
        else:
            tensors = (tensor for call in calls for _, tensor in walk_tensors(shown_value(call)))
            self.size = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)

    def row(self, row: int, cut: Cut | None = None) -> dict[str, Tensor]:
        """Returns one input's outputs, each with its own memory."""
        found: dict[str, Tensor] = {}
        for call, stem in zip(self.calls, self._keys, strict=True):
            for path, tensor in walk_tensors(call.output):
                key = f"{stem}{path}"
                one = self.cut(key, tensor, row, axes_of(tensor.shape, layout_of(call, path)).batch)
                if key in found:
                    raise Unsupported(
                        f"two outputs have the key {key!r}: that of the layer with this name, and a part of another layer's "
                        "output. Read them with acts.calls()."
                    )
                found[key] = (one if cut is None else cut(call, call.part + path, one, row)).clone()
        return found

    def cut(self, key: str, tensor: Tensor, row: int, batch: int = 0) -> Tensor:
        if self.single:
            return tensor[0] if self.unsqueezed and tensor.dim() == 3 else tensor
        if tensor.dim() <= batch or tensor.shape[batch] != self.size:
            axis = f"axis {batch} is {tensor.shape[batch]}" if tensor.dim() else "it has no axis"
            raise Unsupported(
                f"the rows of {key!r} with shape {tuple(tensor.shape)} are not the inputs, since {axis} and the input batch is "
                f"{self.size}. Read the whole output with acts[{key!r}], or select only the other layers."
            )
        return tensor.select(batch, row)


class Samples:
    """The inputs of a capture, numbered across its forward passes."""

    def __init__(self, log: Log) -> None:
        by_pass = log.by_pass()
        self.passes = [Pass(by_pass[number], log.inputs.get(number)) for number in sorted(by_pass)]
        self._ends = list(itertools.accumulate(found.size for found in self.passes))
        self._why = next((why for number in by_pass for why in _doubts(number, by_pass, log.unclear)), None)

    def _check(self) -> None:
        """Raises Unsupported if the rows of a pass may not be its inputs."""
        if self._why is not None:
            raise Unsupported(
                f"the outputs cannot be split by input, since {self._why}. Call the model or one of its methods once for "
                "each input, open a capture for each input, or read all outputs in order with acts.calls()."
            )

    @property
    def count(self) -> int:
        """The number of inputs."""
        self._check()
        return self._ends[-1] if self._ends else 0

    def all(self) -> list[dict[str, Tensor]]:
        """Returns the outputs of each input."""
        self._check()
        return [found.row(row) for found in self.passes for row in range(found.size)]

    def valid(self, lengths: Any, timeline: Any) -> list[dict[str, Tensor]]:
        """Returns the outputs of each input, cut to the frames of the unpadded input."""
        if lengths is None or timeline is None:
            raise InvalidValue(
                f"{'lengths' if lengths is None else 'timeline'}= is missing. Pass lengths= and timeline= together: "
                "acts.samples(lengths=[16000, 12000], timeline=timeline(model, example))."
            )
        if not hasattr(timeline, "__cutter__"):
            raise InvalidType(
                f"timeline is a {type(timeline).__name__}. Pass the result of convtap.timeline(model, example)."
            )
        numbers = whole_numbers(lengths, "lengths")
        total = self.count
        if len(numbers) != total:
            raise InvalidValue(
                f"lengths has {plural(len(numbers), 'number')} for {plural(total, 'input')}. Pass the number of samples of "
                "each input, over all forward passes."
            )
        rows: list[dict[str, Tensor]] = []
        cutter = timeline.__cutter__()
        for found in self.passes:
            cut = cutter.of(numbers[len(rows) : len(rows) + found.size], found.shape)
            rows.extend([found.row(row, cut) for row in range(found.size)])
        cutter.warn()
        return rows

    def one(self, i: int) -> dict[str, Tensor]:
        """Returns one input's outputs; a negative position counts from the end."""
        try:
            i = operator.index(i)
        except TypeError:
            raise InvalidType(f"i={i!r} is not the number of an input. Write sample(0) for the first input.") from None
        self._check()
        found, row = self.locate(i)
        return found.row(row)

    def locate(self, i: int) -> tuple[Pass, int]:
        """Returns the forward pass of an input and its row; a negative ``i`` counts back."""
        total = self._ends[-1] if self._ends else 0
        if not -total <= i < total:
            raise OutOfRange(
                f"sample {i} does not exist, since the capture has {plural(total, 'input')}. Numbers start at 0."
            )
        row = i % total
        place = bisect.bisect_right(self._ends, row)
        found = self.passes[place]
        return found, row - (self._ends[place] - found.size)


def _keys(calls: list[Call]) -> list[str]:
    """Returns the keys of calls within their pass."""
    found = positions([call.name for call in calls])
    return [record_of(call).key(*position) for call, position in zip(calls, found, strict=True)]


def by_key_in_pass(log: Log) -> dict[str, list[Any]]:
    """Returns the outputs of all passes by the key of each call within its pass."""
    by_pass = log.by_pass()
    found: dict[str, list[Any]] = {}
    for number in sorted(by_pass):
        for key, call in zip(_keys(by_pass[number]), by_pass[number], strict=True):
            found.setdefault(key, []).append(call.output)
    return found


def joined_outputs(name: str, outputs: list[Any], dim: int) -> Tensor:
    """Joins outputs of a layer along an axis.

    Raises:
        Unsupported: an output is not a single tensor, or the shapes do not match.
    """
    if not all(isinstance(output, Tensor) for output in outputs):
        raise Unsupported(
            f"{name!r} returns {shapes_text(shapes(outputs[0]))}, which is not a single tensor that can be joined. Capture one "
            f"of its tensors with capture(model, {name + '[0]'!r}), or read the calls with acts.calls({name!r})."
        )
    try:
        return torch.cat(outputs, dim)
    except (RuntimeError, IndexError) as error:
        found = listed([str(tuple(output.shape)) for output in outputs])
        raise Unsupported(
            f"the outputs of {name!r} cannot be joined along axis {dim}, since their shapes are {found} ({error}). Pass "
            f"another axis as dim=, or read the calls with acts.calls({name!r})."
        ) from error


def _doubts(number: int, by_pass: dict[int, list[Call]], unclear: dict[int, tuple[str, int]]) -> Iterator[str]:
    """Yields why the rows of a pass may belong to another pass."""
    why, first = unclear.get(number, ("", -1))
    if first < 0 or not why:
        name, times = Counter(call.name for call in by_pass[number]).most_common(1)[0]
        if number in unclear and times > 1:
            yield f"{name!r} ran several times outside of a call of the model"
    elif any(other == first or unclear.get(other, ("", -1))[1] == first for other in by_pass if other != number):
        yield why


def _is_single(calls: list[Call], shape: tuple[int, ...]) -> bool:
    """Returns whether the input was one signal (C, T) or (T,) without a batch axis.

    Every Conv1d then returns (C, T), or (1, C, T) after an unsqueeze.
    """
    convolutions = [tensor for call in calls if is_convolution(call) for _, tensor in walk_tensors(shown_value(call))]
    if len(shape) > 2 or not convolutions:
        return False
    if all(tensor.dim() == 2 for tensor in convolutions):
        return True
    return len(shape) == 1 and all(tensor.dim() == 3 and tensor.shape[0] == 1 for tensor in convolutions)


def whole_numbers(values: Any, name: str) -> list[int]:
    """Returns the numbers of a (B,) tensor, array or sequence of lengths.

    Raises:
        InvalidType: a value is not a whole number.
        InvalidValue: a number is negative, or the number of axes is not one.
    """
    hint = f"Pass one whole number per input, such as {name}=[16000, 12000]."
    if isinstance(values, (str, bytes)) or not (isinstance(values, Iterable) or hasattr(values, "__array__")):
        raise InvalidType(f"{name} is a {type(values).__name__}. {hint}")
    if getattr(values, "ndim", 1) != 1:
        raise InvalidValue(f"{name} has shape {tuple(values.shape)}, which is not one axis. {hint}")
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    numbers: list[int] = []
    for value in found:
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        whole = isinstance(value, float) and value.is_integer()
        try:
            numbers.append(int(value) if whole else operator.index(value))
        except TypeError:
            raise InvalidType(f"{name} holds {value!r}, which is not a whole number. {hint}") from None
        if isinstance(value, bool) or numbers[-1] < 0:
            raise InvalidValue(f"{name} holds {value!r}, which is not a number of samples. {hint}")
    return numbers
