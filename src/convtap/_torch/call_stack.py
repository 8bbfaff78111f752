"""Which calls of modules are on the Python stack right now."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from types import CodeType, FrameType

from torch import nn

# Every call of a module, ``module(x)``, runs this function, and its local ``self`` is the module.
_CALL = nn.Module._wrapped_call_impl.__code__

_CONV_FORWARD = nn.Conv1d._conv_forward.__code__
_FORWARD = nn.Conv1d.forward.__code__
_IMPL = nn.Module._call_impl.__code__
_HOOKED = next((c for c in _IMPL.co_consts if isinstance(c, CodeType) and c.co_name == "inner"), _IMPL)


def called_conv1d(frame: FrameType | None) -> object:
    """Returns the module whose convolution a frame is, if it is a plain Conv1d that was called; else None.

    The short way for the common case: it looks at three frames, and not at the whole stack.
    """
    if frame is None or frame.f_code is not _CONV_FORWARD:
        return None
    forward = frame.f_back
    if forward is None or forward.f_code is not _FORWARD:
        return None
    caller = forward.f_back
    if caller is None or (caller.f_code is not _HOOKED and caller.f_code is not _IMPL):
        return None  # forward itself was called, so that no hook will see it
    return forward.f_locals["self"]


def module_calls(frame: FrameType | None = None) -> Iterator[tuple[nn.Module, FrameType]]:
    """Yields the modules that are being called, innermost first, each with the frame of its call."""
    if frame is None:
        frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"], frame
        frame = frame.f_back


def is_method_of(members: Container[int]) -> bool:
    """Whether a method that a model defines is running on a module whose id is in ``members``, called or not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if id(owner) in members and _defines(type(owner), code):
                return True
        frame = frame.f_back
    return False


def _defines(kind: type, code: CodeType) -> bool:
    """Whether a class, or a base of it below nn.Module, has a method with this code."""
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        if getattr(base.__dict__.get(code.co_name), "__code__", None) is code:
            return True
    return False


def outermost_call(members: Container[int]) -> tuple[nn.Module, FrameType] | None:
    """Returns the outermost call of a module whose id is in ``members``, or None if there is none."""
    found = None
    for module, frame in module_calls(sys._getframe(1)):
        if id(module) in members:
            found = (module, frame)
    return found
