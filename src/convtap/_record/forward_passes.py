"""Numbers the forward passes of a capture."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from torch import nn

from convtap._record.body_calls import BodyCalls, BodyPass, NameOf, first_tensor
from convtap._select.module_tree import is_keras
from convtap._torch import call_shim
from convtap._torch.call_stack import (
    CALL,
    Calls,
    Members,
    arguments_of,
    is_plain_call,
    own_methods,
    pass_by_in_dynamo,
    skip_in_dynamo,
)
from convtap._torch.convolution_key import is_inherited
from convtap._torch.frame_marks import Marks
from convtap._torch.frame_search import FrameSearch
from convtap._torch.hooks import Hooks
from convtap._torch.modes import Token, open_tokens, outside_function_modes
from convtap._torch.transforms import unwrapped

#: Names a place in the capture's thread with another context: a coroutine, or ``contextvars.Context().run``.
TASK = "another task of this thread"


class _Here(threading.local):
    """The pass of this thread."""

    depth = 0  # 1 while a marked call runs
    number = -1  # the pass of the marked call
    body: BodyPass | None = None  # the latest pass of parts that were called outside of any method
    entered: object = None  # used by hooks in place of shims


class _Method:
    """A running method of the model."""

    __slots__ = ("name", "number", "owns", "roots")

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = -1  # the pass of the layers that it calls directly
        self.owns = False
        self.roots: list[int] = []  # the passes of its calls of the whole model


class Companion(Protocol):
    """A tap of one thread that visits another one for a pass (``asyncio.to_thread``)."""

    def here(self) -> Any:
        """Returns this thread's state for the other methods."""

    def visit(self, here: Any) -> None:
        """Begins to work in this thread as well."""

    def leave(self, here: Any) -> None:
        """Ends a visit, if there was one, and ends the pass."""


class Passes:
    """The forward passes of a capture, and the batch of each.

    A call of the root is a pass, which a shim marks. A call of a method, of the root or of a part, is also a pass. It is found
    on the stack when a layer first runs in it. If a method calls the root once and also calls layers, both are one pass. See
    Note: [Calls of parts] for parts that are called directly.

    Attributes:
        calls: the modules that are being called.
        companion: a tap that visits another thread when a pass runs there, or None.
        elsewhere: the threads in which the root ran outside of this capture.
        here: the pass of this thread.
        noted: is called for each pass that is kept, with its first input tensor or None.
        inputs: for each pass, the shape of its first input tensor with a batch axis, or None.
        every: only the passes 0, n, 2n, … are kept.
        unclear: for each unclear pass, the reason, and the pass that its rows may belong to.
    """

    def __init__(
        self, model: nn.Module, token: Token, name_of: NameOf, *, every: int = 1, uses_shim: bool = True
    ) -> None:
        self.every = every
        self.inputs: dict[int, tuple[int, ...] | None] = {}
        self.elsewhere: list[str] = []
        self._model = model
        self._token = token
        self._numbers = itertools.count()
        self._latest = 0
        self.here = _Here()
        self._known: Members | None = None
        self.unclear: dict[int, tuple[str, int]] = {}
        self._marks = Marks()
        self._methods = FrameSearch(own_methods(model))
        self.calls = Calls(model)
        self._body = BodyCalls(self.unclear, name_of)
        self._home = threading.get_ident()
        self.companion: Companion | None = None
        self.noted: Callable[[Any], object] = id
        self._marked: list[nn.Module] = []
        self._hooks = None if uses_shim else Hooks()

    def open(self) -> None:
        """Marks the root. The tap of a Keras model marks it instead."""
        if not is_keras(type(self._model)):
            self._mark(self._model)

    def close(self) -> None:
        """Removes all marks."""
        call_shim.leave(self._marked, self.heard)
        self._marked.clear()
        self.here.body = None
        self._marks.clear()
        self._body.marks.clear()
        for search in (self._methods, self.calls, self._known or self.calls):
            search.forget()
        if self._hooks is not None:
            self._hooks.remove()

    def _mark(self, module: nn.Module) -> None:
        self._marked.append(module)  # first: see Note: [Interrupts]
        if self._hooks is None:
            call_shim.listen(module, self.heard)
        else:  # see Note: [Private parts of torch]
            self._hooks.before(module, self._entered)
            self._hooks.after(module, self._left, always=True)

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        here = self.here
        if not here.depth and self._token in open_tokens():
            here.depth, here.entered, here.number = 1, module, self._begin((args, kwargs))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        here = self.here
        if here.depth and here.entered is module:
            here.depth, here.entered, here.number = 0, None, -1

    @pass_by_in_dynamo
    def heard(self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a marked call in its own pass, or in the pass around it."""
        tokens, here = open_tokens(), self.here
        if self._token not in tokens:
            if not tokens and threading.get_ident() != self._home:
                self.elsewhere.append(self.where())
            return call(*args, **kwargs)
        if here.depth:
            return call(*args, **kwargs)
        before, visit, part = here.number, None, None
        try:
            if self.companion is not None and threading.get_ident() != self._home:
                visit = self.companion.here()
                self.companion.visit(visit)
            if module is self._model:
                here.number = self._of_root(args, kwargs)
            else:
                here.number, part = self._of_part(module, args, kwargs)
            here.depth = 1
            output = call(*args, **kwargs)
            if part is not None:
                self._body.left(part, module, output)
            return output
        finally:
            here.depth, here.number = 0, before
            if self.companion is not None:
                self.companion.leave(visit)

    def where(self) -> str:
        """Returns the name of this thread, or ``TASK`` in the capture's own thread."""
        if threading.get_ident() != self._home:
            return threading.current_thread().name
        return TASK

    def in_forward(self) -> bool:
        """Returns whether this thread is inside a call of the model or of any part."""
        if self.here.depth > 0 or is_inherited():
            return True
        members = self._members().ids
        return any(id(module) in members for module in self.calls.modules())

    def in_method(self) -> bool:
        """Returns whether this thread is in a method of the model: ``model.encode(x)``."""
        return self.here.depth > 0 or is_inherited() or self._members().entry(sys._getframe(1)) is not None

    def current(self) -> int:
        """Returns the number of this thread's pass."""
        number = self.here.number
        return number if number >= 0 else self._latest if is_inherited() else self._outside()

    def current_of_model(self) -> int:
        """Returns the number of the pass, or -1 in code outside of the model."""
        number = self.here.number
        return number if number >= 0 else self._latest if is_inherited() else self._outside(code=False)

    def skips(self) -> bool:
        """Returns whether this thread is in a pass that is not kept."""
        number = self.here.number
        return self.every > 1 and (number if number >= 0 else max(self.current_of_model(), 0)) % self.every != 0

    def _members(self) -> Members:
        if self._known is None:
            self._known = Members(self._model)
        return self._known

    @skip_in_dynamo
    def _of_root(self, args: Any, kwargs: Any) -> int:
        """Returns the pass of a call of the whole model."""
        method = self._method_around() if self._methods.wanted else None
        if method is None:
            self.here.body = None
            return self._begin((args, kwargs))
        first = not method.roots
        number = method.number if first and method.number >= 0 else self._begin((args, kwargs))
        if first:
            method.number = number
        method.roots.append(number)
        self._check(method)
        return number

    def _method_around(self) -> _Method | None:
        """Returns the method of the model that makes the current call of it, or None."""
        start = sys._getframe(1)
        frame = next(self._methods.frames(start), None)
        found = None if frame is None else self._members().entry(start)
        return None if found is None else self._method(*found)

    @skip_in_dynamo
    def _of_part(self, part: nn.Module, args: Any, kwargs: Any) -> tuple[int, BodyPass | None]:
        """Returns a part's pass, and its ``BodyPass`` if outside code makes the call."""
        found = self._members().entry(sys._getframe(1))
        if found is None or found[0] is not part or found[1].f_code is not CALL:
            return self._of_entry(found), None
        body = self._enter(part, (args, kwargs), found[1])
        return body.number, body

    def _enter(self, part: nn.Module, inputs: Any, frame: FrameType) -> BodyPass:
        here = self.here
        with outside_function_modes():
            tensor, begin = first_tensor(inputs), functools.partial(self._begin, inputs)
            here.body = self._body.enter(here.body, begin, part, tensor, frame.f_back)
        return here.body

    @skip_in_dynamo
    def _outside(self, *, code: bool = True) -> int:
        """Returns the pass of a layer outside of a marked call, or -1 if not ``code``."""
        found = self._members().entry(sys._getframe(1))
        return -1 if found is None and not code else self._of_entry(found)

    def _of_entry(self, found: tuple[nn.Module, FrameType] | None) -> int:
        """Returns the pass of a call of a module or method, or of code outside (None)."""
        here = self.here
        if found is None:
            if here.body is None:
                here.body = BodyPass(self._begin(()))
            self.unclear.setdefault(here.body.number, ("", -1))
            return here.body.number
        module, frame = found
        known = self._marks.of(frame)
        if isinstance(known, int):
            return known
        if known is None and module is not self._model and is_plain_call(frame):
            inputs = (
                [frame.f_locals.get(key) for key in ("args", "kwargs")] if frame.f_code is CALL else arguments_of(frame)
            )
            body = self._enter(module, inputs, frame)
            self._marks.set(frame, body.number)
            if all(module is not other for other in self._marked):
                self._mark(module)
            return body.number
        method = self._method(module, frame)
        method.owns = True
        if method.number < 0:
            method.number = self._begin(arguments_of(frame))
        self._check(method)
        return method.number

    def _method(self, module: nn.Module, frame: FrameType) -> _Method:
        known = self._marks.of(frame)
        if isinstance(known, _Method):
            return known
        self.here.body = None
        method = _Method(frame.f_code.co_name)
        self._marks.set(frame, method)
        return method

    def _check(self, method: _Method) -> None:
        """Marks a method's passes as unclear if it mixes model calls and layer calls."""
        if method.owns and len(method.roots) > 1:
            why = f"{method.name!r} called the whole model several times and also called layers"
            self.unclear.update(dict.fromkeys(method.roots, (why, method.roots[0])))

    @skip_in_dynamo
    def _begin(self, inputs: Any) -> int:
        number = self._latest = next(self._numbers)
        with outside_function_modes():
            tensor = first_tensor(inputs)
            if number % self.every == 0:
                self.inputs[number] = None if tensor is None else tuple(unwrapped(tensor).shape)
                self.noted(tensor)
        return number
