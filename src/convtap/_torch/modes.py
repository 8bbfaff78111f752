"""Tracks the open captures of each context and owns the function mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

import torch
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

# Note: [Contexts]
# Assumption: the convolution key is per thread. Hooks are on the model, so they fire in every thread and task.
# Failure: if two threads, or two tasks, capture the same model, each would record the other's calls.
# Choice: a capture puts its token into a context variable. A task inherits the captures that were open when it was created.
#   A new thread has no open capture, and a message names the layers that run there instead of recording them.


#: Called as ``watcher(call, func, args, kwargs)``. Runs ``call(*args, **kwargs)`` and returns the caller's result.
Watcher: TypeAlias = "Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]"


class Tap(Protocol):
    """Sees the convolutions that run while its capture is open."""

    #: Whether compiled code ran while the capture was open.
    compiled_code_ran: bool

    def before(self, transposed: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the name to record a convolution under, or None to ignore it."""

    def after(self, name: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records an output. Returns a replacement for the caller, or None."""

    def pause(self) -> None:
        """Stops watching the model's weights while compiled code runs."""

    def resume(self) -> None:
        """Watches the weights again."""


class Token:
    """Stands for one open capture.

    A closed token is empty, so a context that outlives the capture keeps nothing alive.
    """

    __slots__ = ("__weakref__", "is_open", "tap", "watcher")

    def __init__(self) -> None:
        self.is_open = True
        self.tap: Tap | None = None
        self.watcher: Watcher | None = None


_open: ContextVar[tuple[Token, ...]] = ContextVar("convtap_open", default=())

#: Returns the tokens of the captures that are open in this context, oldest first.
open_tokens = _open.get


def enter(token: Token) -> None:
    """Opens a capture in this context, and drops those that another context closed."""
    _open.set((*(other for other in _open.get() if other.is_open), token))


def leave(token: Token) -> None:
    """Closes a capture in this context. Captures may close in any order."""
    token.is_open = False
    token.tap = token.watcher = None
    _open.set(tuple(other for other in _open.get() if other is not token))


def observe(
    call: Callable[..., Any],
    tokens: tuple[Token, ...],
    transposed: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs one convolution for the open captures. Returns the caller's result.

    The newest capture is nearest to the convolution.

    Args:
        call: the function that runs the convolution.
        tokens: the captures.
        transposed: the index of the argument ``transposed``, or None.
        args: the convolution's arguments.
        kwargs: the convolution's keyword arguments.
    """
    if _len_torch_function_stack():  # TorchScript runs operators under a user's mode
        with torch._C.DisableTorchFunction():
            return _observe(call, tokens, transposed, args, kwargs)
    return _observe(call, tokens, transposed, args, kwargs)


def _observe(
    call: Callable[..., Any],
    tokens: tuple[Token, ...],
    transposed: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    taps = [token.tap for token in tokens if token.tap is not None]
    with outside_modes() if tracing_state() is not None else nullcontext():  # sizes are traced tensors there
        plans = [(tap, tap.before(transposed, args, kwargs)) for tap in taps]
    output = call(*args, **kwargs)
    failed: BaseException | None = None
    for tap, plan in reversed(plans):
        if plan is not None:
            try:
                replacement = tap.after(plan, output, args, kwargs)
                output = output if replacement is None else replacement
            except BaseException as error:  # one capture failed, but the others still record the output
                failed = failed or error
    if failed is not None:
        raise failed
    return output


#: A context in which no function mode sees convtap's own torch calls.
outside_function_modes = torch._C.DisableTorchFunction
#: Returns the number of active function modes in this thread.
has_function_modes = _len_torch_function_stack
#: Returns the number of active dispatch modes in this thread.
has_dispatch_modes = torch._C._len_torch_dispatch_stack


#: Returns the graph that ``torch.jit.trace`` is making in this thread, or None.
tracing_state = torch._C._get_tracing_state
#: Returns the number of the backward pass that runs in this thread, or -1. A forward pass inside a backward pass is
#: activation checkpointing's recomputation of an earlier forward pass.
backward_task = torch._C._current_graph_task_id


@contextmanager
def outside_modes() -> Iterator[None]:
    """A context in which no mode or tracer sees convtap's own torch calls."""
    state = tracing_state()
    with outside_function_modes(), torch._C._DisableTorchDispatch() if has_dispatch_modes() else nullcontext():
        try:
            if state is not None:
                torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            yield
        finally:
            if state is not None:
                torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


# Note: [One mode a thread]
# Assumption: a TorchFunctionMode sees every call of a torch function in the thread that pushed it.
# Failure: captures may overlap without nesting, but modes form a stack. Popping could remove another capture's mode, or the
#   user's mode.
# Choice: the first capture of a thread that needs the mode pushes it. The last one removes it, wherever it is in the stack
#   by then. The mode passes each call to the captures that are open in the current context.


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watchers = [token.watcher for token in open_tokens() if token.watcher is not None]
        return _pass_on(watchers, func, func, args, kwargs or {})


def _pass_on(watchers: list[Watcher], call: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a call for several watchers. The newest watcher is nearest to the call."""
    if not watchers:
        return call(*args, **kwargs)
    outer, *inner = watchers
    if not inner:
        return outer(call, func, args, kwargs)
    return outer(lambda *args, **kwargs: _pass_on(inner, call, func, args, kwargs), func, args, kwargs)


class _Here(threading.local):
    """This thread's mode, and the captures that need it."""

    def __init__(self) -> None:
        self.tokens: set[Token] = set()
        self.mode: _FunctionMode | None = None
        self.above: tuple[int, list[Any]] | None = None


_here = _Here()


def here() -> set[Token]:
    """Returns the captures that need the mode in this thread."""
    return _here.tokens


def begin(token: Token, tokens: set[Token]) -> None:
    """Passes the torch calls of this thread to a capture's watcher.

    Args:
        token: the capture.
        tokens: the captures of this thread.
    """
    tokens.add(token)
    if _here.mode is None:
        _here.mode = _stray() or _FunctionMode()
        if _place(_here.mode) is None:
            _push_on_torch_function_stack(_here.mode)


def end(token: Token, tokens: set[Token]) -> None:
    """Removes the mode after the last capture of a thread. A second call does nothing.

    If another thread makes the call, the mode stays idle on the capture's thread until another capture ends there. See
    Note: [Interrupts].
    """
    tokens.discard(token)
    if _here.mode is not None and tokens is _here.tokens and not tokens:
        _remove(_here.mode)
        _here.mode = None


def _stray() -> _FunctionMode | None:
    """Returns convtap's mode if an interrupt left it on the stack, or None.

    Torch pops a mode while the mode handles a call. After an interrupt at the wrong moment, torch pushes the mode back only
    when the traceback is freed. The mode then does nothing, and this thread's next capture uses it.
    """
    modes = [_get_function_stack_at(i) for i in range(_len_torch_function_stack())]
    return next((mode for mode in modes if isinstance(mode, _FunctionMode)), None)


def _remove(mode: Any) -> None:
    """Removes a mode from this thread's stack, and keeps the modes above it."""
    if _here.above is None:
        place = _place(mode)
        if place is None:
            return
        _here.above = place, [_get_function_stack_at(i) for i in range(place + 1, _len_torch_function_stack())]
    place, above = _here.above  # kept until all modes are back, in case of an interrupt
    while _len_torch_function_stack() > place:
        _pop_torch_function_stack()
    for other in above:
        _push_on_torch_function_stack(other)
    _here.above = None


def _place(mode: Any) -> int | None:
    """Returns the index of a mode in this thread's stack, or None."""
    return next((i for i in range(_len_torch_function_stack()) if _get_function_stack_at(i) is mode), None)
