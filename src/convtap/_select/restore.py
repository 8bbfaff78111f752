"""Restores the contents of containers, attributes and tensors if they differ."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from convtap._table import human_bytes
from convtap._torch.storage import storage_number


def is_of_the_model(key: Any) -> bool:
    """Returns whether an attribute belongs to the model.

    Torch or convtap may replace other attributes during a pass.
    """
    return not isinstance(key, str) or not key.startswith(("_compiled_call_impl", "_parameters", "_dynamo"))


class Memory:
    """A copy, or the sum, of the bytes of one storage."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.name = name
        self.is_parameter = False
        self._storage = storage
        self._size = storage.nbytes()
        self._copy: Tensor | None = None
        self._sum: Tensor | None = None

    def note(self, budgets: dict[bool, float]) -> None:
        """Copies the bytes if they fit into the budget, otherwise sums them."""
        if self._size <= budgets[self.is_parameter]:
            budgets[self.is_parameter] -= self._size
            self._copy = self._bytes().clone()
        else:
            self._sum = _sum(self._bytes())

    def restore(self) -> list[str]:
        """Restores the bytes if they differ. Returns the name if it has no copy of them."""
        if self._storage.nbytes() != self._size:
            self._storage.resize_(self._size)
        now = self._bytes()
        if self._copy is not None:
            if not torch.equal(_words(now), _words(self._copy)):
                now.copy_(self._copy)
        elif self._sum is not None and not torch.equal(_sum(now), self._sum):
            return [f"{self.name} ({human_bytes(self._size)}, too large to copy)"]
        return []

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)


def _words(values: Tensor) -> Tensor:
    """Returns bytes as 64-bit words, which are faster to compare."""
    return values if len(values) % 8 else values.view(torch.int64)


def _sum(values: Tensor) -> Tensor:
    whole = len(values) // 8 * 8
    return values[:whole].view(torch.int64).sum() + values[whole:].sum()


def methods(value: dict[Any, Any]) -> Any:
    """Returns the base class whose methods change a dict, bypassing its subclass."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def restore_some(own: dict[Any, Any], items: dict[Any, Any], kind: Any = dict) -> None:
    """Restores the items of a dict that have changed."""
    for key, item in items.items():
        if key not in own or kind.__getitem__(own, key) is not item:
            kind.__setitem__(own, key, item)


def restore_dict(own: dict[Any, Any], items: dict[Any, Any], kind: Any = dict) -> None:
    """Restores the items of a dict and their order."""
    for key in [key for key in own if key not in items and is_of_the_model(key)]:
        kind.__delitem__(own, key)
    restore_some(own, items, kind)
    if [key for key in own if key in items] != list(items):
        rest = {key: item for key, item in kind.items(own) if key not in items}
        kind.clear(own)
        restore_some(own, {**items, **rest}, kind)


def restore_parameters(module: nn.Module, items: dict[str, Any]) -> None:
    """Restores the parameters of a module."""
    own = module._parameters  # the current dict, which an open capture replaces
    if list(own) != list(items) or any(dict.get(own, key) is not item for key, item in items.items()):
        own.clear()
        own.update(items)


def restore_items(own: Any, items: Any) -> None:
    """Restores the items of a list, a deque or a bytearray."""
    if len(own) != len(items) or any(one is not other for one, other in zip(own, items, strict=True)):
        own.clear()
        own.extend(items)


def restore_members(own: set[Any], members: set[Any]) -> None:
    """Restores the members of a set."""
    own.intersection_update(members)
    own.update(members)


def restore_values(own: Any, values: Any) -> None:
    """Restores the values of an array."""
    if own.shape != values.shape or own.tobytes() != values.tobytes():
        own[...] = values


def restore_slot(value: Any, slot: str, item: Any) -> None:
    """Restores the value of a slot."""
    if getattr(value, slot, None) is not item:
        object.__setattr__(value, slot, item)


def restore_class(module: nn.Module, kind: type) -> None:
    """Restores the class of a module that was lazy or not yet parametrized."""
    if type(module) is not kind:
        module.__class__ = kind


def restore_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """Restores the gradient of a tensor."""
    if tensor.grad is not gradient:
        tensor.grad = gradient


def restore_tensor(tensor: Tensor, lazy: Any, data: Tensor, requires_grad: bool) -> None:
    """Restores a tensor's memory and shape, or the class of an uninitialized tensor."""
    if lazy is not None:
        if type(tensor) is not lazy:
            tensor.data = data
            tensor.__class__ = lazy
        return
    if not _is_same_view(tensor, data):
        tensor.data = data
    if tensor.requires_grad != requires_grad:
        (tensor if tensor.is_leaf else tensor.detach_()).requires_grad_(requires_grad)


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.layout != other.layout or one.shape != other.shape:
        return False
    if one.layout is not torch.strided or one.is_nested:
        return False  # its values and indices may differ; such tensors are rare in a model's state
    same_place = one.stride() == other.stride() and one.storage_offset() == other.storage_offset()
    return same_place and storage_number(one) == storage_number(other)
