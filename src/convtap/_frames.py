"""Which calls of modules are on the Python stack right now."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from types import FrameType

from torch import nn

# Every call of a module, ``module(x)``, runs this function, and its local ``self`` is the module.
_CALL = nn.Module._wrapped_call_impl.__code__


def module_calls(frame: FrameType | None = None) -> Iterator[tuple[nn.Module, FrameType]]:
    """Yields the modules that are being called, innermost first, each with the frame of its call."""
    if frame is None:
        frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"], frame
        frame = frame.f_back


def outermost_call(members: Container[int]) -> tuple[nn.Module, FrameType] | None:
    """Returns the outermost call of a module whose id is in ``members``, or None if there is none."""
    found = None
    for module, frame in module_calls(sys._getframe(1)):
        if id(module) in members:
            found = (module, frame)
    return found
