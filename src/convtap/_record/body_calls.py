"""Groups calls of a model's parts from outside into forward passes.

An example is ``for layer in model.layers: x = layer(x)``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from convtap._tensors.nested import walk_tensors
from convtap._torch.frame_marks import Marks
from convtap._torch.transforms import unwrapped

#: Finds the name of a module.
NameOf: TypeAlias = "Callable[[nn.Module], str | None]"

# Note: [Calls of parts]
# Assumption: if parts are called one after another, each once, they process one input. A second call of a part begins a new
#   input, unless its argument is the previous part's output.
# Failure: if another function is in between, ``x = relu(block(x))`` in a loop looks the same as a loop over inputs.
# Choice: the second call certainly begins a new input in three cases: its argument requires no gradient although the previous
#   output would, another function of the user makes the call, or the argument has another number of channels than the
#   previous output. Otherwise the pass is unclear, and ``samples`` rejects it.


class BodyPass:
    """A forward pass that consists of calls of parts.

    Attributes:
        number: the number of the pass.
        last: the part that was called last.
        output: returns the last part's output if it is known and alive, otherwise None.
        before: the previous pass, if it also consists of calls of parts.
    """

    def __init__(self, number: int, before: BodyPass | None = None) -> None:
        self.number = number
        self.before = before
        self.parts: set[int] = set()
        self.last: nn.Module | None = None
        self.output: Callable[[], Tensor | None] = _nothing


class BodyCalls:
    """Decides which calls of parts belong to the same pass.

    Attributes:
        marks: the passes of the frames that call parts.
    """

    def __init__(self, unclear: dict[int, tuple[str, int]], name_of: NameOf) -> None:
        self.marks = Marks()
        self._unclear = unclear
        self._name_of = name_of
        self._outputs: dict[int, tuple[int, ...]] = {}
        #: For each pass, the previous part and the shape of the pass's input.
        self._waiting: dict[int, tuple[int, tuple[int, ...]]] = {}

    def enter(
        self, now: BodyPass | None, begin: Callable[[], int], part: nn.Module, tensor: Tensor | None, caller: Any
    ) -> BodyPass:
        """Returns the pass of a call of a part: the current pass or a new one."""
        before = now
        if now is None or not self._goes_on(now, part, tensor):
            now = BodyPass(begin(), before)
            if before is not None:
                before.before = None
            if before is not None and tensor is not None and self._may_go_on(before, tensor, caller):
                self._doubt(now, part, before)
                self._waiting[now.number] = (id(before.last), tuple(tensor.shape))
                self._decide(id(before.last))
        elif (
            now.before is not None
            and id(part) not in now.before.parts
            and (tensor is None or tensor is not now.output())
        ):
            self._doubt(now, part, now.before)  # it may be the part that the previous pass lacks
        if caller is not None:
            self.marks.set(caller, now.number)
        now.parts.add(id(part))
        now.last, now.output = part, _nothing
        return now

    def left(self, now: BodyPass, part: nn.Module, output: Any) -> None:
        """Notes the output of a part."""
        if isinstance(output, Tensor):
            now.output = weakref.ref(output)
            self._outputs[id(part)] = tuple(output.shape)
            self._decide(id(part))

    def _doubt(self, now: BodyPass, part: nn.Module, before: BodyPass) -> None:
        why = f"{self._name_of(part)!r} was called by itself, so its call may belong to either of two inputs"
        self._unclear[now.number] = (why, before.number)

    def _goes_on(self, now: BodyPass, part: nn.Module, tensor: Tensor | None) -> bool:
        if id(part) not in now.parts:
            return True
        output = now.output()
        return output is not None and tensor is not None and (tensor is output or tensor._base is output)

    def _may_go_on(self, before: BodyPass, tensor: Tensor, caller: FrameType | None) -> bool:
        """Returns whether a second call of a part may belong to the same input."""
        if before.last is None or (caller is not None and self.marks.of(caller) is None):
            return False
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in before.last.parameters())
        return not learns or (tensor.requires_grad and not tensor.is_leaf)

    def _decide(self, part: int) -> None:
        """Resolves unclear passes when the shape of the previous part's output is known."""
        output = self._outputs.get(part)
        if output is None:
            return
        for number, (before, shape) in list(self._waiting.items()):
            if before == part:
                del self._waiting[number]
                if len(shape) != len(output) or shape[1:2] != output[1:2]:
                    self._unclear.pop(number, None)


def _nothing() -> None:
    return None


def first_tensor(inputs: Any) -> Tensor | None:
    """Returns the first input tensor with a batch axis and another axis.

    Without such a tensor, it returns the first one with any axis, or None.
    """
    tensors = [tensor for _, tensor in walk_tensors(inputs) if tensor.dim()]
    return next((tensor for tensor in tensors if unwrapped(tensor).dim() > 1), tensors[0] if tensors else None)
