"""Which parameter a tensor is, or is a view of: how a convolution without a module gets its name."""

from __future__ import annotations

import bisect

from torch import Tensor

from convtap._memory import data_address, tensor_bytes
from convtap._tree import ModuleTree


class Owners:
    """The parameters and buffers of a model, by identity and by the memory that each of them takes.

    They are collected anew for each forward pass: ``functional_call``, ``load_state_dict(assign=True)`` and a new
    Parameter replace them, and ``.to()`` moves them.
    """

    def __init__(self, tree: ModuleTree) -> None:
        self._tree = tree
        self._collected_for: int | None = None
        self._names: dict[int, tuple[Tensor, str]] = {}
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, str]] = []

    def find(self, weight: Tensor, forward: int = 0) -> str | None:
        """Returns the name that ``ModuleTree.parameters`` gives the owner of a weight, or None if it is nobody's."""
        if self._collected_for != forward:
            self._collect()
            self._collected_for = forward
        found = self._names.get(id(weight))
        if found is not None and found[0] is weight:
            return found[1]
        address = data_address(weight)
        position = bisect.bisect_right(self._starts, address) - 1 if address else -1
        if position < 0:
            return None
        _, end, name = self._ranges[position]
        return name if address < end else None

    def _collect(self) -> None:
        self._names = {}
        ranges: dict[int, tuple[int, int, str]] = {}
        for name, tensor in reversed(list(self._tree.parameters())):  # so that a shared one has its first name
            self._names[id(tensor)] = (tensor, name)
            address = data_address(tensor)
            if address:
                ranges[address] = (address, address + tensor_bytes(tensor), name)
        self._ranges = sorted(ranges.values())
        self._starts = [start for start, _, _ in self._ranges]
