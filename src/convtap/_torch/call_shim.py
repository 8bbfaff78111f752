"""Wraps the calls of a module in the attribute that torch uses for compiled calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

from convtap._torch.call_stack import CALL, pass_by_in_dynamo
from convtap._torch.lock import Lock

# Note: [The shim]
# Assumption: ``Module.__call__`` runs the instance's ``_compiled_call_impl`` (set by ``model.compile()``), if it has one,
#   in place of ``_call_impl``. Copies and pickles of the module omit the attribute. Dynamo ignores it.
# Failure: hooks on the model would switch off the fast path of ``nn.TransformerEncoder``, become part of the compiled
#   code, and change a dictionary while another thread iterates over it.
# Choice: one attribute of one instance, set and deleted atomically. Captures may overlap, so a shim has a list of
#   listeners. The last listener to leave removes the shim.

#: Called as ``listener(call, module, args, kwargs)``. Runs ``call(*args, **kwargs)`` and returns the caller's result.
Listener: TypeAlias = "Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]"

_ATTRIBUTE = "_compiled_call_impl"
_frame = sys._getframe
_lock = Lock()


class _Shim:
    __slots__ = ("call", "compiled", "listeners", "module")

    def __init__(self, module: nn.Module, compiled: Any, listeners: tuple[Listener, ...]) -> None:
        self.module = module
        self.compiled = compiled  # the result of ``module.compile()``, or None
        self.call = module._call_impl if compiled is None else compiled
        self.listeners = listeners

    @pass_by_in_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, caller = self.module, _frame(1)
        if caller.f_code is CALL and caller.f_locals["self"] is not module:  # a replica, whose ``__dict__`` is a copy
            return caller.f_locals["self"]._call_impl(*args, **kwargs)
        call, listeners = self.call, self.listeners
        if len(listeners) == 1:
            return listeners[0](call, module, args, kwargs)
        for listener in listeners:
            call = _Heard(listener, call, module)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


class _Heard:
    __slots__ = ("call", "listener", "module")

    def __init__(self, listener: Listener, call: Callable[..., Any], module: nn.Module) -> None:
        self.listener, self.call, self.module = listener, call, module

    @pass_by_in_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.listener(self.call, self.module, args, kwargs)


# TorchScript ignores the attributes in this list.
_ignored_by_torchscript = getattr(torch.jit._recursive, "ignored_attributes", [])
if _ATTRIBUTE not in _ignored_by_torchscript:
    _ignored_by_torchscript.append(_ATTRIBUTE)


def listen_to_all(modules: Iterable[nn.Module], listener: Listener) -> None:
    """Passes every call of several modules to a listener."""
    with _lock:
        for module in modules:
            own = module.__dict__
            if _ATTRIBUTE in own:
                _listen(module, listener)
            else:
                own[_ATTRIBUTE] = _Shim(module, None, (listener,))


def listen(module: nn.Module, listener: Listener) -> None:
    """Passes every call of a module to a listener.

    If a module has several listeners, the newest one is called first.
    """
    with _lock:
        _listen(module, listener)


def _listen(module: nn.Module, listener: Listener) -> None:
    shim = module.__dict__.get(_ATTRIBUTE)
    if isinstance(shim, _Shim) and shim.module is module:
        shim.listeners = (*(other for other in shim.listeners if other != listener), listener)
    else:
        module.__dict__[_ATTRIBUTE] = _Shim(module, shim.compiled if isinstance(shim, _Shim) else shim, (listener,))


def leave(modules: Iterable[nn.Module], listener: Listener) -> None:
    """Removes a listener from modules. A second call does nothing.

    See Note: [Interrupts].
    """
    with _lock:
        for module in modules:
            shim = module.__dict__.get(_ATTRIBUTE)
            if not isinstance(shim, _Shim):
                continue
            left = () if shim.listeners == (listener,) else tuple(one for one in shim.listeners if one != listener)
            if left:
                shim.listeners = left
            elif shim.compiled is None:
                del module.__dict__[_ATTRIBUTE]
            else:
                module.__dict__[_ATTRIBUTE] = shim.compiled


def compiled_call(module: nn.Module) -> Any:
    """Returns the result of ``module.compile()``, or None."""
    found = module._compiled_call_impl
    return found.compiled if isinstance(found, _Shim) else found
