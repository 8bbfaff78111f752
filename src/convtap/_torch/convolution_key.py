"""Registers kernels that see each 1-D convolution under their own dispatch key."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from convtap._torch.call_stack import pass_by_in_dynamo, skip_in_dynamo
from convtap._torch.lock import Lock
from convtap._torch.modes import Tap, Token, has_function_modes, observe, open_tokens, tracing_state
from convtap._torch.references import give_reference

# Note: [The convolution key]
# Assumption: torch has an unused dispatch key above autocast, functorch, autograd and the Python modes. An operator without
#   a kernel for the key falls through at no cost. The key affects only the threads that include it.
# Failure: removing kernels would change the operator table under another running thread. Two libraries cannot both register
#   a fallback for one key. Higher-order operators resolve keys in Python, and raise on an unknown key.
# Choice: the kernels are registered once per process, under a lock, and stay registered. A capture only includes the key in
#   its thread, and the thread's last capture excludes it. Higher-order operators are set to fall through.

_NAME = "TESTING_ONLY_GenericMode"
_STASH = "convtap_open"

_include = torch._C._dispatch_tls_set_dispatch_key_included

#: The operators that run a 1-D convolution, each with the index of the argument ``transposed``, or None.
CONVOLUTIONS: dict[str, int | None] = {
    "aten::conv1d": None,
    "aten::conv1d.padding": None,
    "aten::conv_tbc": None,
    "aten::convolution": 6,
    "aten::_convolution": 6,
    "aten::_convolution.deprecated": 6,
    "quantized::conv1d": None,
    "quantized::conv1d_relu": None,
    "quantized::conv1d_dynamic": None,
}

_aten = torch.ops.aten
#: The torch functions that run a 1-D convolution, each with the index of the argument ``transposed``, or None.
FUNCTIONS: dict[Any, int | None] = {
    torch.conv1d: None,
    _aten.conv1d: None,
    _aten.conv1d.default: None,
    _aten.conv1d.padding: None,
    torch.convolution: 6,
    torch._convolution: 6,
    _aten.convolution: 6,
    _aten.convolution.default: 6,
    _aten._convolution: 6,
    _aten._convolution.default: 6,
    _aten._convolution.deprecated: 6,
}


class _Here(threading.local):
    """The captures of this thread, and whether it includes the key.

    ``included`` is the state now, and ``again`` the state to restore after a kernel. ``again`` is initially True, since
    torch copies the key into the threads of ``torch.jit.fork``, which have no capture.
    """

    included = False
    again = True

    def __init__(self) -> None:
        self.tokens: set[Token] = set()
        self.began = False


_here = _Here()
_lock = Lock()
_libraries: list[Any] = []  # torch removes the kernels of a library when it is freed
_key: Any = None


def is_available() -> bool:
    """Registers the kernels, once per process. Returns whether convtap has the key."""
    global _key
    with _lock:
        if not _libraries:
            _libraries.append(None)  # try only once
            try:
                key = _find_key()
                if key is not None:
                    _register(key)
                    _key = key
            except (AttributeError, RuntimeError):  # the self-test reports it, and names the substitute
                pass
    return _key is not None


def _find_key() -> Any:
    try:
        key = torch._C._dispatch_key_parse(_NAME)
    except RuntimeError:
        return None
    return None if torch._C._dispatch_has_backend_fallback(key) else key


def _register(key: Any) -> None:
    library: Any = torch.library.Library
    fallback = library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _NAME)
    _libraries.append(fallback)
    libraries = {namespace: library(namespace, "IMPL") for namespace in ("aten", "quantized")}
    _libraries.extend(libraries.values())
    for name, transposed in CONVOLUTIONS.items():
        namespace, _, rest = name.partition("::")
        operator, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), operator, None), overload or "default", None)
        if found is not None:
            boxed = partial(torch._C._dispatch_call_boxed, found._handle)
            function = torch.conv1d if name.startswith("aten::conv1d") else None
            libraries[namespace].impl(rest, _kernel(key, boxed, transposed, function), _NAME)
    _let_higher_order_operators_through(key)


def _let_higher_order_operators_through(key: Any) -> None:
    from torch import _ops

    defaults = getattr(_ops, "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS", [])
    if key not in defaults:
        defaults.append(key)
    for operator in list(getattr(_ops, "_higher_order_ops", {}).values()):
        operator.fallthrough(key)


# -- the kernels


def _kernel(key: Any, boxed: Callable[..., Any], transposed: int | None, function: Any) -> Callable[..., Any]:
    """Makes the kernel of one operator.

    ``function`` is faster than ``boxed``. The kernel uses it if no mode and no subclass overrides the operator.
    """

    @skip_in_dynamo
    def convtap_convolution(*args: Any, **kwargs: Any) -> Any:
        # No local variable may hold a tensor, since torch.jit.trace names values after local variables.
        try:
            _include(key, False)
            is_plain = (
                function is not None
                and not has_function_modes()
                and type(args[0]) is Tensor
                and type(args[1]) in _PLAIN
            )
            call = function if is_plain else boxed
            if tracing_state() is not None:
                call = _as_if_from(_frame().f_back, call)
            tokens = tokens_here()
            if any(token.tap is not None for token in tokens):
                return observe(call, tokens, transposed, args, kwargs)
            _exclude_if_idle()
            return call(*args, **kwargs)
        finally:
            _include(key, _here.again)

    return convtap_convolution


_PLAIN = (Tensor, nn.Parameter)
_frame = sys._getframe


def _as_if_from(caller: FrameType | None, call: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``torch.jit.trace`` name the values of a call as without a kernel.

    The tracer looks for variables in the frame that calls an operator, and in the frame above. ``eval`` makes two frames
    with the variables of these frames.
    """
    if caller is not None and caller.f_code.co_name == "outside_dynamo":  # see ``skip_in_dynamo``
        caller = caller.f_back
    above = None if caller is None else caller.f_back
    names = [{} if frame is None else dict(frame.f_locals) for frame in (caller, above)]

    def run(*args: Any, **kwargs: Any) -> Any:
        inner = {"_call": call, "_args": args, "_kwargs": kwargs}
        outer = {"_inner": inner, "_names": names[0]}
        return eval("eval('_call(*_args, **_kwargs)', _inner, _names)", outer, names[1])

    return run


def _inherited() -> tuple[Token, ...]:
    """Returns the captures of the thread that forked this one by ``torch.jit.fork``."""
    if _here.began or not torch._C._is_key_in_tls(_STASH):
        return ()
    stashed: tuple[Token, ...] = torch._C._get_obj_in_tls(_STASH)
    return stashed


def tokens_here() -> tuple[Token, ...]:
    """Returns the captures that record the code that runs in this thread."""
    return open_tokens() or _inherited()


def _stash(tokens: tuple[Token, ...]) -> None:
    """Stores captures for torch's threads. See Note: [References lent by torch]."""
    if _steals():
        give_reference(tokens)
    torch._C._stash_obj_in_tls(_STASH, tokens)


@functools.cache
def _steals() -> bool:
    """Returns whether torch stashes an object without a reference, as torch 2.6 does."""
    probe = (object(),)
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_STASH, probe)
    steals = sys.getrefcount(probe) == before
    if steals:
        give_reference(probe)
    return steals


def is_inherited() -> bool:
    """Returns whether torch forked this thread from a thread with a capture."""
    return not _here.began and not open_tokens() and bool(_inherited())


def _exclude_if_idle() -> None:
    """Excludes the key after this call if other threads closed this one's captures."""
    if _here.began and not _here.tokens:
        _here.included = _here.again = False


# -- per thread


def here() -> set[Token]:
    """Returns the captures that include the key in this thread."""
    return _here.tokens


def begin(token: Token, tokens: set[Token]) -> None:
    """Includes the key in this thread for a capture.

    Args:
        token: the capture.
        tokens: the captures of this thread.
    """
    tokens.add(token)
    _here.began = _here.included = _here.again = True
    _stash(tuple(tokens))
    _include(_key, True)


def end(token: Token, tokens: set[Token]) -> None:
    """Excludes the key after the last capture of a thread. A second call does nothing.

    If another thread makes the call, the key stays included in the capture's thread until a convolution runs or a capture
    ends there. See Note: [Interrupts].
    """
    tokens.discard(token)
    if tokens is _here.tokens and _here.began:
        _stash(tuple(tokens))
        if not tokens:
            _here.included = _here.again = False
            _include(_key, False)


def has_captures() -> bool:
    """Returns whether a capture is open in this thread.

    If other threads closed all of them, the key is excluded now.
    """
    if _here.included and not _here.tokens:
        _here.included = _here.again = False
        _include(_key, False)
    return bool(_here.tokens)


def taps() -> list[Tap]:
    """Returns the taps of the captures that are open in this thread."""
    return [token.tap for token in _here.tokens if token.tap is not None]


def include(on: bool) -> None:
    """Includes or excludes the key in this thread while a capture is open."""
    _here.included = _here.again = on
    _include(_key, on)


@pass_by_in_dynamo
def run_without(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a call whose convolutions are not recorded."""
    if not _here.included:
        return call(*args, **kwargs)
    try:
        _include(_key, False)
        return call(*args, **kwargs)
    finally:
        _include(_key, True)


def is_included() -> bool:
    """Returns whether this thread includes the key."""
    return _key is not None and bool(torch._C._dispatch_tls_is_dispatch_key_included(_key))
