"""One frame that drove a channel high, and the input window that it saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convtap._errors import InvalidType, OutOfRange, plural
from convtap._public import public


@public
class Window(NamedTuple):
    """A piece of an input that a frame saw.

    Attributes:
        values: the piece, such as (C, W); zeros where it leaves the signal.
        inside: (W,) of bool: which of its samples are in the signal.
    """

    values: Tensor
    inside: Tensor


@public
@dataclass(frozen=True)
class Hit:
    """One frame that drove a channel high.

    Attributes:
        sample: which input of the data set, from 0.
        channel: which channel of the layer.
        start: the first input sample that the frame saw; below 0 if it saw padding.
        stop: the one after the last.
        value: the layer's output there.
        frame: which frame.
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
        """Cuts out what the frame saw, with zeros where it saw padding.

        Args:
            x: the input of this sample, such as (C, T); or all inputs of the data set, such as (N, C, T), or anything that
                ``x[sample]`` can be taken of.

        Raises:
            OutOfRange: ``x`` holds all inputs, and not this one.
            InvalidType: it is no tensor, and ``x[sample]`` is none either.
        """
        signal = self._signal(x)
        axis = self._time_dim
        size = int(signal.shape[axis])
        places = torch.arange(self.start, self.stop, device=signal.device)
        inside = (places >= 0) & (places < size)
        values = signal.index_select(axis % signal.dim(), places.clamp(0, size - 1))
        shape = [1] * signal.dim()
        shape[axis] = -1
        return Window(values.masked_fill(~inside.reshape(shape), 0), inside)

    def _signal(self, x: Any) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == self._rank:
            return x
        try:
            found = x[self.sample]
        except (IndexError, KeyError):
            raise OutOfRange(
                f"this hit is in sample {self.sample}, and x holds {plural(len(x), 'input')}. Pass the input of that sample, "
                "or all inputs of the data set."
            ) from None
        except TypeError:
            found = x
        found = found[0] if isinstance(found, (tuple, list)) else found
        if not isinstance(found, Tensor) or found.dim() != self._rank:
            shape = f"has shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"is a {type(found).__name__}"
            raise InvalidType(
                f"x {shape}, and one input has {self._rank} axes. Pass the input of sample {self.sample}, or all inputs."
            )
        return found
