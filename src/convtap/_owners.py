"""Which parameter a tensor is, or is a view of: how a convolution without a module gets its name."""

from __future__ import annotations

from torch import Tensor

from convtap._memory import data_address
from convtap._tree import ModuleTree


class Owners:
    """The parameters and buffers of a model by identity and by address, collected when first asked for."""

    def __init__(self, tree: ModuleTree) -> None:
        self._tree = tree
        self._names: dict[int, str] | None = None
        self._addresses: dict[int, str] = {}

    def find(self, weight: Tensor) -> str | None:
        """Returns the name that ``ModuleTree.parameters`` gives the owner of a weight, or None if it is nobody's."""
        if self._names is None:
            self._collect()
        assert self._names is not None
        found = self._names.get(id(weight))
        if found is None:
            address = data_address(weight)
            found = self._addresses.get(address) if address else None
        return found

    def _collect(self) -> None:
        self._names = {}
        for name, tensor in reversed(list(self._tree.parameters())):  # so that a shared one has its first name
            self._names[id(tensor)] = name
            address = data_address(tensor)
            if address:
                self._addresses[address] = name
