"""The frames with the highest outputs, and the input windows that they saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtap._errors import InvalidType, InvalidValue, OutOfRange, brief, listed, plural
from convtap._public import public
from convtap._select.example import is_array
from convtap._spelling import printable_repr


@public
class Window(NamedTuple):
    """The piece of an input that a frame saw.

    Attributes:
        values: the piece, such as (C, W), with zeros outside of the signal.
        inside: a (W,) tensor of bool, True for samples in the signal.
    """

    values: Tensor
    inside: Tensor


@public
@printable_repr
@dataclass(frozen=True)
class Hit:
    """A frame with a high value in one channel.

    Attributes:
        sample: the number of the input in the data set, from 0.
        channel: the channel of the layer.
        start: the first input sample that the frame saw; negative if it saw padding.
        stop: the input sample after the last one that the frame saw.
        value: the layer's output.
        frame: the number of the frame.
    """

    sample: int
    channel: int
    start: int
    stop: int
    value: float
    frame: int
    _rank: int = field(default=2, repr=False, compare=False)
    _time_dim: int = field(default=-1, repr=False, compare=False)

    def window(self, x: Any) -> Window:
        """Returns the piece of the input that the frame saw, with zeros for padding.

        Args:
            x: the input of this sample, such as (C, T); or all inputs, such as (N, C, T) or a data set.

        Raises:
            OutOfRange: ``x`` has no input with this number.
            InvalidType: neither ``x`` nor ``x[sample]`` is a tensor or an array.
        """
        return self._cut(_tensor(x) if self._is_one(x) else self._input(x), 0)

    def _cut(self, signal: Tensor, padding: float) -> Window:
        """Cuts the window out of the input of this sample."""
        signal = signal.movedim(self._time_dim, -1)
        size = int(signal.shape[-1])
        places = torch.arange(self.start, self.stop, device=signal.device)
        inside = (places >= 0) & (places < size)
        values = signal[..., places.clamp(0, size - 1)].masked_fill(~inside, padding)
        return Window(values.movedim(-1, self._time_dim), inside)

    def _is_one(self, x: Any) -> bool:
        """Returns whether ``x`` is a single input, not all of them."""
        return (isinstance(x, Tensor) or is_array(x)) and x.ndim == self._rank

    def _input(self, x: Any) -> Tensor:
        """Returns the input of this sample from all inputs."""
        try:
            found = x[self.sample]
        except (IndexError, KeyError):
            holds = f"x holds {plural(len(x), 'input')}" if hasattr(x, "__len__") else "x has no such input"
            raise OutOfRange(
                f"this hit is in sample {self.sample}, but {holds}. Pass the input of that sample, or all inputs of the "
                "data set."
            ) from None
        except (TypeError, NotImplementedError):  # not indexed by number: a DataLoader, an iterable data set
            found = x
        found = _tensor(found[0] if isinstance(found, (tuple, list)) and found else found)
        if not isinstance(found, Tensor) or found.dim() != self._rank:
            shape = f"has shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"is a {type(found).__name__}"
            write = f"Pass the input of sample {self.sample}, or all inputs."
            if isinstance(found, Mapping):
                key = next((key for key, value in found.items() if self._is_one(value)), "x")
                write = f"Pass the signals alone: [item[{key!r}] for item in x]."
            raise InvalidType(f"x {shape}, but one input has {self._rank} axes. {write}")
        return found


@public
def windows(hits: Iterable[Hit], x: Any, *, padding_value: float = 0.0) -> Tensor:
    """Stacks the input windows of hits.

    Each input is read only once, also if it has several hits.

    Args:
        hits: the result of ``top``, or some of its hits.
        x: all inputs of the data set, in the order in which ``top`` read them: a tensor or array such as (N, C, T), a list of
            tensors or arrays (C, T), or a ``Dataset`` that is indexed by sample number. If an item is a tuple, such as
            (x, label), its first element is the input.
        padding_value: the value of samples outside of the signal.

    Returns:
        A tensor (hits, C, W), in the order of the hits. W is ``stop - start`` of each hit. The other axes are those of an
        input.

    Raises:
        InvalidValue: ``hits`` is empty, the windows differ in length or in channels, or ``padding_value`` does not fit the
            type of the input.
        OutOfRange: ``x`` does not hold the input of a hit.
        InvalidType: ``hits`` holds other objects, ``x`` is a single input or is not indexed by sample number, or
            ``padding_value`` is not a number.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import top, windows
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3, bias=False))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> x = torch.zeros(2, 1, 50)
        >>> x[0, 0, 30:32], x[1, 0, 20:23] = 1.0, 2.0
        >>> windows(top(model, x, "0", 2), x)
        tensor([[[2., 2., 2.]],
        <BLANKLINE>
                [[0., 1., 1.]]])
    """
    pairs = cut_windows(hits, x, padding_value)
    first, values = pairs[0], [window.values for _, window in pairs]
    other = next((i for i, piece in enumerate(values) if piece.shape != values[0].shape), None)
    if other is not None:
        raise InvalidValue(
            f"the windows in samples {first[0].sample} and {pairs[other][0].sample} have shapes {tuple(values[0].shape)} and "
            f"{tuple(values[other].shape)}, so they do not stack. Pass inputs with the same channels."
        )
    return torch.stack(values)


def cut_windows(hits: Iterable[Hit], x: Any, padding_value: float = 0.0) -> list[tuple[Hit, Window]]:
    """Cuts the window of each hit out of the data, and reads each input once.

    The arguments are those of ``windows``.
    """
    every = _checked(hits)
    if isinstance(padding_value, bool) or not isinstance(padding_value, Real):
        raise InvalidType(f"padding_value is a {type(padding_value).__name__}. Pass a number: padding_value=0.0.")
    if every[0]._is_one(x):
        raise InvalidType(
            f"x has shape {tuple(x.shape)}, which is a single input. Pass all inputs of the data set, or x[None] if this is "
            "the only one."
        )
    pieces: dict[int, Window] = {}
    for _, places in groupby(sorted(range(len(every)), key=lambda i: every[i].sample), lambda i: every[i].sample):
        numbers = list(places)
        signal = every[numbers[0]]._input(x)
        padding = _fitting(padding_value, signal.dtype)
        pieces |= {i: every[i]._cut(signal, padding) for i in numbers}
    return [(hit, pieces[i]) for i, hit in enumerate(every)]


def by_channel(hit: Hit, window: Window) -> Tensor:
    """Returns the values of a hit's window as (C, W), whichever axis is its time."""
    return window.values.movedim(hit._time_dim, -1).reshape(-1, len(window.inside))


def _checked(hits: Any) -> list[Hit]:
    """Returns the hits as a list. Raises if their windows differ in length."""
    if isinstance(hits, Hit) or not isinstance(hits, Iterable):
        raise InvalidType(
            f"hits is a {type(hits).__name__}. Pass the result of top, or a list of hits: windows([hit], x)."
        )
    every = list(hits)
    wrong = next((one for one in every if not isinstance(one, Hit)), None)
    if wrong is not None:
        raise InvalidType(
            f"hits holds {brief(wrong)}, which is a {type(wrong).__name__}. Pass the result of top: windows(hits, x)."
        )
    if not every:
        raise InvalidValue("hits is empty. Check for that before windows(hits, x), or lower the threshold of top.")
    lengths = sorted({hit.stop - hit.start for hit in every})
    if len(lengths) > 1:
        raise InvalidValue(
            f"the windows of these hits differ in length: {listed(map(str, lengths))} samples. Pass the hits of one layer, "
            f"or of one length: windows([h for h in hits if h.stop - h.start == {lengths[-1]}], x)."
        )
    return every


def _fitting(value: float, dtype: torch.dtype) -> float:
    """Returns the padding value as a number of the input's type."""
    if dtype.is_floating_point or dtype.is_complex:
        return float(value)
    whole = torch.tensor(float(value), dtype=torch.float64).to(dtype).item()
    if whole != value:
        raise InvalidValue(
            f"padding_value={value!r} is not a value of the inputs' type {dtype}. Pass one of that type, or floating-point "
            "inputs: x.float()."
        )
    return whole


def _tensor(value: Any) -> Any:
    """Converts an array to a tensor. Returns other values unchanged."""
    if not is_array(value):
        return value
    import numpy

    # a copy in native byte order: torch refuses other orders and negative strides, and warns of read-only arrays
    return torch.from_numpy(numpy.array(value, value.dtype.newbyteorder("="), order="C", subok=False))
