"""A pass that follows the time axis, and the runs of layers that it notes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from convtap._time.mark import Mark


@dataclass(frozen=True)
class Pass:
    """What is run, and what is followed in it.

    Attributes:
        model: the model.
        path: where in an example the signal is.
        axis: the axis of the signal that is time.
        method: the method that is called instead of the model itself, or None.
        zeros: whether the signal is known to be padded with zeros.
        every: ``"output"`` or ``"input"`` to record every tensor that modules return, or accept; None for the first one
            that they return.
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
        mark: what is known of its output's time axis.
        shape: the shape of the output.
        path: which tensor of the output it is about; empty if the output is one.
        numbers: what had read a value of the signal as a Python number by then.
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
