"""The one owner of what is kept per thread or context: which blocks are open here, and torch's modes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch import Tensor
from torch._C import (
    _get_dispatch_stack_at,
    _get_function_stack_at,
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


#: Functions, and identities of arguments, that a watcher is to see. What has neither passes it by.
Concerns: TypeAlias = "tuple[Container[Any], Container[int]]"

SEQUENCES = (list, tuple)  # of tensors, perhaps
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)  # there a tuple is a place
_NOTHING_PASSES: tuple[None, Container[Any], Container[int]] = (None, (), ())


class _Dispatcher:
    """Finds the watchers of the blocks that are open in the current context; remembers them while those stay the same.

    Attributes:
        tokens: the blocks for which the rest was found.
        watcher: what is to see a call.
        passing: the blocks, and the functions and identities without which a call needs to be seen by nobody.
    """

    def __init__(self, watchers: dict[Token, tuple[Watcher, Concerns | None]]) -> None:
        self.watchers = watchers
        self.tokens: tuple[Token, ...] | None = None
        self.watcher: Watcher = _pass_on
        self.passing: tuple[tuple[Token, ...] | None, Container[Any], Container[int]] = _NOTHING_PASSES

    def find(self) -> Watcher:
        tokens = open_tokens()
        found = [self.watchers[token] for token in tokens if token in self.watchers]
        concerns = found[0][1] if len(found) == 1 else None
        self.watcher = _joined([watcher for watcher, _ in found])
        self.passing = _NOTHING_PASSES if concerns is None else (tokens, *concerns)
        self.tokens = tokens
        return self.watcher

    def forget(self) -> None:
        self.tokens = None
        self.passing = _NOTHING_PASSES


class _FunctionMode(TorchFunctionMode):
    def __init__(self, dispatcher: _Dispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.dispatcher
        # This runs once a torch call, so it must be next to nothing for the calls that concern nobody.
        tokens, functions, identities = found.passing
        if tokens is open_tokens():
            if func in functions:
                return found.watcher(func, func, args, kwargs or {})
            for arg in (*args, *kwargs.values()) if kwargs else args:
                if id(arg) in identities or (arg.__class__ in SEQUENCES and func not in _INDEXING):
                    break
            else:
                arg = None  # torch.jit.trace names what it traces after the variables that hold tensors
                return func(*args, **kwargs) if kwargs else func(*args)
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
        at: Callable[[int], Any],
    ) -> None:
        self._make, self._push, self._pop, self._depth, self._at = make, push, pop, depth, at
        self._watchers: dict[Token, tuple[Watcher, Concerns | None]] = {}
        self._blocks_of_thread: dict[int, set[Token]] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def begin(self, token: Token, watcher: Watcher, concerns: Concerns | None = None) -> int:
        """Lets a block see the calls of this thread, or those that concern it. Returns the thread, for ``end``."""
        thread = threading.get_ident()
        with self._lock:
            self._watchers[token] = watcher, concerns
            self._blocks_of_thread.setdefault(thread, set()).add(token)
        mode = getattr(self._here, "mode", None)
        if mode is None:
            mode = self._here.mode = self._stray() or self._make(_Dispatcher(self._watchers))
            if self._place(mode) is None:
                self._push(mode)
        mode.dispatcher.forget()
        return thread

    def end(self, token: Token, thread: int) -> None:
        """Ends what ``begin`` began in a thread; again does nothing. See Note: [Interrupts]

        From another thread, the mode stays on its own, idle, until a block of that thread ends.
        """
        with self._lock:
            blocks = self._blocks_of_thread.get(thread, set())
            blocks.discard(token)
            if not blocks:
                self._blocks_of_thread.pop(thread, None)
            if not any(token in others for others in self._blocks_of_thread.values()):
                self._watchers.pop(token, None)
        mode = getattr(self._here, "mode", None)
        if mode is None:
            return
        mode.dispatcher.forget()
        if not blocks and thread == threading.get_ident():
            self._take_off(mode)
            self._here.mode = None

    def _place(self, mode: Any) -> int | None:
        """Where in this thread's stack a mode is."""
        for i in range(self._depth()):
            if self._at(i) is mode:
                return i
        return None

    def _stray(self) -> Any:
        """A mode of ours that an interrupt brought back.

        While torch hands a call to a mode, the mode is off the stack; an interrupt at the wrong moment makes torch put it
        back only when the traceback is freed. There it does nothing, and this thread's next block takes it over.
        """
        for i in range(self._depth()):
            mode = self._at(i)
            if getattr(getattr(mode, "dispatcher", None), "watchers", None) is self._watchers:
                return mode
        return None

    def _take_off(self, mode: Any) -> None:
        """Removes a mode from this thread's stack, and leaves those that were pushed after it."""
        here = self._here
        if getattr(here, "above", None) is None:
            place = self._place(mode)
            if place is None:
                return
            here.above = place, [self._at(i) for i in range(place + 1, self._depth())]
        place, above = here.above  # kept until all are back, for an interrupt here
        while self._depth() > place:
            self._pop()
        for other in above:
            self._push(other)
        here.above = None


#: Sees torch functions (``F.conv1d``) as they are called from Python.
functions = Watch(
    _FunctionMode,
    _push_on_torch_function_stack,
    _pop_torch_function_stack,
    _len_torch_function_stack,
    _get_function_stack_at,
)
#: Sees operators (``aten.convolution``) as they run, also those that TorchScript runs.
operators = Watch(
    _DispatchMode,
    _python_dispatch._push_mode,
    _python_dispatch._pop_mode,
    _len_torch_dispatch_stack,
    _get_dispatch_stack_at,
)
