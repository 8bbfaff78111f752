"""Numbers the forward passes of a block: one for each outermost call of the model, or of a part of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from torch import nn

from convtap._structure import walk_tensors
from convtap._torch.call_stack import is_method_of, module_calls, outermost_call
from convtap._torch.hooks import Hooks
from convtap._torch.modes import Token, open_tokens
from convtap._torch.transforms import unwrapped
from convtap._tree import is_keras

# Hooks on these, even ones that do nothing, switch their fast path off, and padded positions then come out different.
FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


_BODY = object()


class _Here(threading.local):
    """The pass that this thread is in: its number while a marked call runs (else -1), and how many of those do.

    ``outside`` is the unmarked part of the model that ran last, and ``outside_number`` its pass.
    """

    depth = 0
    number = -1
    visit: int | None = None
    outside: object = None
    outside_number = -1


class Companion(Protocol):
    """Works in one thread only, and goes along to another one for a pass that runs there (``asyncio.to_thread``)."""

    def visit(self) -> int:
        """Begins to work in this thread too."""

    def leave(self, visit: int) -> None:
        """Ends what ``visit`` began."""


class Passes:
    """Which forward pass is running, and what batch it was given.

    The root is marked by a pair of hooks. A part of the model that is called directly (``model.encoder(x)``) is found
    on the stack when a layer first runs in it, and is marked from then on, so that its next call is a new pass.

    Attributes:
        companion: what goes along to another thread in which a pass runs.
        here: the pass that this thread is in.
        inputs: by pass, the shape of its first input tensor with a batch axis, or None where there is none.
    """

    def __init__(self, model: nn.Module, token: Token) -> None:
        self.inputs: dict[int, tuple[int, ...] | None] = {}
        self._model = model
        self._token = token
        self._numbers = itertools.count()
        self.here = _Here()
        self._hooks = Hooks()
        self._members: set[int] | None = None
        self._home = threading.get_ident()
        self.companion: Companion | None = None
        self._marked: set[int] = set()

    @property
    def number(self) -> int:
        """The number of the marked pass that runs in this thread, or -1."""
        return self.here.number

    def open(self) -> None:
        """Marks where the root begins (a Keras model is marked by its own tap)."""
        if not is_keras(type(self._model)):
            self._mark_begin(self._model)

    def open_end(self) -> None:
        """Marks where the root ends: after all taps are open, so that what the root itself returns is in its pass."""
        if not is_keras(type(self._model)):
            self._mark_end(self._model)

    @contextmanager
    def inside(self, args: Any, kwargs: Any) -> Iterator[None]:
        """Marks a call of the root that no hook sees."""
        here = self.here
        if self._token not in open_tokens():
            yield
            return
        before = here.depth, here.number
        if not here.depth:
            here.number = self._begin(args, kwargs)
        here.depth += 1
        try:
            yield
        finally:
            here.depth, here.number = before

    def close(self) -> None:
        """Takes every mark off."""
        self._hooks.remove()

    def in_forward(self) -> bool:
        """Whether this thread is inside a call of the model, or of a part of it that has no mark yet."""
        return self.here.depth > 0 or outermost_call(self._member_ids()) is not None

    def in_method(self) -> bool:
        """Whether this thread is in a method of the model, called or not: ``model.encode(x)``."""
        return self.in_forward() or is_method_of(self._member_ids())

    def current(self) -> int:
        """Returns the number of the pass that this thread is in."""
        number = self.here.number
        return number if number >= 0 else self._outside()

    def _member_ids(self) -> set[int]:
        if self._members is None:
            self._members = {id(module) for module in self._model.modules()}
        return self._members

    def _mark_begin(self, module: nn.Module) -> None:
        if not isinstance(module, FAST_PATHS):
            self._marked.add(id(module))
            # first, because a part that is marked late has the hook already that emits its input
            self._hooks.before(module, self._entered, first=True)

    def _mark_end(self, module: nn.Module) -> None:
        if not isinstance(module, FAST_PATHS):
            self._hooks.after(module, self._left, always=True)

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._token not in open_tokens():
            return
        here = self.here
        if here.depth and self._is_nested():
            here.depth += 1
            return
        if here.depth == 0 and self.companion is not None and threading.get_ident() != self._home:
            here.visit = self.companion.visit()
        if module is not self._model and self._is_within(module):
            here.depth, here.number = 1, self._outside()
            return
        here.depth = 1
        here.outside = None
        here.number = self._begin(args, kwargs)

    def _is_within(self, module: nn.Module) -> bool:
        """Whether a part is called by another part that was called before it had a mark."""
        found = outermost_call(self._member_ids())
        return found is not None and found[0] is not module

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        here = self.here
        if here.depth and self._token in open_tokens():
            here.depth -= 1
            if not here.depth:
                here.number = -1
                if here.visit is not None and self.companion is not None:
                    visit, here.visit = here.visit, None
                    self.companion.leave(visit)

    def _is_nested(self) -> bool:
        """Whether a marked call other than this one is on the stack (one that was interrupted never said it ended)."""
        marked = sum(1 for module, _ in module_calls() if id(module) in self._marked)
        return marked > 1

    def _begin(self, args: Any, kwargs: Any) -> int:
        number = next(self._numbers)
        self.inputs[number] = _input_shape((args, kwargs))
        return number

    def _outside(self) -> int:
        """The pass of a layer that runs while no marked call does."""
        here = self.here
        found: tuple[nn.Module, FrameType] | None = outermost_call(self._member_ids())
        caller: object = _BODY if found is None else found[0]
        if here.outside is not caller:
            values = found[1].f_locals if found else {}
            here.outside_number = self._begin(values.get("args", ()), values.get("kwargs", {}))
            here.outside = caller
            if found and id(found[0]) not in self._marked:
                self._mark_begin(found[0])
                self._mark_end(found[0])
        return here.outside_number


def _input_shape(inputs: Any) -> tuple[int, ...] | None:
    """The shape of the first input tensor that has a batch axis and another (else of the first one)."""
    shapes = [tuple(unwrapped(tensor).shape) for _, tensor in walk_tensors(inputs) if tensor.dim()]
    return next((shape for shape in shapes if len(shape) > 1), shapes[0] if shapes else None)
