"""Where tensors come from that do not depend on the signal: another input, or Python and NumPy in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from convtap._errors import listed
from convtap._time.signal import argument_of

#: Functions with which values leave torch: what is made of them comes back as a tensor that nothing is known of.
LEAVES = {"numpy", "__array__", "tolist", "__dlpack__", "to_dlpack"}


class Origins:
    """Follows the inputs that are not the signal, and notices tensors that come from outside of torch.

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
        """Says which inputs a tensor depends on that does not depend on the signal; None if it depends on none."""
        signal = argument_of(signal) or "0"
        inputs = sorted(name for name in self._from.get(tensor, ()) if name != signal)
        if not inputs and (self.left or self.numbers):
            out = self.left or self.numbers[0]
            return f"values of the signal left torch by {out}, and its input may have been made of them"
        if not inputs:
            return None
        first = int(inputs[0]) if inputs[0].isdigit() else inputs[0]
        return (
            f"it does not depend on the signal {signal!r}, but on the input {listed(map(repr, inputs), 3)}: follow that "
            f"with timeline(model, example, signal={first!r}), and capture the layers of one input at a time"
        )

    def strangers(self, *given: Any) -> list[Tensor]:
        """Returns those tensors that no operation of the pass made and the model does not hold, if values left torch."""
        if self.left is None:
            return []
        return [tensor for value in given for tensor in _tensors(value) if tensor.dim() and tensor not in self._from]

    def read(self, what: str) -> None:
        """Notes that a value of the signal was read as a number."""
        if what not in self.numbers:
            self.numbers = (*self.numbers, what)


def _tensors(value: Any, depth: int = 8) -> Iterable[Tensor]:
    """Yields the tensors of nested lists, tuples and dicts, to a depth (a list may hold itself)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)) and depth:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one, depth - 1)
