"""Numbers the forward passes of a block: one for each outermost call of the model, or of a part of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from torch import nn

from convtap._structure import walk_tensors
from convtap._torch import call_shim
from convtap._torch.call_stack import is_method_of, outermost_call, pass_by_in_dynamo, skip_in_dynamo
from convtap._torch.convolution_key import is_inherited
from convtap._torch.hooks import Hooks
from convtap._torch.modes import Token, open_tokens, outside_function_modes
from convtap._torch.transforms import unwrapped
from convtap._tree import is_keras

_BODY = object()


class _Here(threading.local):
    """The pass that this thread is in: its number while a marked call runs (else -1), and whether (1) one does.

    ``outside`` is the unmarked part of the model that ran last, and ``outside_number`` its pass.
    """

    depth = 0
    number = -1
    outside: object = None
    outside_number = -1


class Companion(Protocol):
    """Works in one thread only, and goes along to another one for a pass that runs there (``asyncio.to_thread``)."""

    def here(self) -> Any:
        """Returns what there is of this thread, for the others."""

    def visit(self, here: Any) -> None:
        """Begins to work in this thread too."""

    def leave(self, here: Any) -> None:
        """Ends what ``visit`` began, and a pass in any case."""


class Passes:
    """Which forward pass is running, and what batch it was given.

    The calls of the root are marked by a shim. A part of the model that is called directly (``model.encoder(x)``) is
    found on the stack when a layer first runs in it, and is marked from then on, so that its next call is a new pass.

    Attributes:
        companion: what goes along to another thread in which a pass runs.
        elsewhere: threads in which the root ran without this capture.
        here: the pass that this thread is in.
        inputs: by pass, the shape of its first input tensor with a batch axis, or None where there is none.
    """

    def __init__(self, model: nn.Module, token: Token, *, uses_shim: bool = True) -> None:
        self.inputs: dict[int, tuple[int, ...] | None] = {}
        self.elsewhere: list[str] = []
        self._model = model
        self._token = token
        self._numbers = itertools.count()
        self._latest = 0
        self.here = _Here()
        self._members: set[int] | None = None
        self._home = threading.get_ident()
        self.companion: Companion | None = None
        self._marked: list[nn.Module] = []
        self._hooks = None if uses_shim else Hooks()

    @property
    def number(self) -> int:
        """The number of the marked pass that runs in this thread, or -1."""
        return self.here.number

    def open(self) -> None:
        """Marks the root (a Keras model is marked by its own tap)."""
        if not is_keras(type(self._model)):
            self._mark(self._model)

    def close(self) -> None:
        """Takes every mark off."""
        call_shim.leave(self._marked, self.heard)
        self._marked.clear()
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
            here.depth, here.outside, here.number = 1, module, self._begin(args, kwargs)

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        here = self.here
        if here.depth and here.outside is module:
            here.depth, here.outside, here.number = 0, None, -1

    @pass_by_in_dynamo
    def heard(self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a marked call."""
        tokens = open_tokens()
        if self._token not in tokens:
            if not tokens and threading.get_ident() != self._home:
                self.elsewhere.append(threading.current_thread().name)
            return call(*args, **kwargs)
        begins = not (module is not self._model and self._is_within(module))
        return self._inside(call, args, kwargs, begins=begins)

    @pass_by_in_dynamo
    def _inside(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, begins: bool = True
    ) -> Any:
        """Runs a marked call: a pass of its own if it is the outermost one (and ``begins`` one)."""
        here = self.here
        if here.depth:
            return call(*args, **kwargs)
        before, visit = here.number, None
        try:
            if self.companion is not None and threading.get_ident() != self._home:
                visit = self.companion.here()
                self.companion.visit(visit)
            here.number = self._begin(args, kwargs) if begins else self._outside()
            here.outside = None if begins else here.outside
            here.depth = 1
            return call(*args, **kwargs)
        finally:
            here.depth, here.number = 0, before
            if self.companion is not None:
                self.companion.leave(visit)

    def in_forward(self) -> bool:
        """Whether this thread is inside a call of the model, or of a part of it that has no mark yet."""
        return self.here.depth > 0 or outermost_call(self._member_ids()) is not None or is_inherited()

    def in_method(self) -> bool:
        """Whether this thread is in a method of the model, called or not: ``model.encode(x)``."""
        return self.in_forward() or is_method_of(self._member_ids())

    def current(self) -> int:
        """Returns the number of the pass that this thread is in."""
        number = self.here.number
        if number >= 0:
            return number
        return self._latest if is_inherited() else self._outside()

    def _member_ids(self) -> set[int]:
        if self._members is None:
            self._members = {id(module) for module in self._model.modules()}
        return self._members

    @skip_in_dynamo
    def _is_within(self, module: nn.Module) -> bool:
        """Whether a part is called by another part that was called before it had a mark."""
        found = outermost_call(self._member_ids())
        return found is not None and found[0] is not module

    @skip_in_dynamo
    def _begin(self, args: Any, kwargs: Any) -> int:
        number = self._latest = next(self._numbers)
        with outside_function_modes():
            self.inputs[number] = _input_shape((args, kwargs))
        return number

    @skip_in_dynamo
    def _outside(self) -> int:
        """The pass of a layer that runs while no marked call does."""
        here = self.here
        found: tuple[nn.Module, FrameType] | None = outermost_call(self._member_ids())
        caller: object = _BODY if found is None else found[0]
        if here.outside is not caller:
            values = found[1].f_locals if found else {}
            here.outside_number = self._begin(values.get("args", ()), values.get("kwargs", {}))
            here.outside = caller
            if found and all(found[0] is not module for module in self._marked):
                self._mark(found[0])
        return here.outside_number


def _input_shape(inputs: Any) -> tuple[int, ...] | None:
    """The shape of the first input tensor that has a batch axis and another (else of the first one)."""
    shapes = [tuple(unwrapped(tensor).shape) for _, tensor in walk_tensors(inputs) if tensor.dim()]
    return next((shape for shape in shapes if len(shape) > 1), shapes[0] if shapes else None)
