"""The settings of a pass that follows the time axis, and its records of layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from convtap._time.mark import Mark


@dataclass(frozen=True)
class Pass:
    """The settings of a pass.

    Attributes:
        model: the model.
        path: the place of the signal in an example.
        axis: the axis of the signal that is time.
        method: the method that is called instead of the model itself, or None.
        zeros: whether the signal is known to be padded with zeros.
        every: ``"output"`` to record every tensor that modules return, ``"input"`` to record every tensor that they take,
            or None for the first tensor that they return.
    """

    model: nn.Module
    path: str
    axis: int
    method: str | None = None
    zeros: bool = False
    every: str | None = None


@dataclass(frozen=True)
class Record:
    """One run of one layer.

    Attributes:
        name: the layer.
        kind: the class of the module, or ``"function"``.
        is_layer: whether it is a convolution, and so has a line in the table.
        mark: the mark of its output.
        shape: the shape of the output.
        path: the place of the tensor in the output; empty if the output is a tensor.
        numbers: the operations so far that read a value of the signal as a Python number.
        depends: whether it depends on the signal at all.
        doubt: why its frame counts at other lengths are not known, or None.
    """

    name: str
    kind: str
    is_layer: bool
    mark: Mark
    shape: tuple[int, ...]
    path: str = ""
    numbers: tuple[str, ...] = ()
    depends: bool = True
    doubt: str | None = None
