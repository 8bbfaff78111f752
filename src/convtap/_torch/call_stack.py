"""Which calls of modules are on the Python stack right now, and what Dynamo is to leave alone."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn


class _Probe(nn.Module):
    def forward(self) -> CodeType:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is self:
                return frame.f_code
            frame = frame.f_back
        return nn.Module._wrapped_call_impl.__code__


#: Every call of a module, ``module(x)``, runs this function of torch's, and its local ``self`` is the module. It is looked
#: for on the stack of a call, since a library may have wrapped it.
CALL: CodeType = _Probe()()

FORWARD_OF_CONV1D = nn.Conv1d.forward.__code__


def module_calls(frame: FrameType | None = None) -> Iterator[tuple[nn.Module, FrameType]]:
    """Yields the modules that are being called, innermost first, each with the frame of its call."""
    if frame is None:
        frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL:
            module = frame.f_locals.get("self")
            if module is not None:
                yield module, frame
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


# -- Dynamo


def skip_in_dynamo(*functions: Any) -> None:
    """Keeps Dynamo from compiling functions of convtap, and what they call."""
    _leave_alone(functions, "SKIP")


def pass_by_in_dynamo(*functions: Any) -> None:
    """Keeps Dynamo from compiling functions of convtap; what they call is compiled as if they were not there."""
    _leave_alone(functions, "DEFAULT")


def _leave_alone(functions: tuple[Any, ...], inside: str) -> None:
    from torch._C._dynamo import eval_frame  # the C part, which does not import Dynamo

    found: Any = eval_frame
    for function in functions:
        if not hasattr(found, "set_code_exec_strategy"):  # torch 2.6
            found.skip_code(function.__code__)
            continue
        action = found._FrameAction
        strategy = found._FrameExecStrategy(action.SKIP, getattr(action, inside))
        found.set_code_exec_strategy(function.__code__, strategy)
