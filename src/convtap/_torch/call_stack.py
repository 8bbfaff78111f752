"""Which calls of modules are on the Python stack right now, and what Dynamo is to leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

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

_Function = TypeVar("_Function", bound=Callable[..., Any])

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


def is_called_by(prefix: str, package: str) -> bool:
    """Whether a function whose name begins so, of a package, is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.startswith(prefix) and frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False


def outermost_call(members: Container[int]) -> tuple[nn.Module, FrameType] | None:
    """Returns the outermost call of a module whose id is in ``members``, or None if there is none."""
    found = None
    for module, frame in module_calls(sys._getframe(1)):
        if id(module) in members:
            found = (module, frame)
    return found


# -- Dynamo


def skip_in_dynamo(function: _Function) -> _Function:
    """Keeps Dynamo from compiling a function of convtap, and what that calls."""
    if _leave_alone(function, "SKIP"):
        return function

    @functools.wraps(function)
    def outside_dynamo(*args: Any, **kwargs: Any) -> Any:  # torch 2.6 leaves alone one function, not what it calls
        prior = _eval_frame().set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            _eval_frame().set_eval_frame(prior)

    _leave_alone(outside_dynamo, "DEFAULT")
    return outside_dynamo  # type: ignore[return-value]


def pass_by_in_dynamo(function: _Function) -> _Function:
    """Keeps Dynamo from compiling a function of convtap; what that calls is compiled as if it were not there."""
    _leave_alone(function, "DEFAULT")
    return function


def _leave_alone(function: Any, inside: str) -> bool:
    """Returns whether what the function calls is treated as asked."""
    found = _eval_frame()
    if not hasattr(found, "set_code_exec_strategy"):  # torch 2.6
        found.skip_code(function.__code__)
        return inside == "DEFAULT"
    action = found._FrameAction
    found.set_code_exec_strategy(function.__code__, found._FrameExecStrategy(action.SKIP, getattr(action, inside)))
    return True


def _eval_frame() -> Any:
    from torch._C._dynamo import eval_frame  # the C part, which does not import Dynamo

    return eval_frame
