"""Structures of tensors: tuples, lists, mappings and dataclasses, walked and rebuilt with their shape kept."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)


class Omitted:
    """Stands where a layer's output held an object that is neither a tensor nor a plain value, and so was not kept."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<not kept: {self.kind}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Omitted) and other.kind == self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


def map_leaves(
    function: Callable[[Any], Any], value: Any, leaf: type = Tensor, other: Callable[[Any], Any] | None = None
) -> Any:
    """Applies a function to each leaf in a structure of tuples, lists, mappings and dataclasses; keeps the structure.

    Objects of other types become ``Omitted``, or what ``other`` makes of them; plain values stay.
    """
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [map_leaves(function, item, leaf, other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(function, item, leaf, other) for item in value]
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, {key: map_leaves(function, item, leaf, other) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            item = map_leaves(function, getattr(value, field.name), leaf, other)
            object.__setattr__(copy, field.name, item)
        return copy
    if isinstance(value, (*_PLAIN, Omitted, Tensor)):
        return value
    return Omitted(type(value).__name__) if other is None else other(value)


def read(value: Any, key: str) -> Any:
    """Returns what was kept, its Held tensors read."""
    return map_leaves(lambda held: held.read(key), value, Held)


def _rebuild_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return items
    try:
        return type(original)(**items) if dataclasses.is_dataclass(original) else type(original)(items)  # type: ignore[call-arg]
    except Exception:
        return items


def walk_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a structure with its path in it: ``""``, ``"0"``, ``"hidden.1"``."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
        pairs = zip(names, value, strict=True)
    elif isinstance(value, Mapping):
        pairs = ((str(key), item) for key, item in value.items())  # type: ignore[assignment]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))  # type: ignore[assignment]
    else:
        return
    for name, item in pairs:
        yield from walk_tensors(item, f"{path}.{name}" if path else str(name))


class Held:
    """A tensor that must be asked for: reading it may wait, or refuse."""

    __slots__ = ()

    def read(self, key: str) -> Tensor:
        """Returns the tensor; ``key`` names its call in an error."""
        raise NotImplementedError
