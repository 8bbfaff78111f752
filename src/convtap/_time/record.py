"""One run of one layer, as a pass that follows the time axis notes it."""

from __future__ import annotations

from dataclasses import dataclass

from convtap._time.mark import Mark


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
    """

    name: str
    kind: str
    is_layer: bool
    mark: Mark
    shape: tuple[int, ...]
    path: str = ""
    numbers: tuple[str, ...] = ()
