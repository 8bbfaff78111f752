"""Finds the parameter behind a weight, to name a convolution without a module."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from convtap._select.module_tree import ModuleTree, parameter_name, tensors_of
from convtap._tensors.memory import data_address, tensor_bytes

# Note: [Whose weight it is]
# Assumption: a module's parameter stays the same object, and has its own memory.
# Failure: parameters are replaced (``functional_call``, ``load_state_dict(assign=True)``, FSDP during a forward) or moved
#   (``.to()``, ``.data =``). Other tensors may get the freed memory within the same pass.
# Choice: a tensor is first looked up by identity, then by address, if the owner has that address at this moment. Then it is
#   looked up in the modules that are being called. The whole table is rebuilt at most once per pass.


class Owners:
    """The parameters and buffers of a model, by identity and by memory."""

    def __init__(self, tree: ModuleTree, likely: Mapping[str, nn.Module]) -> None:
        self._tree = tree
        self._likely = likely  # looked up first
        self._collected_for: int | None = None
        self._names: dict[int, tuple[Tensor, str]] = {}
        self._starts: list[int] = []
        self._ranges: list[tuple[int, str, nn.Module, str]] = []

    def find(
        self, weight: Any, forward: Callable[[], int] = int, around: Callable[[], Iterable[nn.Module]] = tuple
    ) -> str | None:
        """Returns the name of a weight's owner, as in ``ModuleTree.parameters``, or None.

        Args:
            weight: the tensor.
            forward: returns the number of the current pass.
            around: returns the modules that are being called, innermost first.
        """
        if not isinstance(weight, Tensor):
            return None
        if not self._names:
            self._collect(self._likely)
        name = self._find_by_identity(weight) or self._find_by_address(weight) or self._find_near(weight, around())
        if name is None and self._collected_for != (number := forward()):
            self._collected_for = number
            self._collect(self._tree.names)
            name = self._find_by_identity(weight) or self._find_by_address(weight)
        return name

    def _find_by_identity(self, weight: Tensor) -> str | None:
        found = self._names.get(id(weight))
        return found[1] if found is not None and found[0] is weight else None

    def _find_near(self, weight: Tensor, modules: Iterable[nn.Module]) -> str | None:
        """Searches the current parameters of the modules around a call and their children."""
        for module in modules:
            for part in (module, *module._modules.values()):
                name = None if part is None else self._tree.name_of(part)
                if part is None or name is None:
                    continue
                for key, tensor in tensors_of(part):
                    if tensor is weight:
                        self._names[id(weight)] = (weight, parameter_name(name, key))
                        return parameter_name(name, key)
        return None

    def _find_by_address(self, weight: Tensor) -> str | None:
        address = data_address(weight)
        position = bisect.bisect_right(self._starts, address) - 1 if address else -1
        if position < 0:
            return None
        _, name, module, key = self._ranges[position]
        owner = next((tensor for other, tensor in tensors_of(module) if other == key), None)
        start = 0 if owner is None else data_address(owner)  # the current address, which may differ from the table
        return name if owner is not None and start and start <= address < start + tensor_bytes(owner) else None

    def _collect(self, modules: Mapping[str, nn.Module]) -> None:
        self._names = {}
        ranges: dict[int, tuple[int, str, nn.Module, str]] = {}
        for module_name, module in reversed(list(modules.items())):  # a shared parameter gets its first name
            for key, tensor in tensors_of(module):
                name = parameter_name(module_name, key)
                self._names[id(tensor)] = (tensor, name)
                address = data_address(tensor)
                if address:
                    ranges[address] = (address, name, module, key)
        self._ranges = sorted(ranges.values(), key=lambda entry: entry[0])
        self._starts = [entry[0] for entry in self._ranges]
