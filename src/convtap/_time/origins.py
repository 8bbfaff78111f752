"""Tracks tensors that come from other inputs, or from outside of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._errors import listed
from convtap._time.signal import argument_of

#: Functions through which values leave torch. Tensors that are made from such values have an unknown origin.
LEAVES = {"numpy", "__array__", "tolist", "__dlpack__", "to_dlpack"}


class Origins:
    """Tracks the inputs other than the signal, and tensors from outside of torch.

    Attributes:
        left: the first operation through which values of the signal left torch, such as ``"numpy in 'mel'"``, or None.
        numbers: the operations that read a value of the signal as a Python number.
    """

    def __init__(self, modules: Iterable[nn.Module], inputs: Mapping[str, Tensor]) -> None:
        self.left: str | None = None
        self.numbers: tuple[str, ...] = ()
        self._from: Any = WeakTensorKeyDictionary()
        nothing: frozenset[str] = frozenset()
        for module in modules:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in (*own, *(one for value in list(vars(module).values()) for one in _tensors(value, 2))):
                self._from[tensor] = nothing
        for path, tensor in inputs.items():
            self._from[tensor] = frozenset([argument_of(path) or "0"])

    def note(self, out: Any, *given: Any) -> None:
        """Notes the results of an operation."""
        found: frozenset[str] = frozenset()
        for value in given:
            for tensor in _tensors(value):
                found |= self._from.get(tensor, frozenset())
        for tensor in _tensors(out):
            self._from[tensor] = found | self._from.get(tensor, frozenset())

    def instead_of(self, signal: str, tensor: Tensor) -> str | None:
        """Describes what a tensor depends on instead of the signal, or returns None."""
        signal = argument_of(signal) or "0"
        inputs = sorted(name for name in self._from.get(tensor, ()) if name != signal)
        if not inputs and (self.left or self.numbers):
            out = self.left or self.numbers[0]
            return f"values of the signal left torch in {out}, and its input may have been computed from them"
        if not inputs:
            return None
        first = int(inputs[0]) if inputs[0].isdigit() else inputs[0]
        return (
            f"it does not depend on the signal {signal!r}, but on the input {listed(map(repr, inputs), 3)}. Follow that "
            f"input with timeline(model, example, signal={first!r}), and capture the layers of one input at a time"
        )

    def strangers(self, *given: Any) -> list[Tensor]:
        """Returns the tensors of unknown origin, if values of the signal have left torch.

        The model does not hold such a tensor, and no operation of the pass made it.
        """
        if self.left is None:
            return []
        return [tensor for value in given for tensor in _tensors(value) if tensor.dim() and tensor not in self._from]

    def read(self, what: str) -> None:
        """Notes that a value of the signal was read as a number."""
        if what not in self.numbers:
            self.numbers = (*self.numbers, what)


def _tensors(value: Any, depth: int = 8) -> Iterable[Tensor]:
    """Yields the tensors of nested lists, tuples and dicts, down to a depth.

    The depth is limited because a list may hold itself.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)) and depth:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one, depth - 1)
