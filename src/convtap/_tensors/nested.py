"""Structures of tensors: tuples, lists, mappings and dataclasses, walked and rebuilt with their shape kept."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a tuple, list, mapping or dataclass holds, each with its place: ``[0]``, ``[hidden]``."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (tuple, list)):
        pairs = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif isinstance(value, Mapping):
        pairs = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for name, item in pairs:
        yield f"[{name}]", item


def walk_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields everything in a structure that holds nothing itself, with its path: ``""``, ``"[0]"``, ``"[hidden][1]"``.

    A path is written behind a layer's name or key, wherever a part of its output has one: ``lstm[1][0]``.
    """
    if isinstance(value, (tuple, list, Mapping)) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        for place, item in _members(value):
            yield from walk_leaves(item, path + place)
    else:
        yield path, value


def walk_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a structure with its path in it: ``""``, ``"[0]"``, ``"[hidden][1]"``."""
    if isinstance(value, Tensor):
        yield "", value
        return
    for path, leaf in walk_leaves(value):
        if isinstance(leaf, Tensor):
            yield path, leaf


class Leaves:
    """The tensors of a structure, walked once, and the way back to a structure of the same kind.

    Attributes:
        structure: the structure.
        paths: where each tensor is in it: ``""``, ``"[0]"``, ``"[hidden][1]"``.
        tensors: the tensors, in the same order.
    """

    __slots__ = ("paths", "structure", "tensors")

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        if isinstance(structure, Tensor):
            self.paths, self.tensors = [""], [structure]
        else:
            found = list(walk_tensors(structure))
            self.paths, self.tensors = [path for path, _ in found], [tensor for _, tensor in found]

    def rebuild(self, values: Iterable[Any], other: Callable[[Any], Any] | None = None) -> Any:
        """Returns a structure of the same kind with other values in the places of the tensors; see ``map_leaves``."""
        following = iter(values)
        return map_leaves(lambda _: next(following), self.structure, other=other)


class Missing:
    """Stands for a part that a structure does not have."""


MISSING = Missing()


def _below(part: str, place: str) -> str | None:
    """Returns the rest of a path behind one of its places, or None if the path does not go there."""
    rest = part.removeprefix(place)
    return rest if part.startswith(place) and (not rest or rest.startswith("[")) else None


def part_of(value: Any, part: str) -> Any:
    """Returns the part of a structure at a path such as ``"[hidden][1]"``, or ``MISSING``."""
    if not part:
        return value
    for place, item in _members(value):
        rest = _below(part, place)
        found = MISSING if rest is None else part_of(item, rest)
        if found is not MISSING:
            return found
    return MISSING


def with_part(value: Any, part: str, new: Any) -> Any:
    """Returns a structure with the part at a path replaced; ``MISSING`` if it has no such part."""
    if not part:
        return new
    items = [item for _, item in _members(value)]
    for number, (place, item) in enumerate(_members(value)):
        rest = _below(part, place)
        changed = MISSING if rest is None else with_part(item, rest, new)
        if changed is not MISSING:
            items[number] = changed
            return _rebuilt(value, items)
    return MISSING


def _rebuilt(value: Any, items: list[Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, dict(zip(value, items, strict=True)))
    copy = object.__new__(type(value))
    for field, item in zip(dataclasses.fields(value), items, strict=True):
        object.__setattr__(copy, field.name, item)
    return copy


class Held:
    """A tensor that must be asked for: reading it may wait, or refuse."""

    __slots__ = ()

    def read(self, key: str) -> Tensor:
        """Returns the tensor; ``key`` names its call in an error."""
        raise NotImplementedError
