"""Tracks which captures are open in this thread, and holds the function mode of ``at="activation"`` and the fallback."""

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
# Assumption: the convolution key is per thread, and hooks are on the model, so they fire in every thread and task.
# Failure: two threads, or two tasks, that each capture one model would get each other's calls.
# Choice: a capture puts its token into a context variable. A task inherits what was open when it was created; a new
#   thread starts with nothing open, and what runs there is named in a message instead of being recorded.


#: Called as ``watcher(call, func, args, kwargs)``; runs ``call(*args, **kwargs)`` and returns what the caller gets.
Watcher: TypeAlias = "Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]"


class Tap(Protocol):
    """Sees the convolutions that run while its capture is open."""

    #: Whether compiled code ran meanwhile.
    compiled_code_ran: bool

    def before(self, transposed: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Says what a convolution is to be recorded as, or None if it is not this capture's."""

    def after(self, name: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records an output. Returns what the caller gets instead of it, or None."""

    def pause(self) -> None:
        """Leaves the model's weights alone until ``resume``: compiled code runs."""

    def resume(self) -> None:
        """Watches them again."""


class Token:
    """Stands for one open capture; holds nothing once it is closed, so a context that outlives it keeps nothing alive."""

    __slots__ = ("__weakref__", "is_open", "tap", "watcher")

    def __init__(self) -> None:
        self.is_open = True
        self.tap: Tap | None = None
        self.watcher: Watcher | None = None


_open: ContextVar[tuple[Token, ...]] = ContextVar("convtap_open", default=())

#: Returns the tokens of the captures that are open in this context, oldest first.
open_tokens = _open.get


def enter(token: Token) -> None:
    """Makes a capture open in this context, and forgets those that were closed from another one."""
    _open.set((*(other for other in _open.get() if other.is_open), token))


def leave(token: Token) -> None:
    """Closes a capture in this context, in whatever order captures are left."""
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
    """Runs one convolution for the captures that are open, the newest nearest to it; returns what the caller gets.

    Args:
        call: what runs it.
        tokens: the captures.
        transposed: which argument says that it is transposed, if one does.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    if _len_torch_function_stack():  # TorchScript runs an operator under a user's mode
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
            except BaseException as error:  # of one capture: the others are to have the output all the same
                failed = failed or error
    if failed is not None:
        raise failed
    return output


#: Runs convtap's own torch calls where no function mode sees them.
outside_function_modes = torch._C.DisableTorchFunction
#: How many function modes are on in this thread.
has_function_modes = _len_torch_function_stack
#: How many dispatch modes are on in this thread.
has_dispatch_modes = torch._C._len_torch_dispatch_stack


#: The graph that ``torch.jit.trace`` is making in this thread, or None.
tracing_state = torch._C._get_tracing_state
#: The number of the backward pass that runs in this thread, or -1. A forward pass that runs in one is activation
#: checkpointing's recomputation of an earlier one.
backward_task = torch._C._current_graph_task_id


@contextmanager
def outside_modes() -> Iterator[None]:
    """Runs convtap's own torch calls on plain tensors: they are not the model's, so no mode or tracer sees them."""
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
# Failure: captures may overlap without nesting, and modes may not: popping would take off another capture's mode, or a
#   user's own.
# Choice: the first capture of a thread that needs the mode pushes it and the last one takes it off, from wherever in
#   the stack it is by then. The mode hands each call to the captures that are open in the current context.


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watchers = [token.watcher for token in open_tokens() if token.watcher is not None]
        return _pass_on(watchers, func, func, args, kwargs or {})


def _pass_on(watchers: list[Watcher], call: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a call for several watchers: the newest one's is nearest to it."""
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
    """Lets a capture's watcher see the torch calls of this thread, whose captures are ``tokens``."""
    tokens.add(token)
    if _here.mode is None:
        _here.mode = _stray() or _FunctionMode()
        if _place(_here.mode) is None:
            _push_on_torch_function_stack(_here.mode)


def end(token: Token, tokens: set[Token]) -> None:
    """Ends what ``begin`` began in a thread; again does nothing. See Note: [Interrupts]

    From another thread, the mode stays on its own, idle, until a capture of that thread ends.
    """
    tokens.discard(token)
    if _here.mode is not None and tokens is _here.tokens and not tokens:
        _remove(_here.mode)
        _here.mode = None


def _stray() -> _FunctionMode | None:
    """A mode of ours that an interrupt brought back.

    While torch hands a call to a mode, the mode is off the stack; an interrupt at the wrong moment makes torch put it
    back only when the traceback is freed. There it does nothing, and this thread's next capture takes it over.
    """
    modes = [_get_function_stack_at(i) for i in range(_len_torch_function_stack())]
    return next((mode for mode in modes if isinstance(mode, _FunctionMode)), None)


def _remove(mode: Any) -> None:
    """Removes a mode from this thread's stack, and leaves those that were pushed after it."""
    if _here.above is None:
        place = _place(mode)
        if place is None:
            return
        _here.above = place, [_get_function_stack_at(i) for i in range(place + 1, _len_torch_function_stack())]
    place, above = _here.above  # kept until all are back, for an interrupt here
    while _len_torch_function_stack() > place:
        _pop_torch_function_stack()
    for other in above:
        _push_on_torch_function_stack(other)
    _here.above = None


def _place(mode: Any) -> int | None:
    """Where in this thread's stack a mode is."""
    return next((i for i in range(_len_torch_function_stack()) if _get_function_stack_at(i) is mode), None)
