"""Finds the module calls on the Python stack, and marks functions for Dynamo."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CellType, CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from convtap._torch.frame_search import FrameSearch


class _Probe(nn.Module):
    def forward(self) -> CodeType:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is self:
                return frame.f_code
            frame = frame.f_back
        return nn.Module._wrapped_call_impl.__code__


#: The code of the torch function that runs every ``module(x)``. Its local ``self`` is the module. A library may have wrapped
#: the function, so its code is read from the stack of a call.
CALL: CodeType = _Probe()()

_Function = TypeVar("_Function", bound=Callable[..., Any])

FORWARD_OF_CONV1D = nn.Conv1d.forward.__code__


class Calls:
    """The module calls of this thread, from the innermost to a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._search = FrameSearch({id(CALL): CALL})

    def modules(self) -> Iterator[nn.Module]:
        """Yields the modules, innermost first; the model itself is the last one."""
        for frame in self._search.frames(sys._getframe(1)):
            module = frame.f_locals.get("self")
            if module is not None:
                yield module
            if module is self._model:
                return

    def forget(self) -> None:
        """Removes the marks of the searches from the frames of this thread."""
        self._search.forget()


# Note: [Methods]
# Assumption: the methods of a model are the functions that its class and bases below ``nn.Module`` define, and the
#   functions that were set on an instance. Of torch's own modules only ``forward`` counts.
# Failure: on the stack, a function with a model as its argument, ``train(model, loader)``, looks like a method.
# Choice: methods are identified by their code objects, found through decorators. A decorator's own code does not count,
#   since it may also wrap functions that are not methods.


def methods_of(kind: type) -> dict[int, CodeType]:
    """Returns the code of the methods of a module class and its bases, by ``id``."""
    found: dict[int, CodeType] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        known = _methods.get(base)
        if known is None:
            names = ["forward"] if base.__module__.startswith("torch.nn.") else list(base.__dict__)
            codes = [_code(base.__dict__.get(name), base.__qualname__) for name in names]
            known = _methods[base] = {id(code): code for code in codes if code is not None}
        found.update(known)
    return found


def own_methods(module: nn.Module) -> dict[int, CodeType]:
    """Returns the code of a module's methods other than ``forward``, by ``id``."""
    found = {key: code for key, code in methods_of(type(module)).items() if code.co_name not in ("forward", "__init__")}
    found.update((id(code), code) for code in _functions_of(module))
    return found


def _functions_of(module: nn.Module) -> Iterator[CodeType]:
    """Yields the code of the functions that were set on an instance of a module."""
    for value in list(module.__dict__.values()):  # a list: another thread may set an attribute, such as a shim
        code = _code(value) if isinstance(value, (FunctionType, MethodType, functools.partial)) else None
        if code is not None:
            yield code


_methods: WeakKeyDictionary[type, dict[int, CodeType]] = WeakKeyDictionary()


def _code(value: Any, owner: str = "", depth: int = 5) -> CodeType | None:
    """Returns the code of a function without its decorators, or None."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (functools.partial, functools.partialmethod)):
        value = value.func
    value = getattr(value, "__func__", value)
    inner = getattr(value, "__wrapped__", None)
    if inner is None and owner:
        inside = (cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != _EMPTY)
        inner = next((f for f in inside if getattr(f, "__qualname__", "").startswith(owner + ".")), None)
    if inner is not None and depth:
        return _code(inner, owner, depth - 1)
    code = getattr(value, "__code__", None)
    return code if isinstance(code, CodeType) else None


_EMPTY = CellType()


class Members:
    """The modules of a model, and the code of their methods."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.ids = {id(module) for module in modules}
        self._codes: dict[int, CodeType] = {}
        for kind in {type(module): None for module in modules}:
            self._codes.update(methods_of(kind))
        self._functions: dict[int, tuple[CodeType, nn.Module]] = {}
        for module in modules:
            for code in _functions_of(module):
                self._functions[id(code)] = (code, module)
        functions = {key: code for key, (code, _) in self._functions.items()}
        self._search = FrameSearch({id(CALL): CALL, **self._codes, **functions})

    def forget(self) -> None:
        """Removes the marks of its searches from the frames of this thread."""
        self._search.forget()

    def entry(self, frame: FrameType | None) -> tuple[nn.Module, FrameType] | None:
        """Returns the outermost call around a frame, or None.

        The call is that of a module, or of one of its methods.
        """
        found = list(self._search.frames(frame))
        for frame in reversed(found):  # f_locals copies the frame's variables, so read as few frames as possible
            owner = frame.f_locals.get("self") if frame.f_code is CALL else first_argument(frame)
            if id(owner) in self.ids:
                return owner, frame  # type: ignore[return-value]
            if id(frame.f_code) in self._functions:
                return self._functions[id(frame.f_code)][1], frame
        return None


def first_argument(frame: FrameType) -> Any:
    """Returns the first positional argument of a function, whatever its name."""
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    rest = frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount]) if code.co_flags & CO_VARARGS else None
    return rest[0] if isinstance(rest, tuple) and rest else None


def is_plain_call(frame: FrameType) -> bool:
    """Returns whether a frame is a plain call of a module, not of another method."""
    return frame.f_code is CALL or frame.f_code.co_name in ("forward", "call", "__call__")


def arguments_of(frame: FrameType) -> list[Any]:
    """Returns the current arguments of a running function, without the first one."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
    values = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    return values[1:] if code.co_argcount else values


def is_called_by(prefix: str, package: str) -> bool:
    """Returns whether a function with a name prefix, from a package, is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.startswith(prefix) and frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False


# -- Dynamo


def skip_in_dynamo(function: _Function) -> _Function:
    """Keeps Dynamo from compiling a function of convtap and all that it calls."""
    if _leave_alone(function, "SKIP"):
        return function

    @functools.wraps(function)
    def outside_dynamo(*args: Any, **kwargs: Any) -> Any:  # torch 2.6 skips the function, but not its callees
        prior = _eval_frame().set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            _eval_frame().set_eval_frame(prior)

    _leave_alone(outside_dynamo, "DEFAULT")
    return outside_dynamo  # type: ignore[return-value]


def pass_by_in_dynamo(function: _Function) -> _Function:
    """Keeps Dynamo from compiling a function of convtap.

    Dynamo still compiles the functions that it calls.
    """
    _leave_alone(function, "DEFAULT")
    return function


def _leave_alone(function: Any, inside: str) -> bool:
    """Makes Dynamo skip a function. Returns whether its callees follow ``inside``."""
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
