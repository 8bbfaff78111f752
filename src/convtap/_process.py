"""The one owner of what is kept per thread or context: which blocks are open here, and torch's modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch._C import (
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

# Note: [Contexts]
# Assumption: hooks are on the model, so they fire in every thread and every asyncio task that runs it.
# Failure: two threads, or two tasks, that each capture one model would get each other's calls.
# Choice: a block puts its token into a context variable. A task inherits what was open when it was created; a new
#   thread starts with nothing open, and what runs there is named in the block's message instead of being recorded.


class Token:
    """Stands for one open block; holds nothing, so a context that outlives the block keeps nothing alive."""

    __slots__ = ("__weakref__", "is_open")

    def __init__(self) -> None:
        self.is_open = True


_open: ContextVar[tuple[Token, ...]] = ContextVar("convtap_open", default=())

#: Returns the tokens of the blocks that are open in this context, oldest first.
open_tokens = _open.get


def enter(token: Token) -> None:
    """Makes a block open in this context, and forgets those that were closed from another one."""
    _open.set((*(other for other in _open.get() if other.is_open), token))


def leave(token: Token) -> None:
    """Closes a block in this context, in whatever order blocks are left."""
    token.is_open = False
    _open.set(tuple(other for other in _open.get() if other is not token))


# Note: [One mode a thread]
# Assumption: a TorchFunctionMode sees every call of a torch function in the thread that pushed it, and a
#   TorchDispatchMode every operator, TorchScript's included.
# Failure: blocks may overlap without nesting, and modes may not: popping would take off another block's mode, or a
#   user's own.
# Choice: the first block of a thread pushes one mode and the last one takes it off, from wherever in the stack it is by
#   then. The mode hands each call to the blocks that are open in the current context.

#: Called as ``watcher(call, func, args, kwargs)``; runs ``call(*args, **kwargs)`` and returns what the caller gets.
Watcher: TypeAlias = "Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]"


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


class _Dispatcher:
    """Finds the watchers of the blocks that are open in the current context; remembers them while those stay the same."""

    def __init__(self, watchers: dict[Token, Watcher]) -> None:
        self._watchers = watchers
        self.tokens: tuple[Token, ...] | None = None
        self.watcher: Watcher = _pass_on

    def find(self) -> Watcher:
        self.tokens = open_tokens()
        self.watcher = _joined([self._watchers[token] for token in self.tokens if token in self._watchers])
        return self.watcher

    def forget(self) -> None:
        self.tokens = None


class _FunctionMode(TorchFunctionMode):
    def __init__(self, dispatcher: _Dispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.dispatcher
        watcher = found.watcher if found.tokens is open_tokens() else found.find()
        return watcher(func, func, args, kwargs or {})


class _DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, dispatcher: _Dispatcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dispatcher = dispatcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.dispatcher
        watcher = found.watcher if found.tokens is open_tokens() else found.find()
        return watcher(func, func, args, kwargs or {})


class Watch:
    """One kind of mode: pushed by a thread's first block and taken off by its last. See Note: [One mode a thread]."""

    def __init__(
        self,
        make: Callable[[_Dispatcher], Any],
        push: Callable[[Any], Any],
        pop: Callable[[], Any],
        depth: Callable[[], int],
    ) -> None:
        self._make, self._push, self._pop, self._depth = make, push, pop, depth
        self._watchers: dict[Token, Watcher] = {}
        self._blocks_of_thread: dict[int, int] = {}
        self._threads_of_block: dict[Token, int] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def begin(self, token: Token, watcher: Watcher) -> int:
        """Lets a block see the calls of this thread. Returns the thread, for ``end``."""
        thread = threading.get_ident()
        with self._lock:
            self._watchers[token] = watcher
            self._threads_of_block[token] = self._threads_of_block.get(token, 0) + 1
            self._blocks_of_thread[thread] = self._blocks_of_thread.get(thread, 0) + 1
        mode = getattr(self._here, "mode", None)
        if mode is None:
            mode = self._here.mode = self._make(_Dispatcher(self._watchers))
            self._push(mode)
        mode.dispatcher.forget()
        return thread

    def end(self, token: Token, thread: int) -> None:
        """Ends ``begin``. From another thread, the mode stays on its own, idle, until a block of that thread ends."""
        with self._lock:
            self._threads_of_block[token] -= 1
            if not self._threads_of_block[token]:
                del self._threads_of_block[token], self._watchers[token]
            self._blocks_of_thread[thread] -= 1
            last = not self._blocks_of_thread[thread]
            if last:
                del self._blocks_of_thread[thread]
        mode = getattr(self._here, "mode", None)
        if mode is None:
            return
        mode.dispatcher.forget()
        if last and thread == threading.get_ident():
            self._take_off(mode)
            self._here.mode = None

    def _take_off(self, mode: Any) -> None:
        """Removes a mode from this thread's stack, and leaves those that were pushed after it."""
        above = []
        while self._depth():
            top = self._pop()
            if top is mode:
                break
            above.append(top)
        for other in reversed(above):
            self._push(other)


#: Sees torch functions (``F.conv1d``) as they are called from Python.
functions = Watch(_FunctionMode, _push_on_torch_function_stack, _pop_torch_function_stack, _len_torch_function_stack)
#: Sees operators (``aten.convolution``) as they run, also those that TorchScript runs.
operators = Watch(_DispatchMode, _python_dispatch._push_mode, _python_dispatch._pop_mode, _len_torch_dispatch_stack)
