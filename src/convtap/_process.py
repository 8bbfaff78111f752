"""The one owner of what is kept per process, thread or context: which blocks are open here, and torch's function mode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch._C import _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack
from torch.overrides import TorchFunctionMode

# Note: [Contexts]
# Assumption: hooks are on the model, so they fire in every thread and every asyncio task that runs it.
# Failure: two threads, or two tasks, that each capture one model would get each other's calls.
# Choice: a block puts its token into a context variable. A task inherits what was open when it was created; a new
#   thread starts with nothing open, and what runs there is named in the block's message instead of being recorded.


class Token:
    """Stands for one open block; holds nothing, so a context that outlives the block keeps nothing alive."""

    __slots__ = ("__weakref__",)


_open: ContextVar[tuple[Token, ...]] = ContextVar("convtap_open", default=())

#: Returns the tokens of the blocks that are open in this context, oldest first.
open_tokens = _open.get


def enter(token: Token) -> None:
    """Makes a block open in this context."""
    _open.set((*_open.get(), token))


def leave(token: Token) -> None:
    """Closes a block in this context, in whatever order blocks are left."""
    _open.set(tuple(other for other in _open.get() if other is not token))


# Note: [One function mode a thread]
# Assumption: a TorchFunctionMode sees every call of a torch function in the thread that pushed it.
# Failure: blocks may overlap without nesting, and modes may not: popping would take off another block's mode, or a
#   user's own.
# Choice: the first block of a thread pushes one mode and the last one takes it off, from wherever in the stack it is by
#   then. The mode hands each call to the blocks that are open in the current context.

#: Called as ``watcher(call, func, args, kwargs)``; runs ``call(*args, **kwargs)`` and returns what the caller gets.
Watcher: TypeAlias = "Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]"

_watchers: dict[Token, Watcher] = {}
_lock = threading.Lock()
_blocks_of_thread: dict[int, int] = {}
_mode_of_thread = threading.local()


class _Watch(TorchFunctionMode):
    """Hands every torch call to the watchers of the blocks that are open here."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: tuple[Token, ...] | None = None
        self._watcher: Watcher = _pass_on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tokens = open_tokens()
        if tokens is not self._tokens:
            self._watcher = _joined([_watchers[token] for token in tokens if token in _watchers])
            self._tokens = tokens
        return self._watcher(func, func, args, kwargs or {})

    def forget(self) -> None:
        """Looks the watchers up anew at the next call."""
        self._tokens = None


def _pass_on(call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs)


def _joined(watchers: list[Watcher]) -> Watcher:
    """Makes one watcher of several: the newest block's is nearest to the call."""
    if len(watchers) < 2:
        return watchers[0] if watchers else _pass_on
    outer, inner = watchers[-2:]

    def watcher(call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return outer(lambda *args, **kwargs: inner(call, func, args, kwargs), func, args, kwargs)

    return _joined([*watchers[:-2], watcher])


def watch(token: Token, watcher: Watcher) -> int:
    """Lets a block see the torch calls of this thread. Returns the thread, for ``unwatch``."""
    thread = threading.get_ident()
    with _lock:
        _watchers[token] = watcher
        _blocks_of_thread[thread] = _blocks_of_thread.get(thread, 0) + 1
    mode = getattr(_mode_of_thread, "mode", None)
    if mode is not None:
        mode.forget()
    else:
        _mode_of_thread.mode = _Watch()
        _push_on_torch_function_stack(_mode_of_thread.mode)
    return thread


def unwatch(token: Token, thread: int) -> None:
    """Ends ``watch``. Left from another thread, the mode stays on its own one, idle, until that thread's next block ends."""
    with _lock:
        _watchers.pop(token, None)
        _blocks_of_thread[thread] -= 1
        last = not _blocks_of_thread[thread]
        if last:
            del _blocks_of_thread[thread]
    mode = getattr(_mode_of_thread, "mode", None)
    if mode is not None:
        mode.forget()
    if last and mode is not None and thread == threading.get_ident():
        _take_off(mode)
        _mode_of_thread.mode = None


def _take_off(mode: TorchFunctionMode) -> None:
    """Removes a mode from this thread's stack, and leaves those that were pushed after it."""
    above = []
    while _len_torch_function_stack():
        top = _pop_torch_function_stack()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_on_torch_function_stack(other)
